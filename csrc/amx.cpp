// AMX: products of tiles, 16 rows of activations with 16 output channels, 64 int8 or 32 bfloat16 numbers deep. Sapphire Rapids and later.
#if defined(__x86_64__)
#define SQPLUS_BFLOAT16
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "avx512.h"

namespace sqplus {
namespace {

using V = Avx512;

// A block's rows lie in two tiles; where there are more than one has room for, output channels in two of four at a time.
constexpr int kRows = 16, kChannels = 16, kBlock = 2 * kRows;

#if defined(SQPLUS_EMULATE)
template <int tile>
void load(const char* from, int64_t stride) { emulated::tile_load(tile, from, stride); }
template <int tile>
void store(char* to, int64_t stride) { emulated::tile_store(tile, to, stride); }
template <int tile>
void zero() { emulated::tile_zero(tile); }
template <int sum, int x, int w>
void dot4() { emulated::tile_dot4(sum, x, w); }
template <int sum, int x, int w>
void dot2() { emulated::tile_dot2(sum, x, w); }
#else
// As assembly: the compiler's own take no template's numbers, and let other stores pass loads.
template <int tile>
SQPLUS_INLINE void load(const char* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
SQPLUS_INLINE void store(char* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
SQPLUS_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int sum, int x, int w>
SQPLUS_INLINE void dot4() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
}
template <int sum, int x, int w>
SQPLUS_INLINE void dot2() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
}
#endif

// Signed activations with unsigned weights, four at a time.
struct Integers {
  template <int sum, int x, int w>
  static SQPLUS_INLINE void multiply() { dot4<sum, x, w>(); }
  static SQPLUS_INLINE V::Float to_float(const void* sums) { return V::to_float(V::load_int(sums)); }
};

// The same, of a token's activations in fixed point: three rows, a piece each. The sums of pieces are put together in integers.
struct Pieces : Integers {};

// bfloat16, two at a time. Odd and even numbers are summed apart within a tile, then added to each other and to the sum.
struct Pairs16 {
  template <int sum, int x, int w>
  static SQPLUS_INLINE void multiply() { dot2<sum, x, w>(); }
  static SQPLUS_INLINE V::Float to_float(const void* sums) { return V::load(static_cast<const float*>(sums)); }
};

// What a thread's tiles are configured for: 0 to 3 are sums, 4 and 5 activations, the others weights. With up to 16 rows, sums are those of four times 16 output channels
// and 5 is weights; else those of the upper and the lower rows, two of each.
class Tiles {
 public:
  ~Tiles() {
#if !defined(SQPLUS_EMULATE)
    if (rows_) asm volatile("tilerelease");  // or the system would save 8 KB more of this thread whenever it gives way
#endif
  }
  void take(int rows, int depth) {
    if (rows == rows_ && depth == depth_) return;
    rows_ = rows, depth_ = depth;
    const bool one = rows <= kRows;
#if defined(SQPLUS_EMULATE)
    const auto set = emulated::tile_shape;
#else
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    const auto set = [&](int tile, int rows, int bytes) { shape.rows[tile] = static_cast<uint8_t>(rows), shape.bytes[tile] = static_cast<uint16_t>(bytes); };
#endif
    for (int tile = 0; tile < 4; ++tile) set(tile, one ? rows : tile < 2 ? kRows : rows - kRows, 64);
    set(4, one ? rows : kRows, depth * 4);
    one ? set(5, depth, 64) : set(5, rows - kRows, depth * 4);
    set(6, depth, 64), set(7, depth, 64);
#if !defined(SQPLUS_EMULATE)
    asm volatile("ldtilecfg %0" : : "m"(shape));
#endif
  }

 private:
  int rows_ = 0, depth_ = 0;
};

// Where an operand's first tile is, the bytes from one of its rows to the next, and those to the tile of the next input channels.
struct Operand {
  const char* at;
  int64_t row, next;
};

// What is done beside products: weights that are multiplied soon are fetched into the second-level cache, so many lines of 64 bytes a step.
struct Coming {
  const char* at;
  int64_t lines;
  SQPLUS_INLINE void step(int64_t) {
    for (int64_t i = 0; i < lines; ++i, at += 64) V::prefetch<false>(at);
  }
};

// On a core that another thread shares, loads and products of tiles wait for each other unless something else is between them, whatever it is.
SQPLUS_INLINE void between() {
#if !defined(SQPLUS_EMULATE)
  asm volatile("nop; nop; nop; nop; nop; nop; nop; nop");
#endif
}

// sums += x times w for up to 16 rows and all of a panel; `beside` bytes are between 16 output channels and the next. After each tile `aside` has its own step.
template <class Dot, class Aside>
SQPLUS_INLINE void multiply_one(Operand x, Operand w, int64_t beside, int64_t tiles, Aside& aside) {
  for (int64_t k = 0; k < tiles; ++k, x.at += x.next, w.at += w.next) {
    load<4>(x.at, x.row);
    between();
    load<5>(w.at, w.row);
    between();
    Dot::template multiply<0, 4, 5>();
    between();
    load<6>(w.at + beside, w.row);
    between();
    Dot::template multiply<1, 4, 6>();
    between();
    load<7>(w.at + 2 * beside, w.row);
    between();
    Dot::template multiply<2, 4, 7>();
    between();
    load<5>(w.at + 3 * beside, w.row);
    between();
    Dot::template multiply<3, 4, 5>();
    between();
    aside.step(k);
  }
}

// For more rows and 32 output channels: four products for four loads, which no other arrangement of eight tiles has. Weights that are `far`, in the second-level cache, are
// fetched into the first one a step before.
template <class Dot, bool far, class Aside>
SQPLUS_INLINE void multiply_two(Operand x, Operand w, int64_t beside, int64_t tiles, Aside& aside) {
  for (int64_t k = 0; k < tiles; ++k, x.at += x.next, w.at += w.next) {
    const auto fetch = [&](int eighth) __attribute__((always_inline)) {
      if (!far) return;
      between();
      for (int row = kRows / 8 * eighth; row < kRows / 8 * (eighth + 1); ++row) {
        for (int tile = 0; tile < 2; ++tile) V::prefetch<true>(w.at + w.next + row * w.row + tile * beside);
      }
    };
    load<6>(w.at, w.row);
    fetch(0);
    load<4>(x.at, x.row);
    fetch(1);
    Dot::template multiply<0, 4, 6>();
    fetch(2);
    load<7>(w.at + beside, w.row);
    fetch(3);
    Dot::template multiply<1, 4, 7>();
    fetch(4);
    load<5>(x.at + kRows * x.row, x.row);
    fetch(5);
    Dot::template multiply<2, 5, 6>();
    fetch(6);
    Dot::template multiply<3, 5, 7>();
    fetch(7);
    aside.step(k);
  }
}

// For up to 16 rows and 32 output channels.
template <class Dot, class Aside>
SQPLUS_INLINE void multiply_half(Operand x, Operand w, int64_t beside, int64_t tiles, Aside& aside) {
  for (int64_t k = 0; k < tiles; ++k, x.at += x.next, w.at += w.next) {
    load<4>(x.at, x.row);
    load<6>(w.at, w.row);
    Dot::template multiply<0, 4, 6>();
    load<7>(w.at + beside, w.row);
    Dot::template multiply<1, 4, 7>();
    aside.step(k);
  }
}

// With the tiles of sums, the address of each in memory whose rows are so many bytes apart.
template <bool one, class F>
SQPLUS_INLINE void each_sum(char* y, int64_t row, int rows, F&& f) {
  constexpr int64_t width = kChannels * 4;
  f(std::integral_constant<int, 0>{}, y);
  f(std::integral_constant<int, 1>{}, y + width);
  if (one || rows > kRows) {
    f(std::integral_constant<int, 2>{}, y + (one ? 2 * width : kRows * row));
    f(std::integral_constant<int, 3>{}, y + (one ? 3 * width : kRows * row + width));
  }
}

constexpr int64_t kRow = kPanel * 4, kAhead = 8192;

// Some steps of a chunk, which fill tiles of this depth; the `first` have no sums before them.
template <class Dot>
void w8_steps(const W8Tile& t, const Block& own, int64_t start, int64_t tiles, int depth, bool first, Tiles& shape, Coming& coming, char* y) {
  shape.take(own.rows, depth);
  const Operand x{reinterpret_cast<const char*>(t.x + start * t.rows + own.top * depth), depth * 4, t.rows * depth * 4};
  const Operand w{reinterpret_cast<const char*>(t.weight) + start * kStep, kStep, depth * kStep};
  const auto walk = [&](auto one, int from, auto&& multiply) __attribute__((always_inline)) {
    if (first) {
      unroll<4>(SQPLUS_EACH(tile) { zero<tile>(); });
    } else {
      each_sum<one>(y + from * 4, kRow, own.rows, [](auto tile, char* at) { load<tile>(at, kRow); });
    }
    multiply(x, Operand{w.at + from * 4, w.row, w.next}, kChannels * 4, tiles, coming);
    each_sum<one>(y + from * 4, kRow, own.rows, [](auto tile, char* at) { store<tile>(at, kRow); });
  };
  if (own.rows <= kRows) {
    walk(std::true_type{}, 0, multiply_one<Dot, Coming>);
  } else {
    for (int from = 0; from < kPanel; from += 2 * kChannels) walk(std::false_type{}, from, multiply_two<Dot, true, Coming>);
  }
}

template <class Dot>
void w8_tiles(int64_t blocks, const Block* block, const W8Tile& t) {
  Tiles shape;
  const int64_t whole = t.count / kTileSteps, rest = t.count % kTileSteps;
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t* y = t.y + (block[b].top - block->top) * kPanel;
    const int64_t walks = t.walks * (block[b].rows <= kRows ? 1 : 2), lines = kStep * kTileSteps / 64;
    // A single block's weights are read once: the next ones are not far.
    const char* next = t.walks == 1 ? reinterpret_cast<const char*>(t.weight) + t.start * kStep + kAhead : reinterpret_cast<const char*>(t.next) + t.count * kStep * (t.walk + b) / t.walks;
    Coming coming{next, (lines + walks - 1) / walks};
    const bool last = t.start + t.count == t.steps;
    if (last) fetch_results(t.results, block[b].top - block->top, block[b].rows);
    if (whole) w8_steps<Dot>(t, block[b], t.start, whole, kTileSteps, t.start == 0, shape, coming, reinterpret_cast<char*>(y));
    if (rest) w8_steps<Dot>(t, block[b], t.start + whole * kTileSteps, 1, static_cast<int>(rest), t.start + whole == 0, shape, coming, reinterpret_cast<char*>(y));
    if (!last || !std::is_same_v<Dot, Integers>) continue;
    for (int64_t r = 0; r < block[b].rows; ++r) {
      const auto first = V::broadcast_int(t.first[block[b].top + r]);
      for (int32_t* at = y + r * kPanel; at < y + (r + 1) * kPanel; at += V::width) V::store(reinterpret_cast<float*>(at), V::to_float(V::add_int(V::load_int(at), first)));
    }
  }
}

// Beside the products with a group of so many steps of eight input channels and a `width` of output channels, 4-bit weights have the sums of the ones before scaled, and
// the nibbles of the ones after taken out.
template <class Dot, int steps, int width>
struct Aside {
  static constexpr bool pairs = std::is_same_v<Dot, Pairs16>, pieces = std::is_same_v<Dot, Pieces>;
  static constexpr int vectors = width / V::width, rows_at_most = kBlock * kPanel / 2 / width;
  static constexpr int numbers = pairs ? 4 : 2;  // of 32 bits, for eight input channels
  static constexpr int length = steps * numbers, depth = static_cast<int>(tile_depth(length)), tiles = length / depth, of_tile = depth * 64;

  // Sums (rows, width) are added to y: (sums - zero point * the activations' sum) * scale.
  const FixedScales* group;
  int from;
  const void* of_x;  // float, or Fixed
  const char* sums;
  float* y;
  int rows = 0;
  // And nibbles become tiles: bfloat16 numbers, 16 more than they are, or bytes.
  const uint32_t* nibbles;
  char* to;
  int taken = 0, take_each = steps;
  Coming coming;

  SQPLUS_INLINE void step(int64_t k) {
    add(k);
    take();
    coming.step(k);
  }

  SQPLUS_INLINE void add(int64_t k) {
    constexpr int each = (rows_at_most + tiles - 1) / tiles;
    const int first = static_cast<int>(k) * each, end = std::min(first + each, rows);
    if (first >= end) return;
    [[maybe_unused]] V::Float scales[vectors], zeros[vectors];
    if constexpr (!pieces) unroll<vectors>(SQPLUS_EACH(h) { scales[h] = V::load(group->scale + from + h * V::width), zeros[h] = V::load(group->zero + from + h * V::width); });
    for (int r = first; r < end; ++r) {
      if constexpr (pieces) {
        const Fixed& x = static_cast<const Fixed*>(of_x)[r];
        unroll<vectors>(SQPLUS_EACH(h) {
          const auto sum = [&](int piece) { return V::load_int(sums + ((3 * r + piece) * width + h * V::width) * 4); };
          const int channel = h * V::width;
          add_to<V>(y + r * width, V::add_int(_mm512_slli_epi32(sum(0), 8), sum(1)), x.high, x.high_unit, *group, channel);
          add_to<V>(y + r * width, sum(2), x.low, x.low_unit, *group, channel);
        });
      } else {
        const auto all = V::broadcast(static_cast<const float*>(of_x)[r]);
        unroll<vectors>(SQPLUS_EACH(h) {
          const int at = r * width + h * V::width;
          V::store(y + at, V::fma(V::fnma(zeros[h], all, Dot::to_float(sums + at * 4)), scales[h], V::load(y + at)));
        });
      }
    }
  }

  SQPLUS_INLINE void take() {
    const int end = std::min(taken + take_each, steps);
    for (; taken < end; ++taken) {
      const uint32_t* w = nibbles + taken * kPanel;
      const uint32_t number = numbers * taken;
      char* first = to + number / depth * vectors * of_tile + number % depth * 64;
      unroll<vectors>(SQPLUS_EACH(h) {
        const V::Int packed = V::load_int(w + h * V::width);
        const auto put = [&](int number, V::Int made) __attribute__((always_inline)) { V::store_int(reinterpret_cast<int32_t*>(first + h * of_tile + number * 64), made); };
        if constexpr (pairs) {
          unroll<4>(SQPLUS_EACH(j) {
            const V::Int there = j == 0 ? _mm512_slli_epi32(packed, 3) : _mm512_srli_epi32(packed, 4 * j - 3);
            put(j, _mm512_or_si512(_mm512_and_si512(there, _mm512_set1_epi32(0x00780078)), _mm512_set1_epi32(0x41804180)));
          });
        } else {
          put(0, V::low_nibbles(packed));
          put(1, V::high_nibbles(packed));
        }
      });
    }
  }
};

// What is used again lies in the first-level cache: a half of a group's weights and the half after it, and the sums of a block. Activations and results come from the
// second-level cache.
template <class Dot, int steps, int width>
void w4_groups(int64_t blocks, const Block* block, const W4Tile& t) {
  using Own = Aside<Dot, steps, width>;
  constexpr int parts = kPanel / width;
  struct {
    alignas(64) char tiles[2][Own::tiles * Own::vectors * Own::of_tile];
    alignas(64) char sums[kBlock * kPanel / 2 * 4];
    FixedScales groups[3];  // the one before, this one, and the next one
  } room;
  Tiles shape;
  const int64_t turns = (t.end - t.start) * parts, all_rows = block[blocks - 1].top + block[blocks - 1].rows - block->top;
  const int ticks = static_cast<int>(blocks) * Own::tiles;
  const auto take = [&](int64_t turn) {
    const int64_t g = t.start + turn / parts;
    if (turn % parts == 0) {
      FixedScales* group = &room.groups[turn / parts % 3];
      if constexpr (Own::pieces) {
        take_fixed_scales<V>(t, g, group);
      } else {
        take_scales<V, Own::pairs ? 8 + 16 : 8>(t, g, group);
      }
    }
    return t.weight + g * steps * kPanel + turn % parts * width;
  };
  Own aside;
  aside.nibbles = take(0);
  aside.to = room.tiles[0];
  aside.take();
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t g = t.start + turn / parts, from = turn % parts * width;
    if (turn + 1 < turns) {
      aside.nibbles = take(turn + 1);
      aside.to = room.tiles[(turn + 1) % 2];
      aside.taken = 0;
      aside.take_each = (steps + ticks - 1) / ticks;
    }
    // A single block's weights are read once: the next ones are not far.
    const char* soon = reinterpret_cast<const char*>(blocks == 1 ? t.weight + g * steps * kPanel : t.next + (g - t.start) * steps * kPanel);
    constexpr int bytes = steps * kStep / parts;
    aside.coming = {soon + (blocks == 1 ? kAhead : 0) + turn % parts * bytes, (bytes / 64 + ticks - 1) / ticks};
    for (int64_t b = 0; b < blocks; ++b) {
      const Block& own = block[b];
      constexpr int each = Own::pieces ? 3 : 1;  // rows of a token
      if (turn == turns - parts && t.end == t.groups) fetch_results(t.results, own.top - block->top, own.rows);
      shape.take(own.rows * each, Own::depth);
      const Operand x{static_cast<const char*>(t.x) + (g * t.rows * Own::length + own.top * Own::depth) * each * 4, Own::depth * 4, t.rows * each * Own::depth * 4};
      const Operand w{room.tiles[turn % 2], 64, Own::vectors * Own::of_tile};
      unroll<4>(SQPLUS_EACH(tile) { zero<tile>(); });
      if constexpr (parts == 1) {
        multiply_one<Dot>(x, w, Own::of_tile, Own::tiles, aside);
      } else if (own.rows > kRows) {
        multiply_two<Dot, false>(x, w, Own::of_tile, Own::tiles, aside);
      } else {
        multiply_half<Dot>(x, w, Own::of_tile, Own::tiles, aside);
      }
      each_sum<parts == 1>(room.sums, width * 4, own.rows * each, [](auto tile, char* at) { store<tile>(at, width * 4); });
      aside.group = &room.groups[turn / parts % 3];
      aside.from = from;
      aside.of_x = static_cast<const char*>(t.sums) + (g * t.rows + own.top) * (Own::pieces ? sizeof(Fixed) : sizeof(float));
      aside.sums = room.sums;
      aside.y = t.y + from * all_rows + (own.top - block->top) * width;
      aside.rows = own.rows;
    }
    aside.take_each = steps;
    aside.take();
  }
  aside.coming.lines = 0;
  for (int k = 0; k < Own::tiles; ++k) aside.step(k);
}

template <class Dot, int width>
void w4_width(int64_t blocks, const Block* block, const W4Tile& t) {
  switch (t.steps) {
    case 4: return w4_groups<Dot, 4, width>(blocks, block, t);
    case 8: return w4_groups<Dot, 8, width>(blocks, block, t);
    case 12: return w4_groups<Dot, 12, width>(blocks, block, t);
    case 16: return w4_groups<Dot, 16, width>(blocks, block, t);
  }
}

template <class Dot>
void w4_tiles(int64_t blocks, const Block* block, const W4Tile& t) {
  t.width == kPanel ? w4_width<Dot, kPanel>(blocks, block, t) : w4_width<Dot, kPanel / 2>(blocks, block, t);
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
#if defined(SQPLUS_EMULATE)
  return true;
#endif
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
  kernels.w4_few = w4_width<Pieces, kPanel>;
  kernels.peak_int8 = peak<Integers>;
  kernels.peak_bfloat16 = peak<Pairs16>;
  return kernels;
}

}  // namespace sqplus
#endif
