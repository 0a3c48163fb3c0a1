// The intrinsics of AVX-512 and the instructions of AMX that the kernels use, as loops: for testing on machines without them (`make emulate`), never for use.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "rows.h"

namespace sqplus {
namespace {
namespace emulated {

using Floats = float __attribute__((vector_size(64), may_alias));
using Ints = int32_t __attribute__((vector_size(64), may_alias));
using Unsigned = uint32_t __attribute__((vector_size(64), may_alias));
using Shorts = uint16_t __attribute__((vector_size(64), may_alias));
using Longs = long long __attribute__((vector_size(64), may_alias));

template <class To, class From>
inline To as(const From& from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector, class F>
inline Vector each(F&& f) {
  Vector out;
  for (size_t i = 0; i < sizeof(Vector) / sizeof(out[0]); ++i) out[i] = f(i);
  return out;
}

inline Longs set1_epi32(int32_t x) { return as<Longs>(each<Ints>([&](int) { return x; })); }
inline Floats set1_ps(float x) { return each<Floats>([&](int) { return x; }); }
inline Longs setzero_si512() { return set1_epi32(0); }
inline Floats setzero_ps() { return set1_ps(0); }
inline Longs load(const void* p) {
  Longs out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline Floats loadu_ps(const float* p) { return as<Floats>(load(p)); }
inline void storeu_ps(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }
inline void storeu_si512(void* p, Longs a) { std::memcpy(p, &a, sizeof a); }
inline Longs add_epi32(Longs a, Longs b) { return as<Longs>(as<Unsigned>(a) + as<Unsigned>(b)); }
inline Longs sub_epi32(Longs a, Longs b) { return as<Longs>(as<Unsigned>(a) - as<Unsigned>(b)); }
inline Longs mullo_epi32(Longs a, Longs b) { return as<Longs>(as<Unsigned>(a) * as<Unsigned>(b)); }
inline Longs and_si512(Longs a, Longs b) { return a & b; }
inline Longs or_si512(Longs a, Longs b) { return a | b; }
inline Longs srli_epi32(Longs a, int bits) { return as<Longs>(as<Unsigned>(a) >> bits); }
inline Longs srli_epi16(Longs a, int bits) { return as<Longs>(as<Shorts>(a) >> bits); }
inline Longs slli_epi32(Longs a, int bits) { return as<Longs>(as<Unsigned>(a) << bits); }
inline Floats castsi512_ps(Longs a) { return as<Floats>(a); }
inline Longs castps_si512(Floats a) { return as<Longs>(a); }
inline Floats cvtepi32_ps(Longs a) {
  const Ints from = as<Ints>(a);
  return each<Floats>([&](int i) { return static_cast<float>(from[i]); });
}
inline Longs cvtepu16_epi32(__m256i a) {
  uint16_t from[16];
  std::memcpy(from, &a, sizeof from);
  return as<Longs>(each<Unsigned>([&](int i) { return from[i]; }));
}
inline Longs cvtepi8_epi32(__m128i a) {
  int8_t from[16];
  std::memcpy(from, &a, sizeof from);
  return as<Longs>(each<Ints>([&](int i) { return from[i]; }));
}
inline Floats cvtph_ps(__m256i a) {
  uint16_t from[16];
  std::memcpy(from, &a, sizeof from);
  return each<Floats>([&](int i) { return from_half(from[i]); });
}
inline Floats add_ps(Floats a, Floats b) { return a + b; }
inline Floats mul_ps(Floats a, Floats b) { return a * b; }
inline Floats fmadd_ps(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline Floats fnmadd_ps(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int i) { return std::fma(-a[i], b[i], c[i]); });
}
inline Longs permutexvar_epi16(Longs index, Longs table) {
  const Shorts at = as<Shorts>(index), from = as<Shorts>(table);
  return as<Longs>(each<Shorts>([&](int i) { return from[at[i] & 31]; }));
}
inline Longs dpbusd_epi32(Longs sum, Longs w, Longs x) {
  uint8_t a[64];
  int8_t b[64];
  std::memcpy(a, &w, 64);
  std::memcpy(b, &x, 64);
  const Ints before = as<Ints>(sum);
  return as<Longs>(each<Ints>([&](int i) {
    int32_t total = before[i];
    for (int j = 0; j < 4; ++j) total += a[4 * i + j] * b[4 * i + j];
    return total;
  }));
}
inline Longs dpwssd_epi32(Longs sum, Longs w, Longs x) {
  int16_t a[32], b[32];
  std::memcpy(a, &w, 64);
  std::memcpy(b, &x, 64);
  const Ints before = as<Ints>(sum);
  return as<Longs>(each<Ints>([&](int i) { return before[i] + a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1]; }));
}
inline Floats dpbf16_ps(Floats sum, Longs x, Longs w) {
  const Shorts a = as<Shorts>(x), b = as<Shorts>(w);
  return each<Floats>([&](int i) {
    const float odd = from_bfloat16(a[2 * i + 1]) * from_bfloat16(b[2 * i + 1]);
    return sum[i] + (odd + from_bfloat16(a[2 * i]) * from_bfloat16(b[2 * i]));
  });
}

// AMX's tiles. Rows and bytes of each are what they are configured for.
struct Tile {
  int rows, bytes;
  char data[16][64];
};
inline thread_local Tile tiles[8];

inline void tile_shape(int tile, int rows, int bytes) { tiles[tile] = {rows, bytes, {}}; }
inline void tile_zero(int tile) { tile_shape(tile, tiles[tile].rows, tiles[tile].bytes); }
inline void tile_load(int tile, const char* from, int64_t stride) {
  for (int row = 0; row < tiles[tile].rows; ++row) std::memcpy(tiles[tile].data[row], from + row * stride, tiles[tile].bytes);
}
inline void tile_store(int tile, char* to, int64_t stride) {
  for (int row = 0; row < tiles[tile].rows; ++row) std::memcpy(to + row * stride, tiles[tile].data[row], tiles[tile].bytes);
}
// sum[m][n] becomes f(sum[m][n], rows of x and of w that are multiplied, n).
template <class T, class F>
inline void tile_each(int sum, F&& f) {
  for (int m = 0; m < tiles[sum].rows; ++m) {
    for (int n = 0; n < tiles[sum].bytes / 4; ++n) {
      T value;
      std::memcpy(&value, tiles[sum].data[m] + n * 4, 4);
      value = f(value, m, n);
      std::memcpy(tiles[sum].data[m] + n * 4, &value, 4);
    }
  }
}
inline void tile_dot4(int sum, int x, int w) {
  tile_each<int32_t>(sum, [&](int32_t value, int m, int n) {
    for (int k = 0; k < tiles[x].bytes; ++k) value += static_cast<int8_t>(tiles[x].data[m][k]) * static_cast<uint8_t>(tiles[w].data[k / 4][n * 4 + k % 4]);
    return value;
  });
}
inline void tile_dot2(int sum, int x, int w) {
  const auto number = [](const char* at) {
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return from_bfloat16(bits);
  };
  tile_each<float>(sum, [&](float value, int m, int n) {
    float even = 0, odd = 0;
    for (int k = 0; k < tiles[x].bytes / 4; ++k) {
      even = std::fma(number(tiles[x].data[m] + k * 4), number(tiles[w].data[k] + n * 4), even);
      odd = std::fma(number(tiles[x].data[m] + k * 4 + 2), number(tiles[w].data[k] + n * 4 + 2), odd);
    }
    return value + (even + odd);
  });
}

}  // namespace emulated
}  // namespace
}  // namespace sqplus

#define _mm512_add_epi32 sqplus::emulated::add_epi32
#define _mm512_add_ps sqplus::emulated::add_ps
#define _mm512_and_si512 sqplus::emulated::and_si512
#define _mm512_castps_si512 sqplus::emulated::castps_si512
#define _mm512_castsi512_ps sqplus::emulated::castsi512_ps
#define _mm512_cvtepi32_ps sqplus::emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi32 sqplus::emulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 sqplus::emulated::cvtepu16_epi32
#define _mm512_cvtph_ps sqplus::emulated::cvtph_ps
#define _mm512_dpbusd_epi32 sqplus::emulated::dpbusd_epi32
#define _mm512_dpwssd_epi32 sqplus::emulated::dpwssd_epi32
#define _mm512_fmadd_ps sqplus::emulated::fmadd_ps
#define _mm512_fnmadd_ps sqplus::emulated::fnmadd_ps
#define _mm512_load_si512 sqplus::emulated::load
#define _mm512_loadu_ps sqplus::emulated::loadu_ps
#define _mm512_loadu_si512 sqplus::emulated::load
#define _mm512_mul_ps sqplus::emulated::mul_ps
#define _mm512_mullo_epi32 sqplus::emulated::mullo_epi32
#define _mm512_or_si512 sqplus::emulated::or_si512
#define _mm512_permutexvar_epi16 sqplus::emulated::permutexvar_epi16
#define _mm512_set1_epi32 sqplus::emulated::set1_epi32
#define _mm512_set1_ps sqplus::emulated::set1_ps
#define _mm512_setzero_ps sqplus::emulated::setzero_ps
#define _mm512_setzero_si512 sqplus::emulated::setzero_si512
#define _mm512_slli_epi32 sqplus::emulated::slli_epi32
#define _mm512_srli_epi16 sqplus::emulated::srli_epi16
#define _mm512_srli_epi32 sqplus::emulated::srli_epi32
#define _mm512_storeu_ps sqplus::emulated::storeu_ps
#define _mm512_storeu_si512 sqplus::emulated::storeu_si512
#define _mm512_sub_epi32 sqplus::emulated::sub_epi32
