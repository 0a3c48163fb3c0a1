// AVX2 with FMA and F16C: every x86 server since 2015. It has no 8-bit dot product.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#pragma GCC target("avx2,fma,f16c")
#include "fixed.h"

namespace sqplus {
namespace {

struct Avx2 {
  static constexpr int width = 8;
  static constexpr int rows = 4;
  static constexpr int accumulators = 10;
  static constexpr int ahead = 4096;
  static constexpr bool soon = true;
  static constexpr bool saturates = true;
  using Float = __m256;
  using Int = __m256i;

  static SQPLUS_INLINE Int zero_int() { return _mm256_setzero_si256(); }
  static SQPLUS_INLINE Int broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
  static SQPLUS_INLINE Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static SQPLUS_INLINE void store_int(int32_t* p, Int a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static SQPLUS_INLINE Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static SQPLUS_INLINE Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static SQPLUS_INLINE Int multiply_int(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static SQPLUS_INLINE Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }

  // Of each 32 bits, with zeros below.
  static SQPLUS_INLINE Int lower_half(Int a) { return _mm256_slli_epi32(a, 16); }
  static SQPLUS_INLINE Int upper_half(Int a) { return _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))); }
  static SQPLUS_INLINE Float as_float(Int a) { return _mm256_castsi256_ps(a); }
  static SQPLUS_INLINE Int as_int(Float a) { return _mm256_castps_si256(a); }

  static SQPLUS_INLINE Float broadcast(float x) { return _mm256_set1_ps(x); }
  static SQPLUS_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
  static SQPLUS_INLINE Float load_bfloat16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static SQPLUS_INLINE Float load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static SQPLUS_INLINE Int load_int8(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static SQPLUS_INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
  static SQPLUS_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static SQPLUS_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static SQPLUS_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static SQPLUS_INLINE Float fnma(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }

  // Pairs of products in 16 bits, which cut_pairs keeps from saturating, then pairs of those in 32.
  static SQPLUS_INLINE Int dot4(Int sum, Int w, Int x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
  }
  static SQPLUS_INLINE Int low_nibbles(Int packed) { return _mm256_and_si256(packed, _mm256_set1_epi8(15)); }
  static SQPLUS_INLINE Int high_nibbles(Int packed) { return _mm256_and_si256(_mm256_srli_epi32(packed, 4), _mm256_set1_epi8(15)); }
  // Four products of a nibble and an int8 are below 2^15 (4 * 15 * 128).
  static SQPLUS_INLINE Int dot8(Int sum, Int low, Int x, Int high, Int y) {
    const Int fours = _mm256_add_epi16(_mm256_maddubs_epi16(low, x), _mm256_maddubs_epi16(high, y));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(fours, _mm256_set1_epi16(1)));
  }
  static SQPLUS_INLINE Int nibble_pairs(Int packed, int p) { return _mm256_and_si256(_mm256_srli_epi32(packed, 4 * p), _mm256_set1_epi32(0x000f000f)); }
  static SQPLUS_INLINE Int nibble_pairs(Int packed, std::integral_constant<int, 3>) { return _mm256_srli_epi16(packed, 12); }
  // As assembly: GCC 12 adds in another order, for which it spills.
  static SQPLUS_INLINE Int add_pairs(Int sum, Int nibbles, Int x) {
    Int pairs;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "x"(nibbles), "x"(x));
    return sum;
  }

  template <bool soon>
  static SQPLUS_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), soon ? _MM_HINT_T0 : _MM_HINT_T1);
  }
  template <class T>
  static SQPLUS_INLINE void touch(T& a) {
    asm volatile("" : "+x"(a));
  }
};

// 255 (x + x') leaves 16 bits where two neighbours of one sign add up to more than 128: such a four becomes x = (x + 1) / 2, rounded down, and the rest.
// So nothing is lost, whatever x is.
int32_t cut_pairs(int64_t start, int64_t steps, int32_t* x, Rest* rest) {
  int32_t rests = 0;
  for (int64_t i = 0; i < steps; i += 8) {
    int32_t last[8] = {};
    const bool whole = i + 8 <= steps;
    if (!whole) std::memcpy(last, x + i, (steps - i) * 4);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), Avx2::load_int(whole ? x + i : last));
    const __m256i beyond = _mm256_cmpgt_epi16(_mm256_abs_epi16(pairs), _mm256_set1_epi16(128));
    const __m256i either = _mm256_or_si256(beyond, _mm256_slli_epi32(beyond, 16));
    for (uint32_t lanes = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(either))); lanes; lanes &= lanes - 1) {
      const int64_t found = i + __builtin_ctz(lanes);
      int8_t four[4], other[4];
      std::memcpy(four, x + found, 4);
      for (int j = 0; j < 4; ++j) {
        const int half = (four[j] + 1) >> 1;
        other[j] = static_cast<int8_t>(four[j] - half);
        four[j] = static_cast<int8_t>(half);
      }
      std::memcpy(x + found, four, 4);
      Rest& own = rest[rests++];
      std::memcpy(&own.x, other, 4);
      own.at = static_cast<int32_t>(start + found);
    }
  }
  return rests;
}

}  // namespace

constexpr Kernels kAvx2 = [] {
  Kernels kernels = kernels_of<Avx2>("avx2", w4_fixed<Avx2>, fix_group);
  kernels.cut = cut_pairs;
  return kernels;
}();

}  // namespace sqplus
#endif
