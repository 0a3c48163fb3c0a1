// The torch ops: inputs checked, activations prepared, panels handed to threads. Written against PyTorch's stable ABI (2.10), so that one build
// serves later versions too; threads are torch's own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace sqplus {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// From the lowest to the highest level.
const Kernels* const kLevels[] = {
    &kPortable,
#if defined(__x86_64__)
    &kAvx2,
    &kAvx512,
#endif
};

int64_t highest_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const Kernels* chosen = kLevels[highest_level()];

// The level in use, after lowering it to `level` (a negative one changes nothing).
int64_t cpu_level(int64_t level) {
  if (level >= 0) chosen = kLevels[std::min(level, highest_level())];
  return std::find(std::begin(kLevels), std::end(kLevels), chosen) - std::begin(kLevels);
}

// Calls f with a pointer of the tensor's type.
template <class F>
void with_floats(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(static_cast<float*>(t.data_ptr()));
    case ScalarType::BFloat16: return f(static_cast<BFloat16*>(t.data_ptr()));
    case ScalarType::Half: return f(static_cast<Half*>(t.data_ptr()));
    default: STD_TORCH_CHECK(false, "float32, bfloat16 or float16 is needed");
  }
}

// M rows in blocks of nearly equal size, each of at most `most` rows.
struct Blocks {
  int64_t count, base, longer;
  Blocks(int64_t rows, int64_t most) : count((rows + most - 1) / most), base(count ? rows / count : 0), longer(count ? rows % count : 0) {}
  int rows(int64_t block) const { return static_cast<int>(base + (block < longer)); }
  int64_t first(int64_t block) const { return block * base + std::min(block, longer); }
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where the largest absolute value is NaN, the scale is: it must stay visible.
float scale_of(float maximum) { return maximum == 0 ? 1.0f : maximum / 127.0f; }

template <class T>
float absolute_maximum(const T* x, int64_t count) {
  float largest = 0;
  bool not_a_number = false;
  for (int64_t k = 0; k < count; ++k) {
    const float value = std::fabs(static_cast<float>(x[k]));
    not_a_number |= value != value;
    largest = std::max(largest, value);
  }
  return not_a_number ? NAN : largest;
}

// Rounded to the nearest integer, ties to the even one: below 2^22 adding 1.5 * 2^23 leaves no bits behind the point.
int8_t to_int8(float value) {
  const float bounded = std::min(std::max(value, -128.0f), 127.0f);
  return static_cast<int8_t>(static_cast<int32_t>((bounded + 12582912.0f) - 12582912.0f));
}

int64_t rows_of(const Tensor& x) {
  const auto sizes = x.sizes();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return rows;
}

Tensor result_for(const Tensor& x, int64_t channels) {
  const auto found = x.sizes();
  std::vector<int64_t> sizes(found.begin(), found.end());
  sizes.back() = channels;
  return torch::stable::new_empty(x, sizes);
}

// int8 (N, K) -> panels, int8 flat, and 128 times the sum of each channel, int32 (N rounded up to panels).
std::tuple<Tensor, Tensor> cpu_pack_w8(const Tensor& given) {
  const Tensor weight = torch::stable::contiguous(given);
  const int64_t n = weight.size(0), k = weight.size(1), steps = round_up(k, 4) / 4;
  Tensor packed = torch::stable::new_zeros(weight, {round_up(n, kPanel) * steps * 4});
  Tensor correction = torch::stable::new_zeros(weight, {round_up(n, kPanel)}, ScalarType::Int);
  const int8_t* from = static_cast<const int8_t*>(weight.data_ptr());
  int8_t* to = static_cast<int8_t*>(packed.data_ptr());
  int32_t* corrections = static_cast<int32_t*>(correction.data_ptr());
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int8_t* panel = to + row / kPanel * steps * kPanel * 4 + row % kPanel * 4;
      for (int64_t column = 0; column < k; ++column) {
        const int8_t value = from[row * k + column];
        panel[column / 4 * kPanel * 4 + column % 4] = value;
        corrections[row] += 128 * value;
      }
    }
  });
  return {packed, correction};
}

// int8 (N, K) of -8..7 -> a flat int32 of panels, eight nibbles with 8 added in each.
Tensor cpu_pack_w4(const Tensor& given) {
  const Tensor weight = torch::stable::contiguous(given);
  const int64_t n = weight.size(0), k = weight.size(1), steps = round_up(k, 8) / 8;
  Tensor packed = torch::stable::new_zeros(weight, {round_up(n, kPanel) * steps}, ScalarType::Int);
  const int8_t* from = static_cast<const int8_t*>(weight.data_ptr());
  uint32_t* to = static_cast<uint32_t*>(packed.data_ptr());
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint32_t* panel = to + row / kPanel * steps * kPanel + row % kPanel;
      for (int64_t column = 0; column < k; ++column) {
        const uint32_t nibble = static_cast<uint32_t>(from[row * k + column] + 8);
        panel[column / 8 * kPanel] |= nibble << nibble_shift(static_cast<int>(column % 8));
      }
    }
  });
  return packed;
}

// x (..., K) in float -> (..., N): y = (int(x) @ weight.T) * input scale * weight_scale + bias. `weight_scale` float32 (N,), `input_scale` float32
// (1,) when it is static, `bias` float32 (N,).
Tensor cpu_w8a8(const Tensor& given, const Tensor& packed, const Tensor& correction, const Tensor& weight_scale, bool per_token, const std::optional<Tensor>& input_scale,
                const std::optional<Tensor>& bias) {
  const Tensor x = torch::stable::contiguous(given);
  const Kernels& kernels = *chosen;
  const int64_t k = x.sizes().back(), m = rows_of(x), n = weight_scale.numel(), steps = round_up(k, 4) / 4;
  STD_TORCH_CHECK(packed.numel() == round_up(n, kPanel) * steps * 4, "the packed weight does not fit x and the scales");
  Tensor y = result_for(x, n);
  if (m == 0 || n == 0) return y;
  const Blocks blocks(m, kernels.rows);
  std::vector<float> scales(m);
  std::vector<int32_t> integers(m * steps);

  with_floats(x, [&](const auto* values) {
    if (input_scale) {
      std::fill(scales.begin(), scales.end(), *static_cast<const float*>(input_scale->data_ptr()));
    } else {
      torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) scales[row] = absolute_maximum(values + row * k, k);
      });
      if (!per_token) {
        const float largest = absolute_maximum(scales.data(), m);
        std::fill(scales.begin(), scales.end(), largest);
      }
      for (float& scale : scales) scale = scale_of(scale);
    }
    torch::stable::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<int8_t> row(steps * 4);
      const int32_t shift = kernels.unsigned_x ? static_cast<int32_t>(0x80808080) : 0;  // flipping the sign bit adds 128
      for (int64_t block = begin; block < end; ++block) {
        const int rows = blocks.rows(block);
        int32_t* to = integers.data() + blocks.first(block) * steps;
        for (int r = 0; r < rows; ++r) {
          const auto* from = values + (blocks.first(block) + r) * k;
          const float scale = scales[blocks.first(block) + r];
          for (int64_t i = 0; i < k; ++i) row[i] = to_int8(static_cast<float>(from[i]) / scale);
          for (int64_t step = 0; step < steps; ++step) {
            int32_t four;
            __builtin_memcpy(&four, row.data() + step * 4, 4);
            to[step * rows + r] = four ^ shift;
          }
        }
      }
    });
  });

  const int8_t* weight = static_cast<const int8_t*>(packed.data_ptr());
  const int32_t* corrections = static_cast<const int32_t*>(correction.data_ptr());
  const float* of_channel = static_cast<const float*>(weight_scale.data_ptr());
  const float* offset = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  with_floats(y, [&](auto* out) {
    using Out = std::remove_pointer_t<decltype(out)>;
    torch::stable::parallel_for(0, round_up(n, kPanel) / kPanel, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float sums[8 * kPanel];
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel, channels = std::min<int64_t>(kPanel, n - first);
        for (int64_t block = 0; block < blocks.count; ++block) {
          const int64_t top = blocks.first(block);
          kernels.w8(blocks.rows(block), {integers.data() + top * steps, steps, weight + panel * steps * kPanel * 4, corrections + first, sums});
          for (int r = 0; r < blocks.rows(block); ++r) {
            Out* to = out + (top + r) * n + first;
            for (int64_t c = 0; c < channels; ++c) {
              const float value = sums[r * kPanel + c] * scales[top + r] * of_channel[first + c];
              to[c] = static_cast<Out>(offset ? value + offset[first + c] : value);
            }
          }
        }
      }
    });
  });
  return y;
}

// x (..., K) in float -> (..., N): y = x @ ((nibble - 8 - zero_point) * scale).T + bias. `scale` in any float dtype and `zero_point` int8 are
// (panels, groups, 64).
Tensor cpu_w4a16(const Tensor& given, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point,
                 const std::optional<Tensor>& bias, int64_t n) {
  const Tensor x = torch::stable::contiguous(given);
  const Kernels& kernels = *chosen;
  const int64_t k = x.sizes().back(), m = rows_of(x), panels = round_up(n, kPanel) / kPanel, groups = scale.size(1);
  STD_TORCH_CHECK(groups > 0 && k % (groups * 8) == 0 && packed.numel() == panels * kPanel * k / 8 && scale.size(0) == panels,
                  "the packed weight does not fit x and the scales");
  Tensor y = result_for(x, n);
  if (m == 0 || n == 0) return y;
  const Blocks blocks(m, kernels.rows);
  const int64_t group_size = k / groups;
  std::vector<float> floats(m * k), sums(m * groups);

  with_floats(x, [&](const auto* values) {
    torch::stable::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int rows = blocks.rows(block);
        const int64_t top = blocks.first(block);
        for (int r = 0; r < rows; ++r) {
          const auto* from = values + (top + r) * k;
          float* to = floats.data() + top * k + r;
          for (int64_t group = 0; group < groups; ++group) {
            float sum = 0;
            for (int64_t i = group * group_size; i < (group + 1) * group_size; ++i) sum += to[i * rows] = static_cast<float>(from[i]);
            sums[top * groups + group * rows + r] = sum;
          }
        }
      }
    });
  });

  const uint32_t* weight = static_cast<const uint32_t*>(packed.data_ptr());
  const int8_t* zeros = zero_point ? static_cast<const int8_t*>(zero_point->data_ptr()) : nullptr;
  const float* offset = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  with_floats(y, [&](auto* out) {
    using Out = std::remove_pointer_t<decltype(out)>;
    with_floats(scale, [&](const auto* scales) {
      torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        alignas(64) float result[8 * kPanel];
        std::vector<float> of_group(groups * kPanel), zero(groups * kPanel, 8.0f);
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t first = panel * kPanel, channels = std::min<int64_t>(kPanel, n - first);
          for (int64_t i = 0; i < groups * kPanel; ++i) of_group[i] = static_cast<float>(scales[panel * groups * kPanel + i]);
          if (zeros) {
            for (int64_t i = 0; i < groups * kPanel; ++i) zero[i] = static_cast<float>(zeros[panel * groups * kPanel + i] + 8);
          }
          for (int64_t block = 0; block < blocks.count; ++block) {
            const int64_t top = blocks.first(block);
            kernels.w4(blocks.rows(block), {floats.data() + top * k, sums.data() + top * groups, groups, group_size / 8,
                                            weight + panel * kPanel * (k / 8), of_group.data(), zero.data(), result});
            for (int r = 0; r < blocks.rows(block); ++r) {
              Out* to = out + (top + r) * n + first;
              for (int64_t c = 0; c < channels; ++c) {
                const float value = result[r * kPanel + c];
                to[c] = static_cast<Out>(offset ? value + offset[first + c] : value);
              }
            }
          }
        }
      });
    });
  });
  return y;
}

}  // namespace
}  // namespace sqplus

STABLE_TORCH_LIBRARY_FRAGMENT(smoothquant_plus, m) {
  m.def("cpu_level(int level) -> int");
  m.def("cpu_pack_w8(Tensor weight) -> (Tensor, Tensor)");
  m.def("cpu_pack_w4(Tensor weight) -> Tensor");
  m.def("cpu_w8a8(Tensor x, Tensor weight, Tensor correction, Tensor weight_scale, bool per_token, Tensor? input_scale, Tensor? bias) -> Tensor");
  m.def("cpu_w4a16(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int channels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smoothquant_plus, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&sqplus::cpu_level)); }

STABLE_TORCH_LIBRARY_IMPL(smoothquant_plus, CPU, m) {
  m.impl("cpu_pack_w8", TORCH_BOX(&sqplus::cpu_pack_w8));
  m.impl("cpu_pack_w4", TORCH_BOX(&sqplus::cpu_pack_w4));
  m.impl("cpu_w8a8", TORCH_BOX(&sqplus::cpu_w8a8));
  m.impl("cpu_w4a16", TORCH_BOX(&sqplus::cpu_w4a16));
}
