// The two tiles, for an instruction set `V` that says what a vector of V::width numbers is (avx2.cpp, portable.cpp).
//
// Loops over rows and vectors are unrolled at compile time: GCC keeps an array of accumulators in registers only when all of its indices are
// constants.
#pragma once

#include <utility>

#include "kernels.h"

#define SQPLUS_INLINE inline __attribute__((always_inline))

namespace sqplus {
namespace {

template <class F, int... I>
SQPLUS_INLINE void unroll_(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
SQPLUS_INLINE void unroll(F&& f) {
  unroll_(f, std::make_integer_sequence<int, N>{});
}

#define SQPLUS_EACH(i) [&](auto i) __attribute__((always_inline))

// `H` vectors of output channels, from channel `from` of the panel on.
template <class V, int R, int H>
void w8_part(const W8Tile& t, int from) {
  typename V::Int sum[R * H];
  unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
  for (int64_t k = 0; k < t.steps; ++k) {
    const int8_t* w = t.weight + k * kPanel * 4 + from * 4;
    V::prefetch(w + 4096);
    unroll<R>(SQPLUS_EACH(r) {
      const auto x = V::broadcast4(t.x[k * R + r]);
      unroll<H>(SQPLUS_EACH(h) { sum[r * H + h] = V::dot4(sum[r * H + h], x, V::load_int(w + h * V::width * 4)); });
    });
  }
  unroll<R * H>(SQPLUS_EACH(i) {
    constexpr int h = i % H;
    if constexpr (V::unsigned_x) sum[i] = V::subtract(sum[i], V::load_int(t.correction + from + h * V::width));
    V::store(t.y + (i / H) * kPanel + from + h * V::width, V::to_float(sum[i]));
  });
}

template <class V, int R, int H>
void w4_part(const W4Tile& t, int from) {
  alignas(64) float total[R * H][V::width];
  unroll<R * H>(SQPLUS_EACH(i) { V::store(total[i], V::zero()); });
  const uint32_t* w = t.weight + from;
  const float* x = t.x;
  for (int64_t g = 0; g < t.groups; ++g) {
    typename V::Float sum[R * H];
    unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::zero(); });
    for (int64_t k = 0; k < t.steps; ++k, w += kPanel, x += 8 * R) {
      V::prefetch(w + 1024);
      unroll<H>(SQPLUS_EACH(h) {
        const auto packed = V::load_int(w + h * V::width);
        unroll<8>(SQPLUS_EACH(e) {
          const auto nibble = V::template nibble<nibble_shift(e)>(packed);
          unroll<R>(SQPLUS_EACH(r) { sum[r * H + h] = V::fma(nibble, V::broadcast(x + e * R + r), sum[r * H + h]); });
        });
      });
    }
    unroll<H>(SQPLUS_EACH(h) {
      const auto scale = V::load(t.scale + g * kPanel + from + h * V::width);
      const auto zero = V::load(t.zero + g * kPanel + from + h * V::width);
      unroll<R>(SQPLUS_EACH(r) {
        const auto shifted = V::fnma(zero, V::broadcast(t.sums + g * R + r), sum[r * H + h]);
        float* place = total[r * H + h];
        V::store(place, V::fma(shifted, scale, V::load(place)));
      });
    });
  }
  unroll<R * H>(SQPLUS_EACH(i) { V::store(t.y + (i / H) * kPanel + from + (i % H) * V::width, V::load(total[i])); });
}

// As many vectors at a time as there are registers for.
template <class V, int R>
void w8_rows(const W8Tile& t) {
  constexpr int at_once = V::accumulators / R >= kPanel / V::width ? kPanel / V::width : V::accumulators / R >= 4 ? 4 : 2;
  for (int from = 0; from < kPanel; from += at_once * V::width) w8_part<V, R, at_once>(t, from);
}

template <class V, int R>
void w4_rows(const W4Tile& t) {
  constexpr int at_once = V::accumulators / R >= kPanel / V::width ? kPanel / V::width : V::accumulators / R >= 4 ? 4 : 2;
  for (int from = 0; from < kPanel; from += at_once * V::width) w4_part<V, R, at_once>(t, from);
}

template <class V>
void w8(int rows, const W8Tile& t) {
  switch (rows) {
    case 1: return w8_rows<V, 1>(t);
    case 2: return w8_rows<V, 2>(t);
    case 3: return w8_rows<V, 3>(t);
    case 4: return w8_rows<V, 4>(t);
    case 5: return w8_rows<V, 5>(t);
    case 6: return w8_rows<V, 6>(t);
  }
}

template <class V>
void w4(int rows, const W4Tile& t) {
  switch (rows) {
    case 1: return w4_rows<V, 1>(t);
    case 2: return w4_rows<V, 2>(t);
    case 3: return w4_rows<V, 3>(t);
    case 4: return w4_rows<V, 4>(t);
    case 5: return w4_rows<V, 5>(t);
    case 6: return w4_rows<V, 6>(t);
  }
}

}  // namespace
}  // namespace sqplus
