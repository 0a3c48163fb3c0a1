// The products, for an instruction set `V` that says what a vector of V::width numbers is (portable.cpp, avx2.cpp, avx512.cpp).
#pragma once

#include "kernels.h"
#include "rows.h"
#include "unroll.h"

namespace sqplus {
namespace {

// How many vectors of a panel are worked on at once: as many as there are registers for accumulators.
template <class V>
constexpr int vectors_for(int accumulators_of_one) {
  constexpr int all = kPanel / V::width;
  const int room = V::accumulators / accumulators_of_one;
  return room >= all ? all : room >= 4 ? 4 : 2;
}

// For each step through 256 bytes of weights at `own`.
template <class V>
SQPLUS_INLINE void prefetch(const Ahead& ahead, const void* own, int64_t step) {
  if (ahead.lines == kOwn) {
    unroll<4>(SQPLUS_EACH(i) { V::template prefetch<true>(static_cast<const char*>(own) + 4096 + i * 64); });
  } else if (ahead.lines > 0) {
    V::template prefetch<false>(ahead.from + step * ahead.lines * 64);
    if (ahead.lines == 2) V::template prefetch<false>(ahead.from + step * 128 + 64);
  }
}

template <class V, int R>
void w8_rows(const W8Tile& t) {
  constexpr int H = vectors_for<V>(R);
  for (int from = 0; from < kPanel; from += H * V::width) {
    typename V::Int sum[R * H];
    unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
    for (int64_t k = 0; k < t.steps; ++k) {
      const int8_t* w = t.weight + k * kPanel * 4 + from * 4;
      if (from == 0) prefetch<V>(t.ahead, w, k);
      unroll<R>(SQPLUS_EACH(r) {
        const auto x = V::broadcast_int(t.x[k * R + r]);
        // Weights stay in registers where there are 32; elsewhere they are read again, from the first-level cache.
        const int8_t* again = w;
        if constexpr (V::width < 16) asm volatile("" : "+r"(again));
        unroll<H>(SQPLUS_EACH(h) { sum[r * H + h] = V::dot4(sum[r * H + h], x, V::load_int(again + h * V::width * 4)); });
      });
    }
    unroll<R * H>(SQPLUS_EACH(i) {
      constexpr int h = i % H;
      if constexpr (V::unsigned_x) sum[i] = V::subtract(sum[i], V::load_int(t.correction + from + h * V::width));
      V::store(t.y + (i / H) * kPanel + from + h * V::width, V::to_float(sum[i]));
    });
  }
}

// 16 or 32-bit scales as they are stored, and zero points of nibbles, for one vector of channels.
template <class V>
SQPLUS_INLINE typename V::Float scale_at(const W4Tile& t, int64_t i) {
  switch (t.scale_type) {
    case Type::kBFloat16: return V::load_bfloat16(static_cast<const uint16_t*>(t.scale) + i);
    case Type::kHalf: return V::load_half(static_cast<const uint16_t*>(t.scale) + i);
    default: return V::load(static_cast<const float*>(t.scale) + i);
  }
}

template <class V>
SQPLUS_INLINE typename V::Float zero_at(const W4Tile& t, int64_t i) {
  const auto eight = V::broadcast(8.0f);
  return t.zero_point ? V::add(V::load_int8(t.zero_point + i), eight) : eight;
}

// total += (sum - zero * sums of the activations) * scale, for group g and H vectors from channel `from` on.
template <class V, int R, int H>
SQPLUS_INLINE void add_group(const W4Tile& t, const float* sums, int64_t g, int from, const typename V::Float* sum, float* total) {
  unroll<H>(SQPLUS_EACH(h) {
    const int64_t i = g * kPanel + from + h * V::width;
    const auto scale = scale_at<V>(t, i);
    const auto zero = zero_at<V>(t, i);
    unroll<R>(SQPLUS_EACH(r) {
      float* place = total + r * kPanel + from + h * V::width;
      const auto shifted = V::fnma(zero, V::broadcast(sums[g * R + r]), sum[r * H + h]);
      V::store(place, V::fma(shifted, scale, g == 0 ? V::broadcast(0.0f) : V::load(place)));
    });
  });
}

template <class V, int R>
void w4_rows(const W4Tile& t) {
  constexpr int H = vectors_for<V>(R);
  for (int from = 0; from < kPanel; from += H * V::width) {
    const uint32_t* w = t.weight + from;
    for (int64_t g = 0, step = 0; g < t.groups; ++g) {
      const float* x = static_cast<const float*>(t.x) + g * t.x_stride;
      typename V::Float sum[R * H];
      unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::broadcast(0.0f); });
      for (int64_t k = 0; k < t.steps; ++k, ++step, w += kPanel, x += 8 * R) {
        if (from == 0) prefetch<V>(t.ahead, w, step);
        unroll<H>(SQPLUS_EACH(h) {
          const auto packed = V::load_int(w + h * V::width);
          // Or the compiler would keep all 8 R numbers for the next vector, in registers that there are not.
          const float* again = x;
          asm volatile("" : "+r"(again));
          unroll<8>(SQPLUS_EACH(e) {
            const auto nibble = V::template nibble<nibble_shift(e)>(packed);
            unroll<R>(SQPLUS_EACH(r) { sum[r * H + h] = V::fma(nibble, V::broadcast(again[e * R + r]), sum[r * H + h]); });
          });
        });
      }
      add_group<V, R, H>(t, t.sums, g, from, sum, t.y);
    }
  }
}

// Many rows: each group of weights is decoded once and then used by all. The sums are added in the same order as in w4_rows.
template <class V>
void w4_blocks(int64_t blocks, const W4Block* block, const W4Tile& t) {
  alignas(64) float decoded[128 * kPanel];
  for (int64_t g = 0; g < t.groups; ++g) {
    const uint32_t* w = t.weight + g * t.steps * kPanel;
    for (int64_t k = 0; k < t.steps; ++k) {
      unroll<4>(SQPLUS_EACH(line) { V::template prefetch<false>(w + (t.steps + k) * kPanel + line * 16); });  // the next group
      unroll<kPanel / V::width>(SQPLUS_EACH(h) {
        const auto packed = V::load_int(w + k * kPanel + h * V::width);
        unroll<8>(SQPLUS_EACH(e) { V::store(decoded + (k * 8 + e) * kPanel + h * V::width, V::template nibble<nibble_shift(e)>(packed)); });
      });
    }
    for (int64_t b = 0; b < blocks; ++b) {
      with_rows<V::rows>(block[b].rows, [&](auto rows) {
        constexpr int R = rows, H = vectors_for<V>(R);
        const float* x = static_cast<const float*>(block[b].x) + g * t.x_stride;
        for (int from = 0; from < kPanel; from += H * V::width) {
          typename V::Float sum[R * H];
          unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::broadcast(0.0f); });
          for (int64_t k = 0; k < t.steps * 8; ++k) {
            unroll<H>(SQPLUS_EACH(h) {
              const auto weight = V::load(decoded + k * kPanel + from + h * V::width);
              unroll<R>(SQPLUS_EACH(r) { sum[r * H + h] = V::fma(weight, V::broadcast(x[k * R + r]), sum[r * H + h]); });
            });
          }
          add_group<V, R, H>(t, block[b].sums, g, from, sum, block[b].y);
        }
      });
    }
  }
}

// Integer activations: sums of a group are exact, scales of groups are applied in float32.
template <class V, int R>
void w4a8_rows(const W4Tile& t) {
  constexpr int H = vectors_for<V>(R);
  for (int from = 0; from < kPanel; from += H * V::width) {
    const uint32_t* w = t.weight + from;
    for (int64_t g = 0, step = 0; g < t.groups; ++g) {
      const int32_t* x = static_cast<const int32_t*>(t.x) + g * t.x_stride;
      typename V::Int sum[R * H];
      unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
      for (int64_t k = 0; k < t.steps; ++k, ++step, w += kPanel, x += 2 * R) {
        if (from == 0) prefetch<V>(t.ahead, w, step);
        unroll<H>(SQPLUS_EACH(h) {
          const auto packed = V::load_int(w + h * V::width);
          const auto low = V::low_nibbles(packed), high = V::high_nibbles(packed);
          unroll<R>(SQPLUS_EACH(r) {
            sum[r * H + h] = V::dot8(sum[r * H + h], low, V::broadcast_int(x[r]), high, V::broadcast_int(x[R + r]));
          });
        });
      }
      typename V::Float floats[R * H];
      unroll<R * H>(SQPLUS_EACH(i) { floats[i] = V::to_float(sum[i]); });
      add_group<V, R, H>(t, t.sums, g, from, floats, t.y);
    }
  }
}

template <class V>
void w8(int rows, const W8Tile& t) {
  with_rows<V::rows>(rows, [&](auto r) { w8_rows<V, r>(t); });
}

template <class V>
void w4(int rows, const W4Tile& t) {
  with_rows<V::rows>(rows, [&](auto r) { w4_rows<V, r>(t); });
}

template <class V>
void w4a8(int rows, const W4Tile& t) {
  with_rows<V::rows>(rows, [&](auto r) { w4a8_rows<V, r>(t); });
}

template <class V>
int64_t read_memory(const void* from, int64_t bytes) {
  typename V::Int sum[4];
  unroll<4>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
  const char* p = static_cast<const char*>(from);
  constexpr int64_t at_once = 4 * V::width * 4;
  for (int64_t done = 0; done + at_once <= bytes; done += at_once) {
    V::template prefetch<true>(p + done + 4096);
    if constexpr (at_once > 64) V::template prefetch<true>(p + done + 4096 + 64);
    if constexpr (at_once > 128) unroll<2>(SQPLUS_EACH(i) { V::template prefetch<true>(p + done + 4096 + 128 + i * 64); });
    unroll<4>(SQPLUS_EACH(i) { sum[i] = V::add_int(sum[i], V::load_int(p + done + i * V::width * 4)); });
  }
  const auto both = V::to_float(V::add_int(V::add_int(sum[0], sum[1]), V::add_int(sum[2], sum[3])));
  alignas(64) float kept[V::width];
  V::store(kept, both);
  return static_cast<int64_t>(kept[0]);
}

// The accumulators are made known to the compiler as changing, so that nothing is computed once for all iterations.
template <class V>
int64_t peak_int8(int64_t iterations) {
  constexpr int N = V::accumulators;
  typename V::Int sum[N], x = V::broadcast_int(0x01010101), w = x;
  unroll<N>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
  for (int64_t k = 0; k < iterations; ++k) {
    unroll<N>(SQPLUS_EACH(i) {
      V::touch(x), V::touch(w);
      sum[i] = V::dot4(sum[i], x, w);
    });
  }
  unroll<N>(SQPLUS_EACH(i) { V::touch(sum[i]); });
  return iterations * N * V::width * 4 * 2;
}

template <class V>
int64_t peak_float32(int64_t iterations) {
  constexpr int N = V::accumulators;
  typename V::Float sum[N], x = V::broadcast(1.0f), w = x;
  unroll<N>(SQPLUS_EACH(i) { sum[i] = V::broadcast(0.0f); });
  for (int64_t k = 0; k < iterations; ++k) {
    unroll<N>(SQPLUS_EACH(i) {
      V::touch(x), V::touch(w);
      sum[i] = V::fma(x, w, sum[i]);
    });
  }
  unroll<N>(SQPLUS_EACH(i) { V::touch(sum[i]); });
  return iterations * N * V::width * 2;
}

template <class V>
constexpr Kernels kernels_of(const char* name) {
  return {name, V::rows, V::unsigned_x, w8<V>, w4<V>, w4_blocks<V>, nullptr, nullptr, w4a8<V>, read_row, absolute_maximum_of, quantize_row, write_row,
          read_memory<V>, peak_int8<V>, peak_float32<V>, nullptr};
}

}  // namespace
}  // namespace sqplus
