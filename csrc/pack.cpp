// Weights repacked, once, as the products read them (kernels.h has the layouts), in large pages of memory.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "tensors.h"

namespace sqplus {
namespace {

constexpr int64_t kPage = 2 << 20, kShared = 32 << 20;

// Memory that starts with a page of 2 MB and is in such pages where the system has them: a product at M = 1 reads every page of a weight once, and memory before the
// first whole one would be in small pages. What that leaves out is never touched, so no memory is behind it.
Tensor pages(const Tensor& like, int64_t bytes, ScalarType type) {
  const int64_t size = type == ScalarType::Int ? 4 : 1;
  Tensor room = torch::stable::new_empty(like, {(bytes + kPage) / size}, type);
  const int64_t before = -reinterpret_cast<intptr_t>(room.data_ptr()) & (kPage - 1);
  Tensor made = torch::stable::narrow(room, 0, before / size, bytes / size);
#if defined(MADV_HUGEPAGE)
  madvise(made.data_ptr(), bytes / kPage * kPage, MADV_HUGEPAGE);  // advice: where it fails nothing is lost
#endif
  return made;
}

// Lets memory of some MB that was never touched be in pages of 2 MB, as `pages` does, but for what is before the first whole one.
void cpu_huge_pages(const Tensor& memory) {
  const int64_t bytes = memory.numel() * memory.element_size(), before = -reinterpret_cast<intptr_t>(memory.data_ptr()) & (kPage - 1);
#if defined(MADV_HUGEPAGE)
  if (bytes >= 2 * kPage) madvise(static_cast<char*>(memory.data_ptr()) + before, (bytes - before) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

// Zeros for a weight. Small ones are given parts of the same pages, which are freed with the last of them.
Tensor zeros_for_weight(const Tensor& like, int64_t count, ScalarType type) {
  const int64_t size = type == ScalarType::Int ? 4 : 1, bytes = count * size;
  if (count == 0) return torch::stable::new_empty(like, {0}, type);
  Tensor made;
  if (bytes > kShared / 4) {
    made = pages(like, bytes, type);
  } else {
    struct Shared {
      Tensor all;
      int64_t used = kShared;
    };
    static std::mutex mutex;
    static auto& shared = *new std::map<ScalarType, Shared>;  // never destroyed: PyTorch may be gone before
    const std::lock_guard<std::mutex> lock(mutex);
    Shared& own = shared[type];
    if (own.used + bytes > kShared) own = {pages(like, kShared, type), 0};
    made = torch::stable::narrow(own.all, 0, own.used / size, count);
    own.used += round_up(bytes, 64);
  }
  std::memset(made.data_ptr(), 0, bytes);
  return made;
}

// int8 (N, K) -> a flat uint8 of panels, 128 added.
Tensor cpu_pack_w8(const Tensor& given) {
  STD_TORCH_CHECK(given.dim() == 2 && given.scalar_type() == ScalarType::Char, "an int8 matrix is needed");
  const Tensor weight = torch::stable::contiguous(given);
  const int64_t n = weight.size(0), k = weight.size(1), steps = round_up(k, 4) / 4;
  Tensor packed = zeros_for_weight(weight, round_up(n, kPanel) * steps * 4, ScalarType::Byte);
  const int8_t* from = static_cast<const int8_t*>(weight.data_ptr());
  uint8_t* to = static_cast<uint8_t*>(packed.data_ptr());
  parallel_for(0, n, kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* panel = to + row / kPanel * steps * kPanel * 4 + row % kPanel * 4;
      for (int64_t column = 0; column < k; ++column) panel[column / 4 * kPanel * 4 + column % 4] = static_cast<uint8_t>(from[row * k + column] + 128);
    }
  });
  return packed;
}

// int8 (N, K) of -8..7 -> a flat int32 of panels, eight nibbles with 8 added in each.
Tensor cpu_pack_w4(const Tensor& given) {
  STD_TORCH_CHECK(given.dim() == 2 && given.scalar_type() == ScalarType::Char, "an int8 matrix is needed");
  const Tensor weight = torch::stable::contiguous(given);
  const int64_t n = weight.size(0), k = weight.size(1), steps = round_up(k, 8) / 8;
  Tensor packed = zeros_for_weight(weight, round_up(n, kPanel) * steps, ScalarType::Int);
  const int8_t* from = static_cast<const int8_t*>(weight.data_ptr());
  uint32_t* to = static_cast<uint32_t*>(packed.data_ptr());
  parallel_for(0, n, kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint32_t* panel = to + row / kPanel * steps * kPanel + row % kPanel;
      for (int64_t column = 0; column < k; ++column) {
        const uint32_t nibble = static_cast<uint32_t>(from[row * k + column] + 8) & 15;
        panel[column / 8 * kPanel] |= nibble << nibble_shift(static_cast<int>(column % 8));
      }
    }
  });
  return packed;
}

// bfloat16 (N, K) -> a flat int32 of panels, two numbers in each.
Tensor cpu_pack_bfloat16(const Tensor& given) {
  STD_TORCH_CHECK(given.dim() == 2 && given.scalar_type() == ScalarType::BFloat16, "a bfloat16 matrix is needed");
  const Tensor weight = torch::stable::contiguous(given);
  const int64_t n = weight.size(0), k = weight.size(1), steps = round_up(k, 2) / 2;
  Tensor packed = zeros_for_weight(weight, round_up(n, kPanel) * steps, ScalarType::Int);
  const char* from = static_cast<const char*>(weight.data_ptr());
  char* to = static_cast<char*>(packed.data_ptr());
  parallel_for(0, round_up(n, kPanel) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, n - first);
        char* place = to + (panel * steps + step) * kStep;
        for (int64_t row = 0; row < count; ++row) std::memcpy(place + row * 4, from + ((first + row) * k + step * 2) * 2, std::min<int64_t>(2, k - step * 2) * 2);
      }
    }
  });
  return packed;
}

}  // namespace
}  // namespace sqplus

STABLE_TORCH_LIBRARY_FRAGMENT(smoothquant_plus, m) {
  m.def("cpu_huge_pages(Tensor memory) -> ()");
  m.def("cpu_pack_w8(Tensor weight) -> Tensor");
  m.def("cpu_pack_w4(Tensor weight) -> Tensor");
  m.def("cpu_pack_bfloat16(Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smoothquant_plus, CPU, m) {
  m.impl("cpu_huge_pages", TORCH_BOX(&sqplus::cpu_huge_pages));
  m.impl("cpu_pack_w8", TORCH_BOX(&sqplus::cpu_pack_w8));
  m.impl("cpu_pack_w4", TORCH_BOX(&sqplus::cpu_pack_w4));
  m.impl("cpu_pack_bfloat16", TORCH_BOX(&sqplus::cpu_pack_bfloat16));
}
