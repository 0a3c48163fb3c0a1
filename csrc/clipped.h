// W8A8 of many rows, for x86 processors without VNNI.
//
// Their 8-bit product takes one operand without a sign, and saturates: two products are added up in 16 bits. |x| times w with the sign of x is exact
// (V::dot4), but gives the weights a sign for each row. With 128 added to x they need none, and 255 (w + w') leaves 16 bits only where two neighbours of
// one sign add up to more than 128, which few do: vectors of weights with such a pair are cut into two halves, and the second halves multiplied apart.
// Nothing is lost, whatever the weights are; where many vectors have such pairs, w8_rows is as fast.
#pragma once

#include "tile.h"

namespace sqplus {
namespace {

// A chunk of a panel: what is multiplied everywhere, and the second halves with the steps that they belong to, for each vector of channels.
template <class V>
struct Clipped {
  static constexpr int vectors = kPanel / V::width;
  alignas(64) int8_t weight[kChunk * kPanel * 4];
  alignas(64) int8_t half[vectors][kChunk][V::width * 4];
  int32_t step[vectors][kChunk];
  int count[vectors];
  alignas(64) int32_t correction[kPanel];  // 128 times the sum of each channel's weights

  // False where too many are cut.
  bool cut(const int8_t* w, int64_t steps) {
    int all = 0;
    for (int v = 0; v < vectors; ++v) {
      const int64_t most = steps / 4;
      auto sum = V::zero_int();
      int found = 0;
      for (int64_t k = 0; k < steps; ++k) {
        const int64_t place = (k * kPanel + v * V::width) * 4;
        const auto own = V::load_int(w + place);
        sum = V::add_int(sum, V::sum4(own));
        auto kept = own;
        if (V::pairs_beyond_128(own)) {
          if (found > most) return false;
          kept = V::half_up(own);
          V::store_int(reinterpret_cast<int32_t*>(half[v][found]), V::subtract_int8(own, kept));
          step[v][found++] = static_cast<int32_t>(k);
        }
        V::store_int(reinterpret_cast<int32_t*>(weight + place), kept);
      }
      count[v] = found;
      all += found;
      V::store_int(correction + v * V::width, V::times_128(sum));
    }
    return all <= steps * vectors / 4;
  }
};

// One chunk for R rows. First the correction and the second halves, and what earlier chunks gave; then all the rest.
template <class V, int R>
SQPLUS_NOINLINE void clipped_rows(const W8Tile& t, const Clipped<V>& c, const int32_t* x, int64_t start, int64_t steps, int32_t* y) {
  for (int v = 0; v < c.vectors; ++v) {
    typename V::Int sum[R];
    unroll<R>(SQPLUS_EACH(r) {
      const auto before = start == 0 ? V::zero_int() : V::load_int(y + r * kPanel + v * V::width);
      sum[r] = V::subtract(before, V::load_int(c.correction + v * V::width));
    });
    for (int i = 0; i < c.count[v]; ++i) {
      const auto half = V::load_int(c.half[v][i]);
      unroll<R>(SQPLUS_EACH(r) { sum[r] = V::unsigned_dot4(sum[r], V::add_128(V::broadcast_int(x[c.step[v][i] * R + r])), half); });
    }
    unroll<R>(SQPLUS_EACH(r) { V::store_int(y + r * kPanel + v * V::width, sum[r]); });
  }
  constexpr int H = vectors_for<V>(R);
  for (int from = 0; from < kPanel; from += H * V::width) {
    typename V::Int sum[R * H];
    unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::load_int(y + i / H * kPanel + from + i % H * V::width); });
    const int8_t* w = c.weight + from * 4;
    for (int64_t k = 0; k < steps; ++k, w += kPanel * 4) {
      unroll<R>(SQPLUS_EACH(r) {
        const auto four = V::add_128(V::broadcast_int(x[k * R + r]));
        // Or the compiler would keep weights in registers that there are not.
        const int8_t* again = w;
        asm volatile("" : "+r"(again));
        unroll<H>(SQPLUS_EACH(h) { sum[r * H + h] = V::unsigned_dot4(sum[r * H + h], four, V::load_int(again + h * V::width * 4)); });
      });
    }
    unroll<R * H>(SQPLUS_EACH(i) {
      int32_t* place = y + i / H * kPanel + from + i % H * V::width;
      if (start + steps < t.steps) {
        V::store_int(place, sum[i]);
      } else {
        V::store(reinterpret_cast<float*>(place), V::to_float(sum[i]));
      }
    });
  }
}

template <class V>
void w8_clipped(int64_t blocks, const Block* block, const W8Tile& t) {
  if (blocks <= 16) return w8<V>(blocks, block, t);  // cutting takes longer than it saves
  Clipped<V> clipped;
  for (int64_t start = 0; start < t.steps; start += t.chunk) {
    const int64_t steps = t.steps - start < t.chunk ? t.steps - start : t.chunk;
    const bool few = clipped.cut(t.weight + start * kPanel * 4, steps);
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t* x = t.x + start * t.rows + block[b].top * steps;
      int32_t* y = t.y + (block[b].top - block->top) * kPanel;
      with_rows<V::rows>(block[b].rows, [&](auto r) {
        few ? clipped_rows<V, r>(t, clipped, x, start, steps, y) : w8_rows<V, r>(t, x, start, steps, b == 0, y);
      });
    }
  }
}

}  // namespace
}  // namespace sqplus
