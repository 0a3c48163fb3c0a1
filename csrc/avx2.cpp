// AVX2 and FMA: every x86 server since 2015. No 8-bit dot product: |x| times w with the sign of x, in 16 bits, which cannot saturate
// (2 * 128 * 127 < 2^15), then pairs in 32.
#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#include "tile.h"

namespace sqplus {
namespace {

struct Avx2 {
  static constexpr int width = 8;
  static constexpr bool unsigned_x = false;
  static constexpr int accumulators = 12;
  using Float = __m256;
  using Int = __m256i;

  static SQPLUS_INLINE Float zero() { return _mm256_setzero_ps(); }
  static SQPLUS_INLINE Int zero_int() { return _mm256_setzero_si256(); }
  static SQPLUS_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
  static SQPLUS_INLINE Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static SQPLUS_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static SQPLUS_INLINE Float broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static SQPLUS_INLINE Int broadcast4(int32_t v) { return _mm256_set1_epi32(v); }
  static SQPLUS_INLINE Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  static SQPLUS_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static SQPLUS_INLINE Float fnma(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }
  static SQPLUS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  static SQPLUS_INLINE Int dot4(Int sum, Int x, Int w) {
    const Int pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  template <int shift>
  static SQPLUS_INLINE Float nibble(Int packed) {
    const Int moved = shift == 0 ? packed : _mm256_srli_epi32(packed, shift);
    return _mm256_cvtepi32_ps(shift == 28 ? moved : _mm256_and_si256(moved, _mm256_set1_epi32(15)));
  }
};

}  // namespace

const Kernels kAvx2 = {"avx2", 3, false, w8<Avx2>, w4<Avx2>};

}  // namespace sqplus
#endif
