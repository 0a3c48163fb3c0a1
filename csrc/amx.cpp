// AMX: products of tiles, 16 rows of activations with 16 output channels, 64 int8 or 32 bfloat16 numbers deep. Sapphire Rapids and later.
#if defined(__x86_64__)
#define SQPLUS_BFLOAT16
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

namespace sqplus {
namespace {

using V = Avx512;

// A block's rows lie in two tiles; where there are more than one has room for, output channels in two of four at a time.
constexpr int kRows = 16, kChannels = 16, kBlock = 2 * kRows;

template <int tile>
SQPLUS_INLINE void load(const char* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
SQPLUS_INLINE void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
SQPLUS_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// Signed activations with unsigned weights, four at a time.
struct Integers {
  using Sum = int32_t;
  template <int sum, int x, int w>
  static SQPLUS_INLINE void multiply() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
  }
  static SQPLUS_INLINE V::Float to_float(const void* sums) { return V::to_float(V::load_int(sums)); }
};

// bfloat16, two at a time. Odd and even numbers are summed apart within a tile, then added to each other and to the sum.
struct Pairs16 {
  using Sum = float;
  template <int sum, int x, int w>
  static SQPLUS_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
  }
  static SQPLUS_INLINE V::Float to_float(const void* sums) { return V::load(static_cast<const float*>(sums)); }
};

// What a thread's tiles are configured for: 0 to 3 are sums, 4 and 5 activations, the others weights. With up to 16 rows, sums are those of four times 16 output channels
// and 5 is weights; else those of the upper and the lower rows, two of each.
class Tiles {
 public:
  ~Tiles() {
    if (rows_) asm volatile("tilerelease");
  }
  void take(int rows, int depth) {
    if (rows == rows_ && depth == depth_) return;
    rows_ = rows, depth_ = depth;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    const bool one = rows <= kRows;
    const auto set = [&](int tile, int rows, int bytes) { shape.rows[tile] = static_cast<uint8_t>(rows), shape.bytes[tile] = static_cast<uint16_t>(bytes); };
    for (int tile = 0; tile < 4; ++tile) set(tile, one ? rows : tile < 2 ? kRows : rows - kRows, 64);
    set(4, one ? rows : kRows, depth * 4);
    one ? set(5, depth, 64) : set(5, rows - kRows, depth * 4);
    set(6, depth, 64), set(7, depth, 64);
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }

 private:
  int rows_ = 0, depth_ = 0;
};

// Where an operand's first tile is, the bytes from one of its rows to the next, and those to the tile of the next input channels.
struct Operand {
  const char* at;
  int64_t row, next;
};

// Fetches `lines` of 64 bytes a step.
struct Coming {
  const char* at;
  int64_t lines;
  SQPLUS_INLINE void step() {
    for (int64_t i = 0; i < lines; ++i, at += 64) V::prefetch<false>(at);
  }
};

// sums += x times w for up to 16 rows and all of a panel; `beside` bytes are between 16 output channels and the next.
template <class Dot>
SQPLUS_INLINE void multiply_one(Operand x, Operand w, int64_t beside, int64_t tiles, Coming& coming) {
  for (int64_t k = 0; k < tiles; ++k, x.at += x.next, w.at += w.next) {
    load<4>(x.at, x.row);
    load<5>(w.at, w.row);
    Dot::template multiply<0, 4, 5>();
    load<6>(w.at + beside, w.row);
    Dot::template multiply<1, 4, 6>();
    load<7>(w.at + 2 * beside, w.row);
    Dot::template multiply<2, 4, 7>();
    load<5>(w.at + 3 * beside, w.row);
    Dot::template multiply<3, 4, 5>();
    coming.step();
  }
}

// For more rows and 32 output channels.
template <class Dot>
SQPLUS_INLINE void multiply_two(Operand x, Operand w, int64_t beside, int64_t tiles, Coming& coming) {
  for (int64_t k = 0; k < tiles; ++k, x.at += x.next, w.at += w.next) {
    load<6>(w.at, w.row);
    load<4>(x.at, x.row);
    Dot::template multiply<0, 4, 6>();
    load<7>(w.at + beside, w.row);
    Dot::template multiply<1, 4, 7>();
    load<5>(x.at + kRows * x.row, x.row);
    Dot::template multiply<2, 5, 6>();
    Dot::template multiply<3, 5, 7>();
    coming.step();
  }
}

// With the tiles of sums, the address of each in `y` (rows, 64), from output channel `from` on.
template <bool one, class F>
SQPLUS_INLINE void each_sum(char* y, F&& f) {
  constexpr int64_t width = kChannels * 4, rows = kRows * kPanel * 4;
  f(std::integral_constant<int, 0>{}, y);
  f(std::integral_constant<int, 1>{}, y + width);
  f(std::integral_constant<int, 2>{}, y + (one ? 2 * width : rows));
  f(std::integral_constant<int, 3>{}, y + (one ? 3 * width : rows + width));
}

constexpr int64_t kRow = kPanel * 4;

// Some steps of a chunk, which fill tiles of this depth.
template <class Dot>
void w8_steps(const W8Tile& t, const Block& own, int64_t start, int64_t tiles, int depth, Tiles& shape, Coming& coming, char* y) {
  shape.take(own.rows, depth);
  const Operand x{reinterpret_cast<const char*>(t.x + start * t.rows + own.top * depth), depth * 4, t.rows * depth * 4};
  const Operand w{reinterpret_cast<const char*>(t.weight) + start * kStep, kStep, depth * kStep};
  const auto walk = [&](auto one, int from, auto&& multiply) __attribute__((always_inline)) {
    each_sum<one>(y + from * 4, [](auto tile, char* at) { load<tile>(at, kRow); });
    multiply(x, Operand{w.at + from * 4, w.row, w.next}, kChannels * 4, tiles, coming);
    each_sum<one>(y + from * 4, [](auto tile, char* at) { store<tile>(at, kRow); });
  };
  if (own.rows <= kRows) {
    walk(std::true_type{}, 0, multiply_one<Dot>);
  } else {
    for (int from = 0; from < kPanel; from += 2 * kChannels) walk(std::false_type{}, from, multiply_two<Dot>);
  }
}

template <class Dot>
void w8_tiles(int64_t blocks, const Block* block, const W8Tile& t) {
  Tiles shape;
  const int64_t whole = t.count / kTileSteps, rest = t.count % kTileSteps;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t top = block[b].top - block->top;
    int32_t* y = t.y + top * kPanel;
    if (t.start == 0) {
      for (int64_t i = 0; i < block[b].rows * kPanel; ++i) y[i] = t.first[block[b].top + i / kPanel];
    }
    const int64_t walks = block[b].rows <= kRows ? 1 : 2, lines = kStep * kTileSteps / 64, part = (lines + blocks * walks - 1) / (blocks * walks);
    const int64_t all = t.count * kStep;
    Coming coming{reinterpret_cast<const char*>(t.next) + all * b / blocks, part};
    if (whole) w8_steps<Dot>(t, block[b], t.start, whole, kTileSteps, shape, coming, reinterpret_cast<char*>(y));
    if (rest) w8_steps<Dot>(t, block[b], t.start + whole * kTileSteps, 1, static_cast<int>(rest), shape, coming, reinterpret_cast<char*>(y));
    if (t.start + t.count == t.steps && std::is_same_v<Dot, Integers>) {
      for (int64_t i = 0; i < block[b].rows * kPanel; i += V::width) V::store(reinterpret_cast<float*>(y + i), Dot::to_float(y + i));
    }
  }
}

// A group's weights as tiles: bfloat16 numbers 16 more than the nibbles, or bytes. 16 KB.
struct alignas(64) Decoded : Group {
  char tiles[128 * kPanel * 2];
  char sums[kBlock * kRow];
};

template <class Dot>
SQPLUS_INLINE void decode(const W4Tile& t, int64_t g, int depth, Decoded& group) {
  const uint32_t* w = t.weight + g * t.steps * kPanel;
  if constexpr (std::is_same_v<Dot, Pairs16>) {
    for (int64_t k = 0; k < t.steps; ++k, w += kPanel) {
      char* to = group.tiles + (k / 4) * 4096 + (k % 4) * 256;
      unroll<4>(SQPLUS_EACH(h) {
        const V::Int packed = V::load_int(w + h * V::width);
        unroll<4>(SQPLUS_EACH(j) {
          const V::Int there = j == 0 ? _mm512_slli_epi32(packed, 3) : _mm512_srli_epi32(packed, 4 * j - 3);
          const V::Int pair = _mm512_or_si512(_mm512_and_si512(there, _mm512_set1_epi32(0x00780078)), _mm512_set1_epi32(0x41804180));
          V::store_int(reinterpret_cast<int32_t*>(to + h * 1024 + j * 64), pair);
        });
      });
    }
  } else {
    const int64_t of_tile = depth * 64;
    for (int64_t k = 0; k < t.steps; ++k, w += kPanel) {
      char* to = group.tiles + (2 * k / depth) * 4 * of_tile + (2 * k % depth) * 64;
      unroll<4>(SQPLUS_EACH(h) {
        const V::Int packed = V::load_int(w + h * V::width);
        V::store_int(reinterpret_cast<int32_t*>(to + h * of_tile), V::low_nibbles(packed));
        V::store_int(reinterpret_cast<int32_t*>(to + h * of_tile + 64), V::high_nibbles(packed));
      });
    }
  }
}

// y += (sums - zero point * the activations' sum) * scale, for so many rows and `count` output channels from `from` on.
template <class Dot, int count>
SQPLUS_INLINE void add_scaled(const Decoded& group, const float* of_x, int from, int rows, float* y) {
  unroll<count / V::width>(SQPLUS_EACH(h) {
    const int channel = from + h * V::width;
    const auto scale = V::load(group.scale + channel), zero = V::load(group.zero + channel);
    for (int r = 0; r < rows; ++r) {
      float* place = y + r * kPanel + channel;
      const auto sum = Dot::to_float(group.sums + r * kRow + channel * 4);
      V::store(place, V::fma(V::fnma(zero, V::broadcast(of_x[r]), sum), scale, V::load(place)));
    }
  });
}

template <class Dot>
void w4_tiles(int64_t blocks, const Block* block, const W4Tile& t) {
  constexpr bool pairs = std::is_same_v<Dot, Pairs16>;
  constexpr int none = pairs ? 8 + 16 : 8;
  Tiles shape;
  Decoded group;
  const int64_t length = t.steps * (pairs ? 4 : 2);  // of a row's activations, 32-bit numbers
  const int depth = length % kTileSteps ? 8 : kTileSteps;
  const int64_t tiles = length / depth, of_tile = depth * 64;
  for (int64_t first = 0; first < blocks; first += 2) {
    const int64_t end = std::min(first + 2, blocks);
    for (int64_t g = t.start; g < t.end; ++g) {
      take_scales<V, none>(t, g, &group);
      decode<Dot>(t, g, depth, group);
      for (int64_t b = first; b < end; ++b) {
        const Block& own = block[b];
        shape.take(own.rows, depth);
        float* y = t.y + (own.top - block->top) * kPanel;
        const float* of_x = static_cast<const float*>(t.sums) + g * t.rows + own.top;
        const char* next = reinterpret_cast<const char*>(t.weight + (g + 2) * t.steps * kPanel);
        const int64_t lines = t.steps * kStep / 64;
        const Operand x{static_cast<const char*>(t.x) + (g * t.rows + own.top) * length * 4, length * 4, depth * 4};
        const Operand w{group.tiles, 64, 4 * of_tile};
        if (own.rows <= kRows) {
          Coming coming{next, lines / tiles};
          unroll<4>(SQPLUS_EACH(tile) { zero<tile>(); });
          multiply_one<Dot>(x, w, of_tile, tiles, coming);
          each_sum<true>(group.sums, [](auto tile, char* at) { store<tile>(at, kRow); });
          add_scaled<Dot, kPanel>(group, of_x, 0, own.rows, y);
        } else {
          Coming coming{next, lines / tiles / 2 / (blocks > 1 ? 2 : 1)};
          for (int from = 0; from < kPanel; from += 2 * kChannels) {
            unroll<4>(SQPLUS_EACH(tile) { zero<tile>(); });
            multiply_two<Dot>(x, {w.at + from / kChannels * of_tile, w.row, w.next}, of_tile, tiles, coming);
            each_sum<false>(group.sums + from * 4, [](auto tile, char* at) { store<tile>(at, kRow); });
            add_scaled<Dot, 2 * kChannels>(group, of_x, from, own.rows, y);
          }
        }
      }
    }
  }
}

template <class Dot>
int64_t peak(int64_t iterations) {
  Tiles shape;
  shape.take(kBlock, kTileSteps);
  unroll<4>(SQPLUS_EACH(tile) { zero<tile>(); });
  alignas(64) static const char zeros[1024] = {};
  load<4>(zeros, 64), load<5>(zeros, 64), load<6>(zeros, 64), load<7>(zeros, 64);
  for (int64_t k = 0; k < iterations; ++k) {
    Dot::template multiply<0, 4, 6>();
    Dot::template multiply<1, 4, 7>();
    Dot::template multiply<2, 5, 6>();
    Dot::template multiply<3, 5, 7>();
  }
  return iterations * 4 * 2 * kRows * kChannels * 64 / static_cast<int64_t>(std::is_same_v<Dot, Integers> ? 1 : 2);
}

}  // namespace

bool amx_allowed() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: Linux gives each process tiles on request
  const bool here = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16");
  return here && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

Kernels with_amx(Kernels kernels) {
  kernels.name = "amx";
  kernels.rows = kBlock;
  kernels.at_once = kRows;
  kernels.panels = 8;
  kernels.tiles = true;
  kernels.w8 = w8_tiles<Integers>;
  kernels.bfloat16 = w8_tiles<Pairs16>;
  kernels.w4_bfloat16 = w4_tiles<Pairs16>;
  kernels.w4a8 = w4_tiles<Integers>;
  kernels.peak_int8 = peak<Integers>;
  kernels.peak_bfloat16 = peak<Pairs16>;
  return kernels;
}

}  // namespace sqplus
#endif
