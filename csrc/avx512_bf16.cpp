// AVX-512 with BF16, dot products of pairs of bfloat16 numbers in float32: Cooper Lake, Sapphire Rapids, Zen 4 and later. W4A16 for bfloat16
// activations, which a 4-bit weight, as a bfloat16 number, multiplies exactly; and weights that were left in bfloat16.
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

SQPLUS_INLINE V::Float dot2(V::Float sum, V::Int w, V::Int x) {
#if defined(SQPLUS_EMULATE)
  return emulated::dpbf16_ps(sum, w, x);
#else
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
#endif
}

// Pair j of the eight input channels as bfloat16 numbers, 16 more than their nibbles: a nibble is the upper half of a mantissa whose exponent says 16. What waits for
// the table has no use for the units that multiply, bits are combined by any: that is faster where there is little to multiply.
constexpr int kZero = 8 + 16;
template <int j, bool few>
SQPLUS_INLINE V::Int decode(V::Int packed) {
  if constexpr (few) {
    const V::Int there = j == 0 ? _mm512_slli_epi32(packed, 3) : _mm512_srli_epi32(packed, 4 * j - 3);
    return _mm512_or_si512(_mm512_and_si512(there, _mm512_set1_epi32(0x00780078)), _mm512_set1_epi32(0x41804180));  // one instruction
  } else {
    // The look-up takes 5 bits, the highest of which belongs to another channel: the table has everything twice.
    alignas(64) static constexpr uint16_t table[32] = {
        0x4180, 0x4188, 0x4190, 0x4198, 0x41a0, 0x41a8, 0x41b0, 0x41b8, 0x41c0, 0x41c8, 0x41d0, 0x41d8, 0x41e0, 0x41e8, 0x41f0, 0x41f8,
        0x4180, 0x4188, 0x4190, 0x4198, 0x41a0, 0x41a8, 0x41b0, 0x41b8, 0x41c0, 0x41c8, 0x41d0, 0x41d8, 0x41e0, 0x41e8, 0x41f0, 0x41f8};
    return _mm512_permutexvar_epi16(j == 0 ? packed : _mm512_srli_epi32(packed, 4 * j), _mm512_load_si512(table));
  }
}

// And as bfloat16 numbers: pair j of step k for the channels of vector h at (k * kVectors + h) * 4 + j.
struct DecodedGroup : Group {
  V::Int weights[16 * 4 * kVectors];  // 16 KB
};

// A group for R rows. Each row's products are added in the same order, whatever the rows beside it: pairs of input channels one after the other. Few rows have
// few sums, which wait for themselves: they take a pair for all vectors of channels before the next one.
template <Nibbles nibbles, int R, class Fetch>
SQPLUS_NOINLINE void group_of(const W4Tile& t, int64_t g, int64_t top, DecodedGroup& group, Fetch fetch, float* y) {
  constexpr bool few = R <= 2;
  constexpr int at_once = few ? kVectors : 1;
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  const int64_t length = t.steps * 4;
  const int32_t* x = static_cast<const int32_t*>(t.x) + (g * t.rows + top) * length;
  V::Int* kept = group.weights;
  V::Float sum[R * kVectors];
  unroll<R * kVectors>(SQPLUS_EACH(i) { sum[i] = _mm512_setzero_ps(); });
  auto fetch_x = next_rows<V, R, 4>(x, length);
  for (int64_t k = 0; k < t.steps; ++k, w += kPanel, x += 4, kept += 4 * kVectors) {
    fetch.step();
    if constexpr (!Fetch::alone) fetch_x.step();
    unroll<kVectors / at_once>(SQPLUS_EACH(part) {
      V::Int packed[at_once];
      if constexpr (nibbles != Nibbles::kKept) {
        unroll<at_once>(SQPLUS_EACH(i) { packed[i] = V::load_int(w + (part * at_once + i) * V::width); });
      }
      unroll<4>(SQPLUS_EACH(j) {
        V::Int pair[R];
        if constexpr (few) unroll<R>(SQPLUS_EACH(r) { pair[r] = V::broadcast_int(x[r * length + j]); });
        unroll<at_once>(SQPLUS_EACH(i) {
          constexpr int h = part * at_once + i;
          V::Int weight;
          if constexpr (nibbles == Nibbles::kKept) {
            weight = kept[h * 4 + j];
          } else {
            weight = decode<j, few>(packed[i]);
          }
          if constexpr (nibbles == Nibbles::kTakenAndKept) kept[h * 4 + j] = weight;
          unroll<R>(SQPLUS_EACH(r) {
            V::Float& own = sum[r * kVectors + h];
            own = few ? dot2(own, weight, pair[r]) : dot2(own, weight, x[r * length + j]);
          });
        });
      });
    });
  }
  add_group<V, R, kVectors>(group, static_cast<const float*>(t.sums) + g * t.rows + top, 0, sum, y);
}

// W8's loops, for pairs of bfloat16 numbers in place of four integers: sums are float32 in the registers of integers.
struct Bfloat16 : Avx512 {
  static SQPLUS_INLINE Int dot4(Int sum, Int w, Int x) { return _mm512_castps_si512(dot2(_mm512_castsi512_ps(sum), w, x)); }
  static SQPLUS_INLINE Float to_float(Int a) { return _mm512_castsi512_ps(a); }
};

}  // namespace

void bfloat16_avx512(int64_t blocks, const Block* block, const W8Tile& t) { w8<Bfloat16>(blocks, block, t); }

// Products with ones, in sixteen parts that are added up in pairs.
float sum_bfloat16_avx512(const void* x, int64_t count) {
  V::Float sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 32) sum = dot2(sum, V::load_int(static_cast<const uint16_t*>(x) + i), V::broadcast_int(0x3f803f80));
  float parts[16];
  V::store(parts, sum);
  return added_up(parts);
}

void w4_bfloat16_avx512(int64_t blocks, const Block* block, const W4Tile& t) {
  DecodedGroup group;
  for (int64_t g = t.start; g < t.end; ++g) {
    take_scales<V, kZero>(t, g, &group);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t top = block[b].top;
      float* y = t.y + (top - block->top) * kPanel;
      if (g == t.groups - 1) fetch_results(t.results, top - block->top, block[b].rows);
      with_rows<most_rows<V>>(block[b].rows, [&](auto r) {
        fetching<V>(t, g, b, blocks, [&](auto fetch) {
          with_nibbles(b, blocks, [&](auto nibbles) { group_of<nibbles, r>(t, g, top, group, fetch, y); });
        });
      });
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
