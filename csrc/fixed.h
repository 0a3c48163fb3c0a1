// W4A16 with x in fixed point (kernels.h), for x86 processors with AVX2 and more.
//
// 8-bit products take 32 and more nibbles an instruction, as they are packed. Two or three of them, one for each piece, take less time than making
// float32 numbers of the nibbles, 8 or 16 an instruction, and multiplying those. Nothing is lost: sums over a group are exact, and rounding the activations
// to 2^-23 of the group's largest one changes a result by less than float32 sums do (tests/runtime/test_cpu.py compares them with float64).
#pragma once

#include <immintrin.h>

#include "tile.h"

namespace sqplus {
namespace {

// The largest magnitude decides the power of two: it becomes 2^22 - 2^15 or more, and less than 2^23 - 2^16, so that no piece is above 127. Rounding to
// integers changes a number by about 2^-23 of the largest magnitude at most. Where all are below 2^-104, whose power of two float32 does not have, they are rounded to
// multiples of 2^-126.
inline void fix_group(const float* x, int64_t count, int pieces, int64_t stride, int32_t* to, Rest* rest, Fixed* fixed) {
  const uint32_t largest = as_bits(absolute_maximum_of(x, count)), exponent = (largest + (1 << 17)) >> 23;
  const uint32_t power = exponent > 22 ? 276 - exponent : 253;
  const __m256 up = _mm256_set1_ps(as_float(power << 23));
  const __m256i flip = _mm256_set1_epi32(0x808080);
  // Channels 0, 1 of the three pieces, then 2, 3; in the other lane 4, 5 and 6, 7: interleaved they are in kByteOrder.
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 6, 1, 5, 0, 4, -1, -1, 10, 14, 9, 13, 8, 12, -1, -1));
  __m256i all = _mm256_setzero_si256(), lowest = all;
  int32_t rests = 0;
  for (int64_t i = 0; i < count; i += 8, to += 2 * stride) {
    const __m256i integers = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), up));
    // 128 more in each byte makes it unsigned; flipping its highest bit, signed again without a carry.
    const __m256i bytes = _mm256_xor_si256(_mm256_add_epi32(integers, flip), flip);
    all = _mm256_add_epi32(all, integers);
    lowest = _mm256_add_epi32(lowest, _mm256_srai_epi32(_mm256_slli_epi32(bytes, 24), 24));
    const __m256i apart = _mm256_shuffle_epi8(bytes, order);
    const __m128i first = _mm256_castsi256_si128(apart), second = _mm256_extracti128_si256(apart, 1);
    unroll<2>(SQPLUS_EACH(half) {
      const __m128i fours = half == 0 ? _mm_unpacklo_epi8(first, second) : _mm_unpackhi_epi8(first, second);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + half * stride), fours);
      const int32_t last = _mm_extract_epi32(fours, 2);
      if (pieces == 3) {
        to[half * stride + 2] = last;
      } else if (last != 0) {
        rest[rests++] = {last, static_cast<int32_t>(i / 4 + half)};
      }
    });
  }
  const auto total = [](__m256i lanes) {
    uint32_t each[8], sum = 0;
    std::memcpy(each, &lanes, sizeof each);
    for (const uint32_t lane : each) sum += lane;
    return sum;
  };
  const uint32_t low = total(lowest);
  fixed->low = static_cast<int32_t>(low);
  fixed->high = static_cast<int32_t>(total(all) - low) / 256;  // exactly
  fixed->rests = rests;
  fixed->unit = as_float(largest >= 0x7f800000 ? 0x7fc00000 : (254 - power) << 23);
}

template <class V>
SQPLUS_INLINE void add_to(int32_t* sum, typename V::Int a, bool first) {
  V::store_int(sum, first ? a : V::add_int(V::load_int(sum), a));
}

// The sums of a group for R rows: high pieces times nibbles in sums[r][0], the lowest piece in sums[r][1] where P is 3. `weight(k, half, channel)` gives the
// nibbles of four input channels, one of the halves of step k. Integer sums are exact, so their order does not matter: V::narrow steps at a time, which
// is what fits in V's first sums, for all of the panel. So weights are read nearly in order.
template <class V, int R, int P, class Weight>
SQPLUS_INLINE void fixed_sums(const int32_t* x, int64_t steps, int32_t (&sums)[R][2][kPanel], Weight&& weight) {
  constexpr int H = vectors_for<V>(R * P, V::fixed_accumulators);
  constexpr bool short_sums = V::narrow == 4;
  for (int64_t start = 0; start < steps; start += V::narrow) {
    const int64_t end = short_sums || start + V::narrow < steps ? start + V::narrow : steps;
    for (int from = 0; from < kPanel; from += H * V::width) {
      typename V::Int sum[R * P * H];
      unroll<R * P * H>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
      for (int64_t k = start; k < end; k += 4) {
        const int32_t* own = x + k * 2 * P * R;
        unroll<8>(SQPLUS_EACH(i) {
          // Or the compiler would keep what it has read for both halves, in registers that there are not.
          asm volatile("" ::: "memory");
          typename V::Int nibbles[H];
          unroll<H>(SQPLUS_EACH(h) { nibbles[h] = weight(k + i / 2, i % 2, from + h * V::width); });
          unroll<P * R>(SQPLUS_EACH(c) {
            const auto four = V::broadcast_int(own[i * P * R + c]);
            unroll<H>(SQPLUS_EACH(h) {
              auto& to = sum[c * H + h];
              to = short_sums && i == 0 ? V::products(nibbles[h], four) : V::add_products(to, nibbles[h], four);
            });
          });
        });
      }
      unroll<R * H>(SQPLUS_EACH(i) {
        constexpr int r = i / H, piece = r * P * H + i % H;
        int32_t* high = sums[r][0] + from + i % H * V::width;
        add_to<V>(high, V::widen(sum[piece + H], sum[piece]), start == 0);
        if constexpr (P == 3) add_to<V>(sums[r][1] + from + i % H * V::width, V::widen(sum[piece + 2 * H]), start == 0);
      });
    }
  }
}

// Two pieces of everything, and of the third what is not zero: in bfloat16 that is what is 128 times smaller than the group's largest activation.
template <class V, class Weight>
SQPLUS_INLINE void add_rests(const Rest* rest, int64_t rests, int32_t* sums, Weight&& weight) {
  constexpr int H = kPanel / V::width;
  for (int64_t start = 0; start < rests; start += 2 * V::narrow) {
    typename V::Int sum[H];
    unroll<H>(SQPLUS_EACH(h) { sum[h] = V::zero_int(); });
    for (int64_t i = start; i < rests && i < start + 2 * V::narrow; ++i) {
      const auto four = V::broadcast_int(rest[i].four);
      unroll<H>(SQPLUS_EACH(h) { sum[h] = V::add_products(sum[h], weight(rest[i].at / 2, rest[i].at % 2, h * V::width), four); });
    }
    unroll<H>(SQPLUS_EACH(h) { add_to<V>(sums + h * V::width, V::widen(sum[h]), start == 0); });
  }
}

// y += ((sums of the high pieces * 256 + of the lowest) - zero * the same of the activations) * unit * scale.
template <class V, int R, int P, class Weight>
SQPLUS_INLINE void fixed_group(const W4Tile& t, int64_t g, int64_t top, float* y, Weight&& weight) {
  alignas(64) int32_t sums[R][2][kPanel];
  fixed_sums<V, R, P>(static_cast<const int32_t*>(t.x) + (g * t.rows + top) * t.steps * 2 * P, t.steps, sums, weight);
  const Fixed* fixed = static_cast<const Fixed*>(t.sums) + g * t.rows + top;
  if constexpr (P == 2) {
    for (int r = 0; r < R; ++r) {
      add_rests<V>(t.rest + (g * t.rows + top + r) * t.steps * 2, fixed[r].rests, sums[r][1], weight);
    }
  }
  for (int from = 0; from < kPanel; from += V::width) {
    const int64_t i = g * kPanel + from;
    const auto scale = scale_at<V>(t, i);
    const auto zero = t.zero_point ? V::add_int(V::load_int8(t.zero_point + i), V::broadcast_int(8)) : V::broadcast_int(8);
    const auto shifted = [&](const int32_t* sum, int32_t of_x) __attribute__((always_inline)) {
      return V::to_float(V::subtract(V::load_int(sum + from), V::multiply_int(zero, V::broadcast_int(of_x))));
    };
    unroll<R>(SQPLUS_EACH(r) {
      const auto low = P == 3 || fixed[r].rests > 0 ? shifted(sums[r][1], fixed[r].low) : V::broadcast(0.0f);
      const auto total = V::multiply(V::fma(shifted(sums[r][0], fixed[r].high), V::broadcast(256.0f), low), V::broadcast(fixed[r].unit));
      float* place = y + r * kPanel + from;
      V::store(place, V::fma(total, scale, g == 0 ? V::broadcast(0.0f) : V::load(place)));
    });
  }
}

template <class V>
SQPLUS_INLINE typename V::Int half_of(typename V::Int packed, bool high) {
  return high ? V::high_nibbles(packed) : V::low_nibbles(packed);
}

constexpr int64_t kFewBlocks = 4;

// Few blocks of rows: each takes nibbles out on the way. The first one fetches weights a little ahead.
template <class V, int R, int P>
SQPLUS_NOINLINE void fixed_of_few(const W4Tile& t, int64_t g, int64_t top, bool fetch, float* y) {
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  fixed_group<V, R, P>(t, g, top, y, [&](int64_t k, int half, int channel) __attribute__((always_inline)) {
    const uint32_t* own = w + k * kPanel + channel;
    if (half == 0 && channel % 16 == 0 && fetch) V::template prefetch<true>(reinterpret_cast<const char*>(own) + 4096);
    return half_of<V>(V::load_int(own), half);
  });
}

template <class V, int R, int P>
SQPLUS_NOINLINE void fixed_of_many(const W4Tile& t, int64_t g, int64_t top, const int32_t* nibbles, float* y) {
  fixed_group<V, R, P>(t, g, top, y, [&](int64_t k, int half, int channel) __attribute__((always_inline)) {
    return V::load_int(nibbles + (k * 2 + half) * kPanel + channel);
  });
}

// For many, once: 8 KB.
template <class V>
void take_nibbles(const W4Tile& t, int64_t g, int32_t* nibbles) {
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  for (int64_t k = 0; k < t.steps; ++k, w += kPanel, nibbles += 2 * kPanel) {
    prefetch<V, true>(w, t.steps * kPanel * 4);  // the next group
    for (int channel = 0; channel < kPanel; channel += V::width) {
      const auto packed = V::load_int(w + channel);
      unroll<2>(SQPLUS_EACH(half) { V::store_int(nibbles + half * kPanel + channel, half_of<V>(packed, half)); });
    }
  }
}

template <class V, int P>
void w4_fixed_in(int64_t blocks, const Block* block, const W4Tile& t) {
  alignas(64) int32_t nibbles[16 * 2 * kPanel];
  for (int64_t g = 0; g < t.groups; ++g) {
    if (blocks > kFewBlocks) take_nibbles<V>(t, g, nibbles);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t top = block[b].top;
      float* y = t.y + (top - block->top) * kPanel;
      with_rows<fixed_rows(P)>(block[b].rows, [&](auto r) {
        blocks > kFewBlocks ? fixed_of_many<V, r, P>(t, g, top, nibbles, y) : fixed_of_few<V, r, P>(t, g, top, b == 0, y);
      });
    }
  }
}

template <class V>
void w4_fixed(int64_t blocks, const Block* block, const W4Tile& t) {
  t.pieces == 2 ? w4_fixed_in<V, 2>(blocks, block, t) : w4_fixed_in<V, 3>(blocks, block, t);
}

}  // namespace
}  // namespace sqplus
