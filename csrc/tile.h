// The products, for an instruction set `V` that says what a vector of V::width numbers is (portable.cpp, avx2.cpp, avx512.h).
#pragma once

#include "kernels.h"
#include "rows.h"
#include "unroll.h"

namespace sqplus {
namespace {

// How many vectors of a panel are worked on at once, when each takes so many accumulators: as many as there are registers for, and two at least.
template <class V>
constexpr int vectors_for(int sums) {
  constexpr int all = kPanel / V::width;
  const int room = V::accumulators / sums;
  return room >= all ? all : room >= 4 ? 4 : 2;
}

// A block's rows at most: V::rows, or as many as the sums of a whole panel have registers for, where one block is all.
template <class V>
constexpr int at_once = V::accumulators * V::width / kPanel;
template <class V>
constexpr int most_rows = V::rows > at_once<V> ? V::rows : at_once<V>;

// The next weights, fetched into the first-level cache (`soon`) or the second while others are multiplied: `lines` of 64 bytes a step.
template <class V, bool soon, int lines>
struct Fetch {
  static constexpr bool alone = lines == 0 || lines == 4;  // nothing else goes over the same weights
  const char* at;
  int64_t stride;
  SQPLUS_INLINE void step() {
    unroll<lines>(SQPLUS_EACH(i) { V::template prefetch<soon>(at + i * 64); });
    at += stride;
  }
};

// Calls f with the Fetch of a walk over some weights, one of `walks` until the `bytes` at `next` are needed: each fetches an equal part of them, evenly over its steps,
// or memory would have nothing to do most of the time.
template <class V, bool soon, class F>
SQPLUS_INLINE void fetching(const void* next, int64_t bytes, int64_t walk, int64_t walks, F&& f) {
  const char* part = static_cast<const char*>(next) + bytes * walk / walks;
  const int64_t stride = (kStep + walks - 1) / walks;
  if (walks == 1) {
    f(Fetch<V, soon, 4>{part, stride});
  } else if (walks < 4) {
    f(Fetch<V, soon, 2>{part, stride});
  } else {
    f(Fetch<V, soon, 1>{part, stride});
  }
}

// The activations of the next block of rows: those of R rows, `length` numbers each, are followed by them. A step takes so many `numbers` of each row.
template <class V, int R, int numbers>
SQPLUS_INLINE auto next_rows(const int32_t* x, int64_t length) {
  constexpr int bytes = R * numbers * 4;
  return Fetch<V, true, (bytes + 63) / 64>{reinterpret_cast<const char*>(x + R * length), bytes};
}

// The same for a walk over a group's nibbles.
template <class V, class F>
SQPLUS_INLINE void fetching(const W4Tile& t, int64_t g, int64_t walk, int64_t walks, F&& f) {
  const int64_t bytes = t.steps * kStep;
  fetching<V, V::soon>(reinterpret_cast<const char*>(t.weight) + g * bytes + V::ahead, bytes, walk, walks, f);
}

// Fetches where a block's results will be written, from row `first` on, while its last products are made.
SQPLUS_INLINE void fetch_results(const Results& results, int64_t first, int rows) {
  for (int64_t row = first; row < first + rows; ++row) {
    for (int64_t line = 0; line < results.bytes; line += 64) __builtin_prefetch(results.at + row * results.stride + line, 1);
  }
}

// The processor's own: it is faster where there is little to do between reads.
template <class V>
using NoFetch = Fetch<V, false, 0>;

// A chunk of the vectors of channels from `from` on, for one block of rows.
template <class V, int R, class Fetch>
SQPLUS_NOINLINE void w8_rows(const W8Tile& t, int64_t top, int from, Fetch fetch, int32_t* y) {
  constexpr int H = vectors_for<V>(R);
  const int64_t start = t.start, steps = t.count;
  const uint8_t* w = t.weight + start * kStep + from * 4;
  const int32_t* x = t.x + start * t.rows + top * steps;
  typename V::Int sum[R * H];
  unroll<R * H>(SQPLUS_EACH(i) {
    sum[i] = start == 0 ? V::broadcast_int(t.first[top + i / H]) : V::load_int(y + (i / H) * kPanel + from + (i % H) * V::width);
  });
  auto fetch_x = next_rows<V, R, 1>(x, steps);
  for (int64_t k = 0; k < steps; ++k, w += kStep, ++x) {
    fetch.step();
    if constexpr (!Fetch::alone) fetch_x.step();
    typename V::Int weight[H];
    unroll<H>(SQPLUS_EACH(h) { weight[h] = V::load_int(w + h * V::width * 4); });
    unroll<R>(SQPLUS_EACH(r) {
      const auto four = V::broadcast_int(x[r * steps]);
      unroll<H>(SQPLUS_EACH(h) { sum[r * H + h] = V::dot4(sum[r * H + h], weight[h], four); });
    });
  }
  unroll<R * H>(SQPLUS_EACH(i) {
    int32_t* to = y + (i / H) * kPanel + from + (i % H) * V::width;
    if (V::saturates || start + steps < t.steps) {
      V::store_int(to, sum[i]);
    } else {
      V::store(reinterpret_cast<float*>(to), V::to_float(sum[i]));
    }
  });
}

// What Kernels::cut took off of one row, then float32.
template <class V>
SQPLUS_NOINLINE void w8_rest(const W8Tile& t, const Rest* rest, int32_t rests, int32_t* y) {
  constexpr int H = kPanel / V::width;
  typename V::Int sum[H];
  unroll<H>(SQPLUS_EACH(h) { sum[h] = V::load_int(y + h * V::width); });
  for (int32_t i = 0; i < rests; ++i) {
    const uint8_t* w = t.weight + rest[i].at * kStep;
    if (i + 2 < rests) Fetch<V, true, 4>{reinterpret_cast<const char*>(t.weight) + rest[i + 2].at * kStep, 0}.step();
    const auto four = V::broadcast_int(rest[i].x);
    unroll<H>(SQPLUS_EACH(h) { sum[h] = V::dot4(sum[h], V::load_int(w + h * V::width * 4), four); });
  }
  unroll<H>(SQPLUS_EACH(h) { V::store(reinterpret_cast<float*>(y + h * V::width), V::to_float(sum[h])); });
}

// With `ahead`, several rows that are all there is fetch their weights themselves.
template <class V, bool ahead = false>
void w8(int64_t blocks, const Block* block, const W8Tile& t) {
  const bool last = t.start + t.count == t.steps;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t top = block[b].top;
    int32_t* y = t.y + (top - block->top) * kPanel;
    if (last) fetch_results(t.results, top - block->top, block[b].rows);
    with_rows<most_rows<V>>(block[b].rows, [&](auto r) {
      constexpr int channels = vectors_for<V>(r) * V::width, passes = kPanel / channels;
      for (int pass = 0; pass < passes; ++pass) {
        const auto rows = [&](auto fetch) { w8_rows<V, r>(t, top, pass * channels, fetch, y); };
        if (blocks * passes == 1) {
          if constexpr (ahead && r > 1) {
            rows(Fetch<V, false, 4>{reinterpret_cast<const char*>(t.weight) + t.start * kStep + V::ahead, kStep});
          } else {
            rows(NoFetch<V>{});
          }
        } else {
          fetching<V, false>(t.next, t.count * kStep, b * passes + pass, blocks * passes, rows);
        }
      }
    });
  }
  if (V::saturates && last) {
    const int64_t end = block[blocks - 1].top + block[blocks - 1].rows;
    for (int64_t row = block->top; row < end; ++row) w8_rest<V>(t, t.rest + row * t.steps, t.rests[row], t.y + (row - block->top) * kPanel);
  }
}

// W8's loops, for pairs of bfloat16 numbers in place of four integers: each is the upper half of a float32 number. Sums are float32 in the registers of integers.
template <class V>
struct Pairs : V {
  using Int = typename V::Int;
  static constexpr bool saturates = false;
  static SQPLUS_INLINE Int dot4(Int sum, Int w, Int x) {
    const auto first = V::fma(V::as_float(V::lower_half(w)), V::as_float(V::lower_half(x)), V::as_float(sum));
    return V::as_int(V::fma(V::as_float(V::upper_half(w)), V::as_float(V::upper_half(x)), first));
  }
  static SQPLUS_INLINE typename V::Float to_float(Int a) { return V::as_float(a); }
};

// 16 or 32-bit scales as they are stored, and zero points of nibbles, for one vector of channels.
template <class V>
SQPLUS_INLINE typename V::Float scale_at(const W4Tile& t, int64_t i) {
  switch (t.scale_type) {
    case Type::kBFloat16: return V::load_bfloat16(static_cast<const uint16_t*>(t.scale) + i);
    case Type::kHalf: return V::load_half(static_cast<const uint16_t*>(t.scale) + i);
    default: return V::load(static_cast<const float*>(t.scale) + i);
  }
}

template <class V, int none>
SQPLUS_INLINE typename V::Float zero_at(const W4Tile& t, int64_t i) {
  const auto zero = V::broadcast(none);
  return t.zero_point ? V::add(V::to_float(V::load_int8(t.zero_point + i)), zero) : zero;
}

// What all blocks of rows need of a group, in float32; zero points are those of the decoded weights.
struct Group {
  alignas(64) float scale[kPanel];
  alignas(64) float zero[kPanel];
};

// `none` is what a weight is decoded to that is 0 where the zero point is: nibbles as they are, if nothing else is said.
template <class V, int none = 8>
SQPLUS_INLINE void take_scales(const W4Tile& t, int64_t g, Group* group) {
  constexpr int64_t soon = 4;
  const int64_t next = (g + soon) * kPanel, bytes = t.scale_type == Type::kFloat ? 4 : 2;
  for (int64_t line = 0; line < kPanel * bytes; line += 64) V::template prefetch<true>(static_cast<const char*>(t.scale) + next * bytes + line);
  if (t.zero_point) V::template prefetch<true>(t.zero_point + next);
  for (int channel = 0; channel < kPanel; channel += V::width) {
    V::store(group->scale + channel, scale_at<V>(t, g * kPanel + channel));
    V::store(group->zero + channel, zero_at<V, none>(t, g * kPanel + channel));
  }
}

// Where a block of rows has its nibbles from. The first one takes them out, and keeps them if there are others.
enum class Nibbles { kTaken, kTakenAndKept, kKept };

// Calls f with that of block b, as a constant.
template <class F>
SQPLUS_INLINE void with_nibbles(int64_t b, int64_t blocks, F&& f) {
  if (b > 0) {
    f(std::integral_constant<Nibbles, Nibbles::kKept>{});
  } else if (blocks > 1) {
    f(std::integral_constant<Nibbles, Nibbles::kTakenAndKept>{});
  } else {
    f(std::integral_constant<Nibbles, Nibbles::kTaken>{});
  }
}

// y += (sum - zero * sums of the activations) * scale, for R rows and H vectors from channel `from` on.
template <class V, int R, int H>
SQPLUS_INLINE void add_group(const Group& group, const float* sums, int from, const typename V::Float* sum, float* y) {
  unroll<H>(SQPLUS_EACH(h) {
    const int channel = from + h * V::width;
    const auto scale = V::load(group.scale + channel), zero = V::load(group.zero + channel);
    unroll<R>(SQPLUS_EACH(r) {
      float* place = y + r * kPanel + channel;
      V::store(place, V::fma(V::fnma(zero, V::broadcast(sums[r]), sum[r * H + h]), scale, V::load(place)));
    });
  });
}

// A group for one block of rows alone: nibbles are decoded on the way.
template <class V, int R>
SQPLUS_NOINLINE void w4_one(const W4Tile& t, int64_t g, const Group& group, const float* of_group, const float* sums, float* y) {
  constexpr int H = vectors_for<V>(R), pair = R <= 2 ? 2 : 1;
  for (int from = 0; from < kPanel; from += H * V::width) {
    const uint32_t* w = t.weight + g * t.steps * kPanel + from;
    const float* x = of_group;
    Fetch<V, true, 4> fetch{reinterpret_cast<const char*>(w) + V::ahead, kStep};
    typename V::Float sum[R * H];
    unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::broadcast(0.0f); });
    for (int64_t k = 0; k < t.steps; ++k, w += kPanel, x += 8) {
      if (from == 0) fetch.step();
      unroll<H / pair>(SQPLUS_EACH(p) {
        typename V::Int packed[pair];
        unroll<pair>(SQPLUS_EACH(i) { packed[i] = V::load_int(w + (p * pair + i) * V::width); });
        // Or the compiler would keep all 8 R numbers for the next vectors, in registers that there are not.
        const float* again = x;
        asm volatile("" : "+r"(again));
        unroll<8>(SQPLUS_EACH(e) {
          unroll<pair>(SQPLUS_EACH(i) {
            constexpr int h = p * pair + i;
            const auto nibble = V::template nibble<nibble_shift(e)>(packed[i]);
            unroll<R>(SQPLUS_EACH(r) { sum[r * H + h] = V::fma(nibble, V::broadcast(again[r * t.steps * 8 + e]), sum[r * H + h]); });
          });
        });
      });
    }
    add_group<V, R, H>(group, sums, from, sum, y);
  }
}

// Decoded weights (channels of a group, 32) times one block of rows.
template <class V, int R>
SQPLUS_NOINLINE void w4_decoded(const W4Tile& t, const Group& group, int from, const float* decoded, const float* x, const float* sums, float* y) {
  constexpr int H = 32 / V::width;
  typename V::Float sum[R * H];
  unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::broadcast(0.0f); });
  for (int64_t k = 0; k < t.steps * 8; ++k) {
    unroll<H>(SQPLUS_EACH(h) {
      const auto weight = V::load(decoded + k * 32 + h * V::width);
      unroll<R>(SQPLUS_EACH(r) { sum[r * H + h] = V::fma(weight, V::broadcast(x[r * t.steps * 8 + k]), sum[r * H + h]); });
    });
  }
  add_group<V, R, H>(group, sums, from, sum, y);
}

// A group for many blocks of rows: nibbles are decoded once, 32 channels at a time, which stay in the first-level cache. Sums are added in the same
// order as in w4_one.
template <class V>
void w4_many(const W4Tile& t, int64_t g, const Group& group, const float* of_group, int64_t blocks, const Block* block) {
  constexpr int H = 32 / V::width;
  alignas(64) float decoded[128 * 32];
  for (int from = 0; from < kPanel; from += 32) {
    const uint32_t* w = t.weight + g * t.steps * kPanel + from;
    Fetch<V, true, 4> fetch{reinterpret_cast<const char*>(w) + V::ahead, kStep};
    for (int64_t k = 0; k < t.steps; ++k) {
      if (from == 0) fetch.step();
      unroll<H>(SQPLUS_EACH(h) {
        const auto packed = V::load_int(w + k * kPanel + h * V::width);
        unroll<8>(SQPLUS_EACH(e) { V::store(decoded + (k * 8 + e) * 32 + h * V::width, V::template nibble<nibble_shift(e)>(packed)); });
      });
    }
    for (int64_t b = 0; b < blocks; ++b) {
      with_rows<most_rows<V>>(block[b].rows, [&](auto rows) {
        const int64_t top = block[b].top;
        w4_decoded<V, rows>(t, group, from, decoded, of_group + top * t.steps * 8, static_cast<const float*>(t.sums) + g * t.rows + top, t.y + (top - block->top) * kPanel);
      });
    }
  }
}

template <class V>
void w4(int64_t blocks, const Block* block, const W4Tile& t) {
  Group group;
  for (int64_t g = t.start; g < t.end; ++g) {
    take_scales<V>(t, g, &group);
    const float* x = static_cast<const float*>(t.x) + g * t.steps * 8 * t.rows;
    if (blocks == 1) {
      with_rows<most_rows<V>>(block->rows, [&](auto r) {
        w4_one<V, r>(t, g, group, x + block->top * t.steps * 8, static_cast<const float*>(t.sums) + g * t.rows + block->top, t.y);
      });
    } else {
      w4_many<V>(t, g, group, x, blocks, block);
    }
  }
}

// Integer activations: sums of a group are exact, scales of groups are applied in float32.
template <class V, int R, class Fetch>
SQPLUS_NOINLINE void w4a8_rows(const W4Tile& t, int64_t g, int64_t top, int from, const Group& group, Fetch fetch, float* y) {
  constexpr int H = vectors_for<V>(R);
  const uint32_t* w = t.weight + g * t.steps * kPanel + from;
  const int64_t pairs = t.steps * 2;
  const int32_t* x = static_cast<const int32_t*>(t.x) + (g * t.rows + top) * pairs;
  typename V::Int sum[R * H];
  unroll<R * H>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
  for (int64_t k = 0; k < t.steps; ++k, w += kPanel, x += 2) {
    fetch.step();
    unroll<H>(SQPLUS_EACH(h) {
      const auto packed = V::load_int(w + h * V::width);
      const auto low = V::low_nibbles(packed), high = V::high_nibbles(packed);
      unroll<R>(SQPLUS_EACH(r) {
        sum[r * H + h] = V::dot8(sum[r * H + h], low, V::broadcast_int(x[r * pairs]), high, V::broadcast_int(x[r * pairs + 1]));
      });
    });
  }
  typename V::Float floats[R * H];
  unroll<R * H>(SQPLUS_EACH(i) { floats[i] = V::to_float(sum[i]); });
  add_group<V, R, H>(group, static_cast<const float*>(t.sums) + g * t.rows + top, from, floats, y);
}

template <class V>
void w4a8(int64_t blocks, const Block* block, const W4Tile& t) {
  Group group;
  for (int64_t g = t.start; g < t.end; ++g) {
    take_scales<V>(t, g, &group);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t top = block[b].top;
      if (g == t.groups - 1) fetch_results(t.results, top - block->top, block[b].rows);
      with_rows<most_rows<V>>(block[b].rows, [&](auto r) {
        constexpr int channels = vectors_for<V>(r) * V::width, passes = kPanel / channels;
        for (int pass = 0; pass < passes; ++pass) {
          const auto rows = [&](auto fetch) { w4a8_rows<V, r>(t, g, top, pass * channels, group, fetch, t.y + (top - block->top) * kPanel); };
          if (blocks * passes == 1) {
            rows(NoFetch<V>{});
          } else {
            fetching<V>(t, g, b * passes + pass, blocks * passes, rows);
          }
        }
      });
    }
  }
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
      sum[i] = V::dot4(sum[i], w, x);
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

// `product` is w4<V>, or w4_fixed<V> with `fix` (fixed.h).
template <class V>
constexpr Kernels kernels_of(const char* name, decltype(Kernels::w4) product, decltype(Kernels::fix) fix) {
  Kernels kernels{};
  kernels.name = name;
  kernels.rows = V::rows;
  kernels.at_once = at_once<V>;
  kernels.panels = 1;
  kernels.w8 = w8<V>;
  kernels.bfloat16 = w8<Pairs<V>>;
  kernels.w4 = product;
  kernels.fix = fix;
  kernels.w4a8 = w4a8<V>;
  kernels.read = read_row;
  kernels.absolute_maximum = absolute_maximum_of;
  kernels.sum = sum_of;
  kernels.quantize = quantize_row;
  kernels.softmax = softmax_row;
  kernels.cap = cap_row;
  kernels.add = add_row;
  kernels.write = write_row;
  kernels.read_memory = read_memory<V>;
  kernels.peak_int8 = peak_int8<V>;
  kernels.peak_float32 = peak_float32<V>;
  return kernels;
}

}  // namespace
}  // namespace sqplus
