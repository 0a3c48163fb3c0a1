// What an instruction set offers: two tiles, each of a few rows of activations and a panel of 64 output channels.
//
// Packed weights are the same for all of them, so that a machine's level can be lowered at run time:
//   W8  [panel][K / 4][64 channels][4]  int8, the input channels of four at a time next to each other
//   W4  [panel][K / 8][64 channels]     uint32, eight unsigned nibbles each; input channel e of the eight lies at bit nibble_shift(e)
// K is padded with zeros to a multiple of 4 or 8, N to a multiple of 64.
#pragma once

#include <cstdint>

namespace sqplus {

constexpr int kPanel = 64;

// Even channels in the lower half and odd ones in the upper: two neighbours are then one lane of a 16-bit table look-up.
constexpr int nibble_shift(int e) { return (e / 2) * 4 + (e % 2) * 16; }

struct W8Tile {
  const int32_t* x;         // (K / 4, rows): four int8 activations each
  int64_t steps;            // K / 4
  const int8_t* weight;     // one panel
  const int32_t* correction;  // (64): 128 times the sum of each channel's weights, for kernels with unsigned_x
  float* y;                 // (rows, 64): the integer sums as float32
};

struct W4Tile {
  const float* x;           // (K, rows)
  const float* sums;        // (groups, rows): the activations of each group added up
  int64_t groups;
  int64_t steps;            // of eight input channels, in a group
  const uint32_t* weight;   // one panel
  const float* scale;       // (groups, 64)
  const float* zero;        // (groups, 64): what a nibble that stands for zero is
  float* y;                 // (rows, 64)
};

struct Kernels {
  const char* name;
  int rows;                              // the most rows that a tile takes
  bool unsigned_x;                       // whether x has 128 added (as uint8), for which the weights' sums are subtracted again
  void (*w8)(int rows, const W8Tile&);
  void (*w4)(int rows, const W4Tile&);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace sqplus
