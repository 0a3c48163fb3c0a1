// W4A16 with x in fixed point (kernels.h), for x86 processors with AVX2 and more.
//
// 16-bit products take 16 and more nibbles an instruction, for which a shift and a mask are enough. One or two of them, one for each piece, take less time than
// making float32 numbers of the nibbles, 8 or 16 an instruction, and multiplying those. Nothing is lost: sums over a group are exact, and rounding the
// activations to 2^-23 of the group's largest one changes a result by less than float32 sums do (tests/runtime/test_cpu.py compares them with float64).
#pragma once

#include <immintrin.h>

#include "tile.h"

namespace sqplus {
namespace {

// The largest magnitude decides the power of two: it becomes 2^22 - 2^15 or more, and less than 2^23 - 2^16, so that a high piece has 16 bits, rounded up too. Rounding to
// integers changes a number by about 2^-23 of the largest magnitude at most. Where all are below 2^-104, whose power of two float32 does not have, they are rounded to
// multiples of 2^-126.
inline void fix_group(const float* x, int64_t count, int pieces, int32_t* to, Rest* rest, Fixed* fixed) {
  const uint32_t largest = as_bits(absolute_maximum_of(x, count)), exponent = (largest + (1 << 17)) >> 23;
  const uint32_t power = exponent > 22 ? 276 - exponent : 253;
  const __m256 up = _mm256_set1_ps(as_float(power << 23));
  __m256i highs = _mm256_setzero_si256(), lows = highs;
  int32_t rests = 0;
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i integers = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), up));
    const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(integers, 24), 24), high = _mm256_srai_epi32(_mm256_sub_epi32(integers, low), 8);
    highs = _mm256_add_epi32(highs, high);
    lows = _mm256_add_epi32(lows, low);
    const __m256i both = _mm256_packs_epi32(high, low);
    // Of channels 0 to 3 the high pieces, then the low ones; then those of channels 4 to 7.
    if (pieces == 2) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_shuffle_epi32(both, 0xd8));  // each pair's side by side
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i / 2), _mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08)));
      int32_t pairs[8];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), both);
      const __m256i zero = _mm256_cmpeq_epi32(both, _mm256_setzero_si256());
      for (uint32_t lanes = ~_mm256_movemask_ps(_mm256_castsi256_ps(zero)) & 0xcc; lanes; lanes &= lanes - 1) {
        const int at = __builtin_ctz(lanes);
        rest[rests++] = {pairs[at], static_cast<int32_t>(i / 2 + at / 4 * 2 + at % 2)};
      }
    }
  }
  const auto total = [](__m256i lanes) {
    int32_t each[8], sum = 0;
    std::memcpy(each, &lanes, sizeof each);
    for (const int32_t lane : each) sum += lane;
    return sum;
  };
  fixed->high = total(highs);
  fixed->low = total(lows);
  fixed->rests = rests;
  fixed->low_unit = as_float(largest >= 0x7f800000 ? 0x7fc00000 : (254 - power) << 23);
  fixed->high_unit = 256 * fixed->low_unit;
}

// And in fixed point: zero points as integers.
struct FixedScales : Group {
  alignas(64) int32_t zeros[kPanel];
};

template <class V>
SQPLUS_INLINE void take_fixed_scales(const W4Tile& t, int64_t g, FixedScales* group) {
  take_scales<V>(t, g, group);
  for (int channel = 0; channel < kPanel; ++channel) group->zeros[channel] = static_cast<int32_t>(group->zero[channel]);
}

struct FixedGroup : FixedScales {
  alignas(64) int32_t nibbles[16 * 4 * kPanel];  // pairs of them, taken out by the first of several blocks: 16 KB
};

// y += sum of the products of a piece with nibbles, less zero * the piece's sum, in units of `unit`, times the scale.
template <class V>
SQPLUS_INLINE void add_to(float* y, typename V::Int sum, int32_t of_x, float unit, const FixedScales& group, int channel) {
  const auto shifted = V::subtract(sum, V::multiply_int(V::load_int(group.zeros + channel), V::broadcast_int(of_x)));
  const auto total = V::multiply(V::to_float(shifted), V::broadcast(unit));
  V::store(y + channel, V::fma(total, V::load(group.scale + channel), V::load(y + channel)));
}

// y += what a row's low pieces add, of those that are not zero. `weight(k, p, channel)` gives the nibbles of two input channels: pair p of step k.
template <class V, class Weight>
SQPLUS_INLINE void add_rests(const Rest* rest, const Fixed& fixed, const FixedGroup& group, float* y, Weight&& weight) {
  constexpr int H = kPanel / V::width;
  typename V::Int sum[H];
  unroll<H>(SQPLUS_EACH(h) { sum[h] = V::zero_int(); });
  for (int32_t i = 0; i < fixed.rests; ++i) {
    const auto pair = V::broadcast_int(rest[i].x);
    const uint32_t at = rest[i].at;
    unroll<H>(SQPLUS_EACH(h) { sum[h] = V::add_pairs(sum[h], weight(at / 4, at % 4, h * V::width), pair); });
  }
  unroll<H>(SQPLUS_EACH(h) { add_to<V>(y, sum[h], fixed.low, fixed.low_unit, group, h * V::width); });
}

// y += the products of R rows with a group, for the channels from `from` on. `weight` as above, once for each pair and channel.
template <class V, int R, int P, class Fetch, class Weight>
SQPLUS_INLINE void fixed_group(const W4Tile& t, int64_t g, int64_t top, int from, const FixedGroup& group, Fetch fetch, float* y, Weight&& weight) {
  constexpr int H = vectors_for<V>(R * P);
  const int64_t length = t.steps * 4 * P;
  const int32_t* x = static_cast<const int32_t*>(t.x) + (g * t.rows + top) * length;
  const Fixed* fixed = static_cast<const Fixed*>(t.sums) + g * t.rows + top;
  typename V::Int sum[R * P * H];
  unroll<R * P * H>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
  for (int64_t k = 0; k < t.steps; ++k, x += 4 * P) {
    fetch.step();
    // One row of one piece takes all four pairs of a vector before the next one; more, a pair at a time.
    constexpr int Q = R * P == 1 ? 4 : 1;
    unroll<4 / Q>(SQPLUS_EACH(first) {
      // Or the compiler would keep what it has read for all four, in registers that there are not.
      asm volatile("" ::: "memory");
      // Whichever are fewer stay in registers: the activations, or the nibbles.
      constexpr bool few = R * P < H;
      typename V::Int kept[few ? Q * R * P : H];
      if constexpr (few) {
        unroll<Q * R * P>(SQPLUS_EACH(i) { kept[i] = V::broadcast_int(x[i % (R * P) / P * length + (first + i / (R * P)) * P + i % P]); });
        unroll<H * Q>(SQPLUS_EACH(i) {
          constexpr int h = i / Q, q = i % Q;
          const auto nibbles = weight(k, std::integral_constant<int, first + q>{}, from + h * V::width);
          unroll<R * P>(SQPLUS_EACH(c) { sum[c * H + h] = V::add_pairs(sum[c * H + h], nibbles, kept[q * R * P + c]); });
        });
      } else {
        unroll<H>(SQPLUS_EACH(h) { kept[h] = weight(k, first, from + h * V::width); });
        unroll<R * P>(SQPLUS_EACH(c) {
          const auto pair = V::broadcast_int(x[c / P * length + first * P + c % P]);
          unroll<H>(SQPLUS_EACH(h) { sum[c * H + h] = V::add_pairs(sum[c * H + h], kept[h], pair); });
        });
      }
    });
  }
  unroll<R>(SQPLUS_EACH(r) {
    unroll<H>(SQPLUS_EACH(h) {
      add_to<V>(y + r * kPanel, sum[r * P * H + h], fixed[r].high, fixed[r].high_unit, group, from + h * V::width);
      if constexpr (P == 2) add_to<V>(y + r * kPanel, sum[(r * P + 1) * H + h], fixed[r].low, fixed[r].low_unit, group, from + h * V::width);
    });
  });
}

template <class V, int R, int P, Nibbles nibbles, class Fetch>
SQPLUS_NOINLINE void fixed_rows_of(const W4Tile& t, int64_t g, int64_t top, int from, FixedGroup& group, Fetch fetch, float* y) {
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  fixed_group<V, R, P>(t, g, top, from, group, fetch, y, [&](int64_t k, auto p, int channel) __attribute__((always_inline)) {
    int32_t* kept = group.nibbles + (k * 4 + p) * kPanel + channel;
    if constexpr (nibbles == Nibbles::kKept) return V::load_int(kept);
    const auto taken = V::nibble_pairs(V::load_int(w + k * kPanel + channel), p);
    if constexpr (nibbles == Nibbles::kTakenAndKept) V::store_int(kept, taken);
    return taken;
  });
}

// What the low pieces of R rows add, where only the high ones were multiplied.
template <class V, Nibbles nibbles>
SQPLUS_NOINLINE void low_pieces(const W4Tile& t, int64_t g, int64_t top, int rows, const FixedGroup& group, float* y) {
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  const Fixed* fixed = static_cast<const Fixed*>(t.sums) + g * t.rows + top;
  for (int r = 0; r < rows; ++r) {
    if (fixed[r].rests == 0) continue;
    add_rests<V>(t.rest + (g * t.rows + top + r) * t.steps * 4, fixed[r], group, y + r * kPanel, [&](int64_t k, int p, int channel) __attribute__((always_inline)) {
      if constexpr (nibbles == Nibbles::kTaken) return V::nibble_pairs(V::load_int(w + k * kPanel + channel), p);
      return V::load_int(group.nibbles + (k * 4 + p) * kPanel + channel);
    });
  }
}

template <class V, int P, Nibbles nibbles>
void fixed_block(const W4Tile& t, int64_t g, const Block& own, int64_t walk, int64_t walks, FixedGroup& group, float* y) {
  with_rows<fixed_rows(P)>(own.rows, [&](auto r) {
    constexpr int channels = vectors_for<V>(r * P) * V::width, passes = kPanel / channels;
    for (int pass = 0; pass < passes; ++pass) {
      fetching<V>(t, g, walk * passes + pass, walks * passes, [&](auto fetch) {
        fixed_rows_of<V, r, P, nibbles>(t, g, own.top, pass * channels, group, fetch, y);
      });
    }
  });
  if (P == 1) low_pieces<V, nibbles>(t, g, own.top, own.rows, group, y);
}

template <class V, int P>
void w4_fixed_in(int64_t blocks, const Block* block, const W4Tile& t) {
  FixedGroup group;
  for (int64_t g = t.start; g < t.end; ++g) {
    take_fixed_scales<V>(t, g, &group);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t top = block[b].top - block->top;
      float* y = t.y + top * kPanel;
      if (g == t.groups - 1) fetch_results(t.results, top, block[b].rows);
      with_nibbles(b, blocks, [&](auto nibbles) { fixed_block<V, P, nibbles>(t, g, block[b], b, blocks, group, y); });
    }
  }
}

template <class V>
void w4_fixed(int64_t blocks, const Block* block, const W4Tile& t) {
  t.pieces == 1 ? w4_fixed_in<V, 1>(blocks, block, t) : w4_fixed_in<V, 2>(blocks, block, t);
}

}  // namespace
}  // namespace sqplus
