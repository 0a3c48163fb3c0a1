// W4A16 with x in fixed point (kernels.h), for x86 processors with AVX2 and more.
//
// 8-bit products take 32 and more nibbles an instruction, as they are packed. Three of them, one for each piece, take less time than making float32
// numbers of the nibbles, 8 or 16 an instruction, and multiplying those. Nothing is lost: sums over a group are exact, and rounding the activations to
// 2^-23 of the group's largest one changes a result by less than float32 sums do (tests/runtime/test_cpu.py compares them with float64).
#pragma once

#include <immintrin.h>

#include "tile.h"

namespace sqplus {
namespace {

// The largest magnitude decides the power of two: it becomes 2^22 or more, and less than 2^23 - 2^16, so that no piece is above 127. Rounding to integers
// changes a number by 2^-23 of the largest magnitude at most. Where all are below 2^-104, whose power of two float32 does not have, they are rounded to
// multiples of 2^-126.
inline void fix_group(const float* x, int64_t count, int64_t stride, int32_t* to, Fixed* fixed) {
  const uint32_t largest = as_bits(absolute_maximum_of(x, count)), exponent = (largest + (1 << 17)) >> 23;
  const uint32_t power = exponent > 22 ? 276 - exponent : 253;
  const __m256 up = _mm256_set1_ps(as_float(power << 23));
  const __m256i flip = _mm256_set1_epi32(0x808080);
  // Channels 0, 1 of the three pieces, then 2, 3; in the other lane 4, 5 and 6, 7: interleaved they are in kByteOrder.
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, -1, -1, 8, 12, 9, 13, 10, 14, -1, -1));
  __m256i all = _mm256_setzero_si256(), highest = all;
  for (int64_t i = 0; i < count; i += 8, to += 2 * stride) {
    const __m256i integers = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), up));
    // 128 more in each byte makes it unsigned; flipping its highest bit, signed again without a carry.
    const __m256i pieces = _mm256_xor_si256(_mm256_add_epi32(integers, flip), flip);
    all = _mm256_add_epi32(all, integers);
    highest = _mm256_add_epi32(highest, _mm256_srai_epi32(_mm256_slli_epi32(pieces, 8), 24));
    const __m256i apart = _mm256_shuffle_epi8(pieces, order);
    const __m128i first = _mm256_castsi256_si128(apart), second = _mm256_extracti128_si256(apart, 1);
    unroll<2>(SQPLUS_EACH(half) {
      const __m128i fours = half == 0 ? _mm_unpacklo_epi8(first, second) : _mm_unpackhi_epi8(first, second);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + half * stride), fours);
      to[half * stride + 2] = _mm_extract_epi32(fours, 2);
    });
  }
  const auto total = [](__m256i lanes) {
    uint32_t each[8], sum = 0;
    std::memcpy(each, &lanes, sizeof each);
    for (const uint32_t lane : each) sum += lane;
    return sum;
  };
  const uint32_t high = total(highest);
  fixed->high = static_cast<float>(static_cast<int32_t>(high));
  fixed->low = static_cast<float>(static_cast<int32_t>(total(all) - (high << 16)));
  fixed->unit = as_float(largest >= 0x7f800000 ? 0x7fc00000 : (254 - power) << 23);
}

// A group for R rows; `weight(k, half, channel)` gives the nibbles of four input channels, one of the halves of step k. Integer sums are exact, so their
// order does not matter: V::narrow steps at a time, which is what fits in V's first sums, for all of the panel. So weights are read nearly in order.
template <class V, int R, class Weight>
SQPLUS_INLINE void fixed_group(const W4Tile& t, int64_t g, int64_t top, float* y, Weight&& weight) {
  constexpr int H = V::fixed_vectors, N = kPieces * R * H;
  const int32_t* x = static_cast<const int32_t*>(t.x) + (g * t.rows + top) * t.steps * 2 * kPieces;
  alignas(64) int32_t sums[R * 2 * kPanel] = {};  // as in Fixed: of piece 1 * 256 + piece 0, and of piece 2
  for (int64_t start = 0; start < t.steps; start += V::narrow) {
    const int64_t end = t.steps - start < V::narrow ? t.steps : start + V::narrow;
    for (int from = 0; from < kPanel; from += H * V::width) {
      typename V::Int sum[N];
      const auto step = [&](int64_t k, auto first) __attribute__((always_inline)) {
        unroll<2>(SQPLUS_EACH(half) {
          typename V::Int nibbles[H];
          unroll<H>(SQPLUS_EACH(h) { nibbles[h] = weight(k, half, from + h * V::width); });
          unroll<kPieces * R>(SQPLUS_EACH(c) {
            const auto four = V::broadcast_int(x[(k * 2 + half) * kPieces * R + c]);
            unroll<H>(SQPLUS_EACH(h) {
              auto& own = sum[c * H + h];
              own = first && half == 0 ? V::products(nibbles[h], four) : V::add_products(own, nibbles[h], four);
            });
          });
        });
      };
      step(start, std::true_type{});
      for (int64_t k = start + 1; k < end; ++k) step(k, std::false_type{});
      unroll<R * H>(SQPLUS_EACH(i) {
        constexpr int piece = i / H * kPieces * H + i % H;
        int32_t* kept = sums + i / H * 2 * kPanel + from + i % H * V::width;
        V::store_int(kept, V::add_int(V::load_int(kept), V::widen(sum[piece], sum[piece + H])));
        V::store_int(kept + kPanel, V::add_int(V::load_int(kept + kPanel), V::widen(sum[piece + 2 * H])));
      });
    }
  }
  const Fixed* of_group = reinterpret_cast<const Fixed*>(t.sums) + g * t.rows + top;
  for (int from = 0; from < kPanel; from += V::width) {
    const auto scale = scale_at<V>(t, g * kPanel + from), zero = zero_at<V>(t, g * kPanel + from);
    unroll<R>(SQPLUS_EACH(r) {
      const int32_t* kept = sums + r * 2 * kPanel + from;
      const auto low = V::fnma(zero, V::broadcast(of_group[r].low), V::to_float(V::load_int(kept)));
      const auto high = V::fnma(zero, V::broadcast(of_group[r].high), V::to_float(V::load_int(kept + kPanel)));
      const auto total = V::multiply(V::fma(high, V::broadcast(65536.0f), low), V::broadcast(of_group[r].unit));
      float* place = y + r * kPanel + from;
      V::store(place, V::fma(total, scale, g == 0 ? V::broadcast(0.0f) : V::load(place)));
    });
  }
}

template <class V>
SQPLUS_INLINE typename V::Int half_of(typename V::Int packed, bool high) {
  return high ? V::high_nibbles(packed) : V::low_nibbles(packed);
}

// Few blocks of rows: each takes nibbles out on the way. The first one fetches weights a little ahead.
template <class V, int R>
SQPLUS_NOINLINE void fixed_of_few(const W4Tile& t, int64_t g, int64_t top, bool fetch, float* y) {
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  fixed_group<V, R>(t, g, top, y, [&](int64_t k, auto half, int channel) __attribute__((always_inline)) {
    const uint32_t* own = w + k * kPanel + channel;
    if (half == 0 && channel % 16 == 0 && fetch) V::template prefetch<true>(reinterpret_cast<const char*>(own) + 4096);
    return half_of<V>(V::load_int(own), half);
  });
}

template <class V, int R>
SQPLUS_NOINLINE void fixed_of_many(const W4Tile& t, int64_t g, int64_t top, const int32_t* nibbles, float* y) {
  fixed_group<V, R>(t, g, top, y, [&](int64_t k, auto half, int channel) __attribute__((always_inline)) {
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

template <class V>
void w4_fixed(int64_t blocks, const Block* block, const W4Tile& t) {
  alignas(64) int32_t nibbles[16 * 2 * kPanel];
  for (int64_t g = 0; g < t.groups; ++g) {
    if (blocks > 2) take_nibbles<V>(t, g, nibbles);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t top = block[b].top;
      float* y = t.y + (top - block->top) * kPanel;
      with_rows<kFixedRows>(block[b].rows, [&](auto r) {
        blocks > 2 ? fixed_of_many<V, r>(t, g, top, nibbles, y) : fixed_of_few<V, r>(t, g, top, b == 0, y);
      });
    }
  }
}

}  // namespace
}  // namespace sqplus
