// A vector of AVX-512. With SQPLUS_EMULATE its intrinsics are functions of emulate.h.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#if defined(SQPLUS_EMULATE)
#pragma GCC target("avx2,fma,f16c")
#include "emulate.h"
#elif defined(SQPLUS_BFLOAT16)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif
#include "fixed.h"

namespace sqplus {
namespace {

struct Avx512 {
  static constexpr int width = 16;
  static constexpr int rows = 5;
  static constexpr int accumulators = 24;
  static constexpr int ahead = 8192;
  static constexpr bool soon = false;
  static constexpr bool saturates = false;
#if defined(SQPLUS_EMULATE)
  using Float = emulated::Floats;
  using Int = emulated::Longs;
#else
  using Float = __m512;
  using Int = __m512i;
#endif

  static SQPLUS_INLINE Int zero_int() { return _mm512_setzero_si512(); }
  static SQPLUS_INLINE Int broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
  static SQPLUS_INLINE Int load_int(const void* p) { return _mm512_loadu_si512(p); }
  static SQPLUS_INLINE void store_int(int32_t* p, Int a) { _mm512_storeu_si512(p, a); }
  static SQPLUS_INLINE Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static SQPLUS_INLINE Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static SQPLUS_INLINE Int multiply_int(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static SQPLUS_INLINE Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }

  // Of each 32 bits, with zeros below.
  static SQPLUS_INLINE Int lower_half(Int a) { return _mm512_slli_epi32(a, 16); }
  static SQPLUS_INLINE Int upper_half(Int a) { return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))); }
  static SQPLUS_INLINE Float as_float(Int a) { return _mm512_castsi512_ps(a); }
  static SQPLUS_INLINE Int as_int(Float a) { return _mm512_castps_si512(a); }

  static SQPLUS_INLINE Float broadcast(float x) { return _mm512_set1_ps(x); }
  static SQPLUS_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
  static SQPLUS_INLINE Float load_bfloat16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static SQPLUS_INLINE Float load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static SQPLUS_INLINE Int load_int8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static SQPLUS_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
  static SQPLUS_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static SQPLUS_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static SQPLUS_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static SQPLUS_INLINE Float fnma(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }

  // Unsigned times signed. As assembly: GCC 12 spills the accumulators of the intrinsic.
  static SQPLUS_INLINE Int dot4(Int sum, Int w, Int x) {
#if defined(SQPLUS_EMULATE)
    return _mm512_dpbusd_epi32(sum, w, x);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
#endif
  }
  static SQPLUS_INLINE Int low_nibbles(Int packed) { return _mm512_and_si512(packed, _mm512_set1_epi32(0x0f0f0f0f)); }
  static SQPLUS_INLINE Int high_nibbles(Int packed) { return low_nibbles(_mm512_srli_epi32(packed, 4)); }
  static SQPLUS_INLINE Int dot8(Int sum, Int low, Int x, Int high, Int y) { return dot4(dot4(sum, low, x), high, y); }
  static SQPLUS_INLINE Int nibble_pairs(Int packed, int p) { return _mm512_and_si512(_mm512_srli_epi32(packed, 4 * p), _mm512_set1_epi32(0x000f000f)); }
  static SQPLUS_INLINE Int nibble_pairs(Int packed, std::integral_constant<int, 3>) { return _mm512_srli_epi16(packed, 12); }
  static SQPLUS_INLINE Int add_pairs(Int sum, Int nibbles, Int x) {
#if defined(SQPLUS_EMULATE)
    return _mm512_dpwssd_epi32(sum, nibbles, x);
#else
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(nibbles), "v"(x));
    return sum;
#endif
  }

  template <bool soon>
  static SQPLUS_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), soon ? _MM_HINT_T0 : _MM_HINT_T1);
  }
  template <class T>
  static SQPLUS_INLINE void touch(T& a) {
#if defined(SQPLUS_EMULATE)
    asm volatile("" : "+m"(a));
#else
    asm volatile("" : "+v"(a));
#endif
  }
};

}  // namespace
}  // namespace sqplus
