// W4A16 with x in fixed point (kernels.h), for x86 processors with AVX2 and more.
//
// 8-bit integer products do 32 and more weights an instruction, nibbles as they are packed: three of them, one for each piece, take less time than
// nibbles made float32 numbers, 8 or 16 at a time, and their products. Nothing is lost: sums of a group are exact, and an activation is rounded by less
// than float32 sums round. That they are exact also makes results independent of how rows are put in blocks.
#pragma once

#include <immintrin.h>

#include "tile.h"

namespace sqplus {
namespace {

// The largest magnitude decides the power of two. Numbers are rounded to integers, ties to even, as in quantize_row: by at most 2^-22 of the largest
// magnitude; the bits of the sum are the integer. Where all are below 2^-104, whose power of two float32 does not have, they are rounded to multiples of
// 2^-126.
inline void fix_group(const float* x, int64_t count, int64_t stride, int32_t* to, Fixed* fixed) {
  const uint32_t exponent = as_bits(absolute_maximum_of(x, count)) >> 23, power = exponent > 22 ? 275 - exponent : 253;
  const __m256 up = _mm256_set1_ps(as_float(power << 23)), above = _mm256_set1_ps(12582912.0f);
  const __m256i flip = _mm256_set1_epi32(0x808080), from_bits = _mm256_set1_epi32(0x808080 - 0x4b400000);
  // Channels 0, 1 of the three pieces, then 2, 3; in the other lane 4, 5 and 6, 7: interleaved they are in kByteOrder.
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, -1, -1, 8, 12, 9, 13, 10, 14, -1, -1));
  __m256i sum[kPieces] = {};
  for (int64_t i = 0; i < count; i += 8, to += 2 * stride) {
    const __m256 rounded = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), up, above);
    // 128 more in each byte makes it unsigned; flipping its highest bit, signed again without a carry.
    const __m256i pieces = _mm256_xor_si256(_mm256_add_epi32(_mm256_castps_si256(rounded), from_bits), flip);
    unroll<kPieces>(SQPLUS_EACH(c) { sum[c] = _mm256_add_epi32(sum[c], _mm256_srai_epi32(_mm256_slli_epi32(pieces, 24 - 8 * c), 24)); });
    const __m256i apart = _mm256_shuffle_epi8(pieces, order);
    const __m128i first = _mm256_castsi256_si128(apart), second = _mm256_extracti128_si256(apart, 1);
    unroll<2>(SQPLUS_EACH(half) {
      const __m128i fours = half == 0 ? _mm_unpacklo_epi8(first, second) : _mm_unpackhi_epi8(first, second);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + half * stride), fours);
      to[half * stride + 2] = _mm_extract_epi32(fours, 2);
    });
  }
  for (int c = 0; c < kPieces; ++c) {
    int32_t lanes[8], total = 0;
    std::memcpy(lanes, &sum[c], sizeof lanes);
    for (const int32_t lane : lanes) total += lane;
    fixed->sums[c] = static_cast<float>(total);
  }
  fixed->unit = as_float(exponent == 255 ? 0x7fc00000 : (254 - power) << 23);
}

// Vectors of a panel that x in fixed point is multiplied with at once.
template <class V>
constexpr int fixed_vectors_for(int rows) {
  const int room = V::accumulators / (kPieces * rows);
  return room < V::fixed_vectors ? (room >= 2 ? 2 : 1) : V::fixed_vectors;
}

// A group for R rows of x in fixed point; `weight(k, half, channel)` gives the nibbles of four input channels, one of the halves of step k. Integer
// sums are exact, so their order does not matter; V::narrow steps fit in what V adds up at first. The zero point is subtracted exactly too.
template <class V, int R, class Weight>
SQPLUS_INLINE void fixed_group(const W4Tile& t, int64_t g, int64_t top, float* y, Weight&& weight) {
  constexpr int H = fixed_vectors_for<V>(R), N = kPieces * R * H;
  const int32_t* x = static_cast<const int32_t*>(t.x) + (g * t.rows + top) * t.steps * 2 * kPieces;
  alignas(64) int32_t sums[kPieces * R * kPanel];
  for (int64_t start = 0; start < t.steps; start += V::narrow) {
    const int64_t end = t.steps - start < V::narrow ? t.steps : start + V::narrow;
    for (int from = 0; from < kPanel; from += H * V::width) {
      typename V::Int sum[N];
      unroll<N>(SQPLUS_EACH(i) { sum[i] = V::zero_int(); });
      for (int64_t k = start; k < end; ++k) {
        unroll<2>(SQPLUS_EACH(half) {
          typename V::Int nibbles[H];
          unroll<H>(SQPLUS_EACH(h) { nibbles[h] = weight(k, half, from + h * V::width); });
          unroll<kPieces * R>(SQPLUS_EACH(c) {
            const auto four = V::broadcast_int(x[(k * 2 + half) * kPieces * R + c]);
            unroll<H>(SQPLUS_EACH(h) { sum[c * H + h] = V::dot4_narrow(sum[c * H + h], nibbles[h], four); });
          });
        });
      }
      unroll<N>(SQPLUS_EACH(i) {
        int32_t* place = sums + (i / H) * kPanel + from + (i % H) * V::width;
        const auto wide = V::widen(sum[i]);
        V::store_int(place, start == 0 ? wide : V::add_int(V::load_int(place), wide));
      });
    }
  }
  const Fixed* of_group = reinterpret_cast<const Fixed*>(t.sums) + g * t.rows + top;
  for (int from = 0; from < kPanel; from += V::width) {
    const auto scale = scale_at<V>(t, g * kPanel + from), zero = zero_at<V>(t, g * kPanel + from);
    unroll<R>(SQPLUS_EACH(r) {
      typename V::Float piece[kPieces];
      unroll<kPieces>(SQPLUS_EACH(c) {
        piece[c] = V::fnma(zero, V::broadcast(of_group[r].sums[c]), V::to_float(V::load_int(sums + (r * kPieces + c) * kPanel + from)));
      });
      const auto units = V::fma(piece[2], V::broadcast(65536.0f), V::fma(piece[1], V::broadcast(256.0f), piece[0]));
      float* place = y + r * kPanel + from;
      V::store(place, V::fma(V::multiply(units, V::broadcast(of_group[r].unit)), scale, g == 0 ? V::broadcast(0.0f) : V::load(place)));
    });
  }
}

template <class V>
SQPLUS_INLINE typename V::Int half_of(typename V::Int packed, bool high) {
  return high ? V::high_nibbles(packed) : V::low_nibbles(packed);
}

// One block of rows: nibbles are taken out on the way.
template <class V, int R>
SQPLUS_NOINLINE void fixed_one(const W4Tile& t, int64_t g, int64_t top) {
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  fixed_group<V, R>(t, g, top, t.y, [&](int64_t k, auto half, int channel) __attribute__((always_inline)) {
    const uint32_t* own = w + k * kPanel + channel;
    if (half == 0 && channel % 16 == 0) V::template prefetch<true>(reinterpret_cast<const char*>(own) + 4096);
    return half_of<V>(V::load_int(own), half);
  });
}

template <class V, int R>
SQPLUS_NOINLINE void fixed_of_many(const W4Tile& t, int64_t g, int64_t top, const uint32_t* nibbles, float* y) {
  fixed_group<V, R>(t, g, top, y, [&](int64_t k, auto half, int channel) __attribute__((always_inline)) {
    return V::load_int(nibbles + (k * 2 + half) * kPanel + channel);
  });
}

// Many: once for all of them, 8 KB.
template <class V>
void fixed_many(const W4Tile& t, int64_t g, int64_t blocks, const Block* block) {
  alignas(64) uint32_t nibbles[16 * 2 * kPanel];
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  for (int64_t k = 0; k < t.steps; ++k) {
    prefetch<V, true>(w + k * kPanel, t.steps * kPanel * 4);  // the next group
    for (int channel = 0; channel < kPanel; channel += V::width) {
      const auto packed = V::load_int(w + k * kPanel + channel);
      unroll<2>(SQPLUS_EACH(half) { V::store_int(reinterpret_cast<int32_t*>(nibbles) + (k * 2 + half) * kPanel + channel, half_of<V>(packed, half)); });
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t top = block[b].top;
    with_rows<kFixedRows>(block[b].rows, [&](auto r) { fixed_of_many<V, r>(t, g, top, nibbles, t.y + (top - block->top) * kPanel); });
  }
}

template <class V>
void w4_fixed(int64_t blocks, const Block* block, const W4Tile& t) {
  for (int64_t g = 0; g < t.groups; ++g) {
    if (blocks == 1) {
      with_rows<kFixedRows>(block->rows, [&](auto r) { fixed_one<V, r>(t, g, block->top); });
    } else {
      fixed_many<V>(t, g, blocks, block);
    }
  }
}

}  // namespace
}  // namespace sqplus
