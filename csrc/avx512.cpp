// AVX-512 with VNNI (Ice Lake, Zen 4 and later): 8-bit dot products of unsigned activations (128 is added to them, and 128 times the sums of the
// weights subtracted again) with signed weights.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#include "tile.h"

namespace sqplus {
namespace {

struct Avx512 {
  static constexpr int width = 16;
  static constexpr int accumulators = 24;
  static constexpr bool unsigned_x = true;
  using Float = __m512;
  using Int = __m512i;

  static SQPLUS_INLINE Float zero() { return _mm512_setzero_ps(); }
  static SQPLUS_INLINE Int zero_int() { return _mm512_setzero_si512(); }
  static SQPLUS_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
  static SQPLUS_INLINE Int load_int(const void* p) { return _mm512_loadu_si512(p); }
  static SQPLUS_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static SQPLUS_INLINE Float broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static SQPLUS_INLINE Int broadcast4(int32_t v) { return _mm512_set1_epi32(v); }
  static SQPLUS_INLINE Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static SQPLUS_INLINE Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static SQPLUS_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static SQPLUS_INLINE Float fnma(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }
  static SQPLUS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  // As assembly: GCC 12 spills the accumulators of the intrinsic.
  static SQPLUS_INLINE Int dot4(Int sum, Int x, Int w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }

  template <int shift>
  static SQPLUS_INLINE Float nibble(Int packed) {
    const Int moved = shift == 0 ? packed : _mm512_srli_epi32(packed, shift);
    return _mm512_cvtepi32_ps(shift == 28 ? moved : _mm512_and_si512(moved, _mm512_set1_epi32(15)));
  }
};

}  // namespace

const Kernels kAvx512 = {"avx512", 6, true, w8<Avx512>, w4<Avx512>};

}  // namespace sqplus
#endif
