// AVX-512 with BF16, dot products of pairs of bfloat16 numbers in float32: Cooper Lake, Sapphire Rapids, Zen 4 and later. W4A16 for bfloat16
// activations, which a 4-bit weight, looked up as a bfloat16 number, multiplies exactly.
#if defined(__x86_64__)
#define SQPLUS_BFLOAT16
#include "avx512.h"

namespace sqplus {
namespace {

using V = Avx512;
constexpr int kVectors = kPanel / V::width;

// sum += x[0] * w[0] + x[1] * w[1] in each 32-bit lane. As assembly: GCC 12 spills the accumulators of the intrinsic.
SQPLUS_INLINE V::Float dot2(V::Float sum, V::Int w, const int32_t& x) {
#if defined(SQPLUS_EMULATE)
  return emulated::dpbf16_ps(sum, w, V::broadcast_int(x));
#else
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(x));
  return sum;
#endif
}

// Two 0..15 as bfloat16 in each 32-bit lane: pair j of the eight input channels. The look-up takes 5 bits, the highest of which belongs to
// another channel: the table has everything twice.
template <int j>
SQPLUS_INLINE V::Int decode(V::Int packed) {
  alignas(64) static constexpr uint16_t table[32] = {
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
  return _mm512_permutexvar_epi16(j == 0 ? packed : _mm512_srli_epi32(packed, 4 * j), _mm512_load_si512(table));
}

// A group for R rows, H vectors of channels from `from` on. `weight(k, h, j)` gives pair j of step k. There are two sums for each vector, of even and
// odd pairs, because one would wait for itself; they are always added in the same order, so that a row's result does not depend on the rows
// beside it.
template <int R, int H, class Weight>
SQPLUS_INLINE void group(const W4Tile& t, int64_t g, int64_t top, int from, float* y, Weight&& weight) {
  const int32_t* x = static_cast<const int32_t*>(t.x) + (g * t.rows + top) * t.steps * 4;
  V::Float sum[2 * R * H];
  unroll<2 * R * H>(SQPLUS_EACH(i) { sum[i] = _mm512_setzero_ps(); });
  for (int64_t k = 0; k < t.steps; ++k, x += 4 * R) {
    unroll<H>(SQPLUS_EACH(h) {
      unroll<4>(SQPLUS_EACH(j) {
        const V::Int w = weight(k, h, j);
        unroll<R>(SQPLUS_EACH(r) {
          constexpr int i = (r * H + h) * 2 + j % 2;
          sum[i] = dot2(sum[i], w, x[j * R + r]);
        });
      });
    });
  }
  V::Float both[R * H];
  unroll<R * H>(SQPLUS_EACH(i) { both[i] = _mm512_add_ps(sum[2 * i], sum[2 * i + 1]); });
  add_group<V, R, H>(t, static_cast<const float*>(t.sums) + g * t.rows + top, g, from, both, y);
}

// For one block of rows nibbles are decoded on the way.
template <int R>
SQPLUS_NOINLINE void one_block(const W4Tile& t, int64_t g, int64_t top) {
  constexpr int H = R <= 2 ? kVectors : 2;
  for (int from = 0; from < kPanel; from += H * V::width) {
    const uint32_t* w = t.weight + g * t.steps * kPanel + from;
    V::Int packed[H];
    group<R, H>(t, g, top, from, t.y, [&](int64_t k, auto h, auto j) __attribute__((always_inline)) {
      if constexpr (j == 0) {
        if (h == 0 && from == 0) prefetch<V, true>(w + k * kPanel, 4096);
        packed[h] = V::load_int(w + k * kPanel + h * V::width);
      }
      return decode<j>(packed[h]);
    });
  }
}

template <int R>
SQPLUS_NOINLINE void one_of_many(const W4Tile& t, int64_t g, int64_t top, const V::Int* decoded, float* y) {
  constexpr int H = R <= 2 ? kVectors : 2;
  for (int from = 0; from < kVectors; from += H) {
    group<R, H>(t, g, top, from * V::width, y,
                [&](int64_t k, auto h, auto j) __attribute__((always_inline)) { return decoded[(k * kVectors + from + h) * 4 + j]; });
  }
}

// For many blocks once, 16 KB.
void many_blocks(const W4Tile& t, int64_t g, int64_t blocks, const Block* block) {
  alignas(64) V::Int decoded[16 * 4 * kVectors];
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  for (int64_t k = 0; k < t.steps; ++k) {
    prefetch<V, true>(w + k * kPanel, t.steps * kPanel * 4);  // the next group
    unroll<kVectors>(SQPLUS_EACH(h) {
      const V::Int packed = V::load_int(w + k * kPanel + h * V::width);
      unroll<4>(SQPLUS_EACH(j) { decoded[(k * kVectors + h) * 4 + j] = decode<j>(packed); });
    });
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t top = block[b].top;
    with_rows<V::rows>(block[b].rows, [&](auto r) { one_of_many<r>(t, g, top, decoded, t.y + (top - block->top) * kPanel); });
  }
}

}  // namespace

void w4_bfloat16_avx512(int64_t blocks, const Block* block, const W4Tile& t) {
  for (int64_t g = 0; g < t.groups; ++g) {
    if (blocks == 1) {
      with_rows<V::rows>(block->rows, [&](auto r) { one_block<r>(t, g, block->top); });
    } else {
      many_blocks(t, g, blocks, block);
    }
  }
}

int64_t peak_bfloat16_avx512(int64_t iterations) {
  constexpr int N = V::accumulators;
  const int32_t ones = 0x3f803f80;
  V::Float sum[N];
  V::Int w = _mm512_set1_epi32(ones);
  unroll<N>(SQPLUS_EACH(i) { sum[i] = _mm512_setzero_ps(); });
  for (int64_t k = 0; k < iterations; ++k) {
    V::touch(w);
    unroll<N>(SQPLUS_EACH(i) { sum[i] = dot2(sum[i], w, ones); });
  }
  unroll<N>(SQPLUS_EACH(i) { V::touch(sum[i]); });
  return iterations * N * V::width * 2 * 2;
}

}  // namespace sqplus
#endif
