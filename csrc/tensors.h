// What the files with torch ops share: tensors seen as memory, rows in blocks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"

namespace sqplus {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Of the level that was chosen; and, where that has tiles, of the one below, for products so small that setting tiles up would take as long.
const Kernels& kernels_in_use();
const Kernels& vectors_in_use();

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kHalf;
    default: STD_TORCH_CHECK(false, "float32, bfloat16 or float16 is needed");
  }
  return Type::kFloat;
}

inline int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Not initialized, unlike a vector.
template <class T>
std::unique_ptr<T[]> room(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// M rows in blocks of nearly equal size, each of at most `most` rows.
inline std::vector<Block> blocks_of(int64_t rows, int64_t most) {
  const int64_t count = (rows + most - 1) / most;
  std::vector<Block> blocks;
  for (int64_t i = 0, top = 0; i < count; top += blocks.back().rows, ++i) blocks.push_back({top, static_cast<int>((rows - top) / (count - i))});
  return blocks;
}

inline int64_t most_rows(const Kernels& kernels, int64_t rows) { return rows <= kernels.at_once ? kernels.at_once : kernels.rows; }

inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.sizes().size(); ++i) rows *= x.sizes()[i];
  return rows;
}

inline Tensor result_for(const Tensor& x, int64_t channels) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = channels;
  return torch::stable::new_empty(x, sizes);
}

// What the scale of an activation is whose row, or all of which, has this largest absolute value. NaN where that is NaN, or infinite and no given scale clips it, so that
// the results are too.
inline float scale_of(float largest, const float* given) {
  if (!(largest <= (given ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::max()))) return std::numeric_limits<float>::quiet_NaN();
  return given ? *given : largest == 0 ? 1.0f : largest / 127.0f;
}

}  // namespace sqplus
