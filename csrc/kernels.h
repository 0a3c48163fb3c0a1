// What an instruction set offers: products of a few rows of activations with a panel of 64 output channels, and passes over rows.
//
// Packed integers are the same for all of them, so that a machine's level can be lowered at run time:
//   W8  [panel][K / 4][64 channels][4]  uint8, 128 added; the input channels of four at a time next to each other
//   W4  [panel][K / 8][64 channels]     uint32, eight unsigned nibbles each; input channel e of the eight lies at bit nibble_shift(e)
//   bfloat16: [panel][K / 2][64 channels][2]
// K is padded with zeros to a multiple of 4, 8 or 2, N to a multiple of 64.
#pragma once

#include <cstdint>

namespace sqplus {

constexpr int kPanel = 64;

// Even channels in the lower half and odd ones in the upper: what is under the mask 0x000f000f are two neighbours for a 16-bit product, or for a 16-bit
// table look-up; the bytes under 0x0f0f0f0f are four channels for an 8-bit dot product (kByteOrder), those under 0xf0f0f0f0 the other four.
constexpr int nibble_shift(int e) { return (e / 2) * 4 + (e % 2) * 16; }
constexpr int kByteOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};

enum class Type { kFloat, kBFloat16, kHalf };

// Bytes of a panel's weights at a step: four input channels in W8, eight in W4, two in bfloat16.
constexpr int64_t kStep = kPanel * 4;

// W8 and bfloat16 panels are gone through in chunks that stay in the second-level cache while all blocks of rows use them, and the next one is fetched.
constexpr int64_t kChunk = 256;  // steps: 64 KB
// Where panels take turns, sums are kept in memory between chunks: these are longer. W4 panels have chunks of groups.
constexpr int64_t kTilesChunk = 512, kGroups = 8;

// Some rows that are multiplied together, of which the first is row `top`.
struct Block {
  int64_t top;
  int rows;
};

// What was taken off of a row's activations, and is multiplied apart.
struct Rest {
  int32_t x;   // four int8 (W8), or a pair of int16 (W4)
  int32_t at;  // of which step (W8), or which of a group's pairs (W4)
};

// Tiles of AMX hold so many fours or pairs of a row at most. Those of a group fill tiles of equal depth.
constexpr int64_t kTileSteps = 16;
constexpr int64_t tile_depth(int64_t of_group) { return of_group % kTileSteps ? 8 : kTileSteps; }

// Where a panel's results are written in the end: so many bytes a row, each row `stride` bytes after the one before.
struct Results {
  char* at;
  int64_t stride, bytes;
};

struct W8Tile {
  const int32_t* x;       // (parts, rows, steps of the part): four int8 activations each, or two of bfloat16
  int64_t rows;           // of all blocks
  int64_t steps;          // K / 4, or K / 2
  int64_t start, count;   // the steps of this chunk, which is one part, or several of kTileSteps each
  const uint8_t* weight;  // one panel
  const uint8_t* next;    // the chunk that is multiplied next
  int64_t walk, walks;    // how many blocks of rows were multiplied with the chunk before these, and are in all
  const int32_t* first;   // (rows): what a row's sums start from, -128 times all of its activations: the weights have 128 too much; 0 for bfloat16
  const Rest* rest;       // (rows, steps): by Kernels::cut, where there is one
  const int32_t* rests;   // (rows): how many
  int32_t* y;             // (rows of these blocks, 64): the integer sums, of all chunks up to this one; in the end float32
  Results results;        // of these blocks
};

// x in fixed point: two pieces of each number, int16, whose products with nibbles integer instructions add up exactly. A number is high * 256 + low, of 23 bits
// and a sign, times a power of two that a row's channels of a group share. Most low pieces of bfloat16 and float16 numbers are zero, so of those the high pieces are
// multiplied, and pairs of low ones where one is not zero apart.
constexpr int fixed_rows(int pieces) { return pieces == 1 ? 6 : 3; }  // the most rows of a block of these

constexpr int64_t kFewTokens = 5;  // three pieces each, in a tile of 16 rows

struct Fixed {
  int32_t high, low;          // sums over the channels of the group
  int32_t rests;              // how many pairs of low pieces are multiplied apart
  float high_unit, low_unit;  // powers of two; NaN where a number is not finite
};

struct W4Tile {
  const void* x;             // (groups, rows, channels of the group): float32, pairs of bfloat16, or four int8 in kByteOrder; in fixed
                             // point pairs of int16 for each piece, the high one first. For tiles (groups, tiles, rows, tile_depth)
  const void* sums;          // (groups, rows): the activations of each group added up, float32; in fixed point Fixed
  int pieces;                // 2, or 1 and
  const Rest* rest;          // (groups, rows, pairs of the group)
  int64_t rows;              // of all blocks
  int64_t groups;
  int64_t start, end;        // the groups of this chunk
  int64_t steps;             // of eight input channels, in a group: 4, 8, 12 or 16
  const uint32_t* weight;    // one panel
  const uint32_t* next;      // the chunk that is multiplied next
  Type scale_type;
  const void* scale;         // (groups, 64)
  const int8_t* zero_point;  // (groups, 64), or null where all are 0
  float* y;                  // (64 / width, rows of these blocks, width): what is added to
  int64_t width;             // 64; with tiles and more than 16 rows 32
  Results results;           // of these blocks
};

struct Kernels {
  const char* name;
  int rows;     // the most rows of a block, where there are several
  int at_once;  // and where it is the only one: with sums for all of a panel's channels in registers, so that each weight is read once
  int panels;   // how many panels take turns, chunk by chunk, so that activations stay in the second-level cache
  bool tiles;   // whether activations of integers and bfloat16 numbers lie as tiles take them

  void (*w8)(int64_t blocks, const Block*, const W8Tile&);
  void (*bfloat16)(int64_t blocks, const Block*, const W8Tile&);
  void (*w4)(int64_t blocks, const Block*, const W4Tile&);  // x float32, or in fixed point where there is fix
  void (*w4_bfloat16)(int64_t blocks, const Block*, const W4Tile&);  // null where there is no such product
  void (*w4a8)(int64_t blocks, const Block*, const W4Tile&);  // x int8
  void (*w4_few)(int64_t blocks, const Block*, const W4Tile&);  // of kFewTokens at most, with what w4 in fixed point gives: x as three int8 pieces. Null, as above

  void (*read)(Type, const void* x, int64_t count, float* to);
  float (*absolute_maximum)(const float* x, int64_t count);  // NaN where there is one
  float (*sum)(const float* x, int64_t count);  // of a multiple of 32
  float (*sum_bfloat16)(const void* x, int64_t count);  // where there is w4_bfloat16
  int32_t (*quantize)(const float* x, int64_t count, float largest, float scale, int8_t* to);  // `largest` absolute value; returns what they add up to
  // For products that saturate: cuts fours that could in two, of a row's x from step `start` on. Their rests are appended to `rest`. Returns how many. Null
  // where none do.
  int32_t (*cut)(int64_t start, int64_t steps, int32_t* x, Rest* rest);
  // A group of x, a multiple of 32 and at most 128 channels, in fixed point: two channels a number, `pieces` numbers for each two. Null where w4 takes float32.
  void (*fix)(const float* x, int64_t count, int pieces, int32_t* to, Rest* rest, Fixed*);
  // x becomes exp(x - largest), with the largest of them; returns what they add up to. `count` is a multiple of 16. Of nothing but -infinity zeros, and 0.
  float (*softmax)(float* x, int64_t count, float* largest);
  void (*cap)(float* x, int64_t count, float cap);  // x becomes cap * tanh(x / cap)
  void (*add)(const float* x, int64_t count, float scale, float* to);  // += x * scale
  // y * row_scale * scale + bias; scale and bias may be null.
  void (*write)(Type, const float* y, int64_t count, float row_scale, const float* scale, const float* bias, void* to);

  // What the machine can do, for benchmarks. The peaks return how many operations they have done (0: there is no such instruction).
  int64_t (*read_memory)(const void* from, int64_t bytes);
  int64_t (*peak_int8)(int64_t iterations);
  int64_t (*peak_float32)(int64_t iterations);
  int64_t (*peak_bfloat16)(int64_t iterations);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
// kAvx512's w8 for processors whose own prefetching does not keep up with several rows.
void w8_ahead_avx512(int64_t blocks, const Block*, const W8Tile&);
// What the level avx512_bf16 has beyond kAvx512.
void bfloat16_avx512(int64_t blocks, const Block*, const W8Tile&);
void w4_bfloat16_avx512(int64_t blocks, const Block*, const W4Tile&);
float sum_bfloat16_avx512(const void* x, int64_t count);
int64_t peak_bfloat16_avx512(int64_t iterations);
// Whether the processor has AMX and the system lets this process use it; and that level's kernels with AMX's products.
bool amx_allowed();
Kernels with_amx(Kernels);
#endif

}  // namespace sqplus
