// The instruction sets: which levels this machine has, which one is in use, and what it reaches at best.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tensors.h"

namespace sqplus {
namespace {

// From the lowest to the highest level, as LEVELS in runtime/kernels/cpu.py.
std::vector<Kernels> levels_here() {
  std::vector<Kernels> levels = {kPortable};
#if defined(SQPLUS_EMULATE)
  const bool avx2 = true, avx512 = true, bfloat16 = true;
#elif defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(__x86_64__)
  if (avx2) levels.push_back(kAvx2);
  Kernels kernels = kAvx512;
  if (__builtin_cpu_is("intel")) kernels.w8 = w8_ahead_avx512;
  if (avx512) levels.push_back(kernels);
  if (bfloat16) {
    kernels.name = "avx512_bf16";
    kernels.bfloat16 = bfloat16_avx512;
    kernels.w4_bfloat16 = w4_bfloat16_avx512;
    kernels.sum_bfloat16 = sum_bfloat16_avx512;
    kernels.peak_bfloat16 = peak_bfloat16_avx512;
    levels.push_back(kernels);
    if (amx_allowed()) levels.push_back(with_amx(kernels));
  }
#endif
  return levels;
}

const std::vector<Kernels>& kLevels = *new std::vector<Kernels>(levels_here());  // never destroyed: threads may still multiply when the process ends

// The fastest level: the highest, but for Intel's processors without AMX, whose vectors multiply bfloat16 numbers at a fraction of the speed of AMD's.
const Kernels* fastest() {
  const Kernels* highest = &kLevels.back();
#if defined(__x86_64__)
  if (highest->w4_bfloat16 && !highest->tiles && __builtin_cpu_is("intel")) return highest - 1;
#endif
  return highest;
}

const Kernels* chosen = fastest();

}  // namespace

const Kernels& kernels_in_use() { return *chosen; }
const Kernels& vectors_in_use() { return chosen->tiles ? *(chosen - 1) : *chosen; }

namespace {

// The level in use, after choosing `level` or, where the machine has less, its highest (a negative one changes nothing).
int64_t cpu_level(int64_t level) {
  if (level >= 0) chosen = &kLevels[std::min<int64_t>(level, kLevels.size() - 1)];
  return chosen - kLevels.data();
}

// Reads a tensor, but for what is after its last whole MB, with torch's threads: the result says nothing.
int64_t cpu_read(const Tensor& from) {
  STD_TORCH_CHECK(from.is_contiguous(), "a contiguous tensor is needed");
  const int64_t bytes = from.numel() * from.element_size(), chunk = 1 << 20;
  const char* p = static_cast<const char*>(from.data_ptr());
  const int64_t chunks = bytes / chunk;
  std::vector<int64_t> found(chunks);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    found[begin] = chosen->read_memory(p + begin * chunk, (end - begin) * chunk);
  });
  int64_t sum = 0;
  for (int64_t value : found) sum ^= value;
  return sum;
}

// How many operations the fastest instructions of one thread have done, each product and each sum one; 0 where there are none.
int64_t cpu_peak(std::string what, int64_t iterations) {
  const auto peak = what == "int8" ? chosen->peak_int8 : what == "float32" ? chosen->peak_float32 : chosen->peak_bfloat16;
  return peak ? peak(iterations) : 0;
}

}  // namespace
}  // namespace sqplus

STABLE_TORCH_LIBRARY_FRAGMENT(smoothquant_plus, m) {
  m.def("cpu_level(int level) -> int");
  m.def("cpu_read(Tensor tensor) -> int");
  m.def("cpu_peak(str what, int iterations) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(smoothquant_plus, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&sqplus::cpu_level));
  m.impl("cpu_peak", TORCH_BOX(&sqplus::cpu_peak));
}

STABLE_TORCH_LIBRARY_IMPL(smoothquant_plus, CPU, m) {
  m.impl("cpu_read", TORCH_BOX(&sqplus::cpu_read));
}
