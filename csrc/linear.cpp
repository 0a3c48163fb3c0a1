// Linear layers: inputs checked, activations prepared, panels handed to threads. Written against PyTorch's stable ABI (2.10), so that one build
// serves later versions too; threads are torch's own.
//
// Each number of a result is computed by one thread, in an order that depends neither on how many threads there are nor on the rows beside it
// (but for W4A16 with AMX: docs/add-a-kernel.md).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "tensors.h"

namespace sqplus {
namespace {

// Rows whose numbers are laid out together, so that what is written lies side by side; and steps of four channels that are read together.
constexpr int64_t kRowsAtOnce = 16, kPiece = 256;

// Copies `rows` rows of so many steps, side by side in `from`, to the rows from `top` on of each part of `to`: (parts, m rows, steps of the part).
void lay_out(const int32_t* from, int64_t rows, int64_t steps, int64_t part, int64_t top, int64_t m, int32_t* to) {
  for (int64_t start = 0; start < steps; start += part) {
    const int64_t count = std::min(part, steps - start);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + start * m + (top + r) * count, from + r * steps + start, count * 4);
  }
}

// Rows of x as integers.
struct Integers {
  std::vector<float> scales;         // (rows)
  std::unique_ptr<int32_t[]> fours;  // (parts, rows, steps of the part): four channels each
  std::vector<int32_t> sums;         // (groups, rows)
};

// In parts of `part` steps of four channels, and sums of groups of `group` of those. The scales are `given`, or by the largest absolute value of a row or of all.
Integers integers_of(const Kernels& kernels, const Tensor& x, int64_t k, int64_t steps, int64_t part, int64_t group, bool per_token, const float* given) {
  const int64_t m = rows_of(x), groups = (steps + group - 1) / group;
  Integers made{std::vector<float>(m), room<int32_t>(m * steps), std::vector<int32_t>(groups * m)};
  const char* values = static_cast<const char*>(x.data_ptr());
  const Type type = type_of(x);
  // A row is read in pieces, which stay in the first-level cache as float32: of whole groups, or within one.
  const int64_t piece = group < kPiece ? kPiece / group * group : kPiece;
  const auto each_piece = [&](int64_t i, float* numbers, auto&& work) {
    for (int64_t start = 0; start < steps; start += piece) {
      const int64_t count = std::min(piece, steps - start) * 4, given = std::min(count, k - start * 4);
      kernels.read(type, values + (i * k + start * 4) * size_of(type), given, numbers);
      std::fill(numbers + given, numbers + count, 0.0f);
      work(start, count);
    }
  };
  const auto largest_of = [&](int64_t i, float* numbers) {
    std::vector<float> each;
    each_piece(i, numbers, [&](int64_t, int64_t count) { each.push_back(kernels.absolute_maximum(numbers, count)); });
    return kernels.absolute_maximum(each.data(), each.size());
  };
  const bool of_all = !per_token && !given;
  if (of_all) {
    parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      const auto numbers = room<float>(piece * 4);
      for (int64_t i = begin; i < end; ++i) made.scales[i] = largest_of(i, numbers.get());
    });
    std::fill(made.scales.begin(), made.scales.end(), kernels.absolute_maximum(made.scales.data(), m));
  }
  parallel_for(0, (m + kRowsAtOnce - 1) / kRowsAtOnce, 1, [&](int64_t begin, int64_t end) {
    const auto numbers = room<float>(piece * 4);
    const auto integers = room<int32_t>(std::min(m, kRowsAtOnce) * steps);
    for (int64_t top = begin * kRowsAtOnce; top < std::min(m, end * kRowsAtOnce); top += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, m - top);
      for (int64_t i = top; i < top + rows; ++i) {
        const float largest = of_all ? made.scales[i] : largest_of(i, numbers.get());
        made.scales[i] = scale_of(largest, given);
        each_piece(i, numbers.get(), [&](int64_t start, int64_t count) {
          int8_t* to = reinterpret_cast<int8_t*>(integers.get() + (i - top) * steps + start);
          const int64_t each = std::min(group * 4, count);
          for (int64_t from = 0; from < count; from += each) {
            made.sums[(start + from / 4) / group * m + i] += kernels.quantize(numbers.get() + from, std::min(each, count - from), largest, made.scales[i], to + from);
          }
        });
      }
      lay_out(integers.get(), rows, steps, part, top, m, made.fours.get());
    }
  });
  return made;
}

// Calls work(first panel, panels, blocks, first block) for all panels, at most `most` at a time, and blocks of rows, in parallel.
template <class Work>
void for_panels(int64_t panels, int64_t most, const std::vector<Block>& blocks, Work&& work) {
  // Where there are hardly more panels than threads, each panel's rows are divided too, but not into few: weights are read for each part.
  const int64_t threads = torch::stable::get_num_threads(), count = blocks.size();
  // And where several panels take turns, so that all they share stays in the second-level cache.
  const int64_t for_threads = std::min(count / 8, (4 * threads + panels - 1) / panels), for_cache = most > 1 ? (count + 7) / 8 : 1;
  const int64_t parts = std::max<int64_t>({1, for_threads, for_cache});
  const int64_t at_once = std::max<int64_t>(1, std::min(most, panels / (4 * threads))), turns = (panels + at_once - 1) / at_once;
  parallel_for(0, turns * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / parts * at_once, first = item % parts * count / parts, last = (item % parts + 1) * count / parts;
      work(panel, std::min(at_once, panels - panel), last - first, blocks.data() + first);
    }
  });
}

// Calls work(panel, from, to, next panel, next from) for all panels, chunk by chunk of so many steps or groups.
template <class Work>
void in_turn(int64_t panels, int64_t steps, int64_t chunk, Work&& work) {
  for (int64_t start = 0; start < steps || start == 0; start += chunk) {
    const int64_t end = std::min(start + chunk, steps);
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (panel + 1 < panels) {
        work(panel, start, end, panel + 1, start);
      } else if (end < steps) {
        work(panel, start, end, 0, end);
      } else {
        work(panel, start, end, panels, 0);
      }
    }
  }
}

// Where results go: y (M, N) in memory.
struct Result {
  char* data;
  Type type;
  int64_t n;
  Result(const Tensor& y, int64_t n) : data(static_cast<char*>(y.data_ptr())), type(type_of(y)), n(n) {}
};

// A panel's output channels, for the rows of some blocks.
struct Panel {
  int64_t first, channels, top, rows;
  Panel(int64_t panel, int64_t n, int64_t count, const Block* block)
      : first(panel * kPanel), channels(std::min<int64_t>(kPanel, n - first)), top(block->top),
        rows(block[count - 1].top + block[count - 1].rows - top) {}
  Results results(const Result& y) const { return {row(y, 0), y.n * size_of(y.type), channels * size_of(y.type)}; }
  // Where the results of its row r are.
  char* row(const Result& y, int64_t r) const { return y.data + ((top + r) * y.n + first) * size_of(y.type); }
  // The sums (64 / width, rows, width), times a scale of each row and one of each output channel, plus its bias; all three for all rows and channels, or null.
  void write(const Kernels& kernels, const float* sums, int64_t width, const float* row_scales, const float* scale, const float* bias, const Result& y) const {
    for (int64_t from = 0; from < channels; from += width) {
      const int64_t at = first + from, count = std::min(width, channels - from);
      for (int64_t r = 0; r < rows; ++r) {
        kernels.write(y.type, sums + from * rows + r * width, count, row_scales ? row_scales[top + r] : 1.0f, scale ? scale + at : nullptr, bias ? bias + at : nullptr,
                      row(y, r) + from * size_of(y.type));
      }
    }
  }
};

// A bias in float32, or null.
std::unique_ptr<float[]> floats_of(const Kernels& kernels, const std::optional<Tensor>& given, int64_t count) {
  if (!given) return nullptr;
  STD_TORCH_CHECK(given->numel() == count && given->is_contiguous(), "the bias does not fit the weight");
  auto floats = room<float>(count);
  kernels.read(type_of(*given), given->data_ptr(), count, floats.get());
  return floats;
}

// y (M, N) = the products of prepared activations with all panels, from the `tile` of the first one, times the scales, + bias: as Panel::write has them.
void multiply(const Kernels& kernels, decltype(Kernels::w8) product, const W8Tile& tile, int64_t chunk, const std::vector<Block>& blocks, const float* row_scales,
              const float* scale, const float* bias, const Tensor& y) {
  const int64_t n = y.sizes().back();
  const Result result(y, n);
  for_panels(round_up(n, kPanel) / kPanel, kernels.panels, blocks, [&](int64_t first, int64_t panels, int64_t count, const Block* block) {
    const int64_t length = Panel(first, n, count, block).rows * kPanel;
    const auto sums = room<int32_t>(panels * length);
    if (tile.steps == 0) std::fill_n(sums.get(), panels * length, 0);
    in_turn(panels, tile.steps, chunk, [&](int64_t panel, int64_t start, int64_t end, int64_t next, int64_t next_start) {
      // With tiles, each block's results are written while the first-level cache has their sums.
      const bool last = end == tile.steps;
      const int64_t each = last && kernels.tiles ? 1 : count;
      for (int64_t b = 0; b < count; b += each) {
        const Panel own(first + panel, n, each, block + b);
        W8Tile t = tile;
        t.next = t.weight + ((first + next) * t.steps + next_start) * kStep;
        t.weight += (first + panel) * t.steps * kStep;
        t.start = start, t.count = end - start;
        t.walk = b, t.walks = count;
        t.y = sums.get() + (chunk < t.steps ? panel * length + (own.top - block->top) * kPanel : 0);
        t.results = own.results(result);
        if (t.steps > 0) product(each, block + b, t);
        if (last) own.write(kernels, reinterpret_cast<const float*>(t.y), kPanel, row_scales, scale, bias, result);
      }
    });
  });
}

// How many steps of a panel are multiplied with m rows before the next ones are: all of them where one block of rows is all.
int64_t chunk_of(const Kernels& kernels, int64_t m, int64_t steps) {
  return m <= kernels.at_once ? std::max<int64_t>(steps, 1) : kernels.tiles ? kTilesChunk : kChunk;
}

// x (..., K) in float -> (..., N): y = (int(x) @ weight.T) * input scale * weight_scale + bias. `weight_scale` float32 (N,), `input_scale` float32
// (1,) when it is static, `bias` (N,) in float.
Tensor cpu_w8a8(const Tensor& given, const Tensor& packed, const Tensor& weight_scale, bool per_token,
                const std::optional<Tensor>& input_scale, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(given.dim() > 0, "x has no input channels");
  const Tensor x = torch::stable::contiguous(given);
  const Kernels& kernels = kernels_in_use();
  const int64_t k = x.sizes().back(), m = rows_of(x), n = weight_scale.numel(), steps = round_up(k, 4) / 4;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == round_up(n, kPanel) * steps * 4,
                  "the packed weight does not fit x and the scales");
  STD_TORCH_CHECK(weight_scale.scalar_type() == ScalarType::Float && weight_scale.is_contiguous() &&
                      (!input_scale || (input_scale->scalar_type() == ScalarType::Float && input_scale->numel() == 1)),
                  "float32 scales are needed, and one of the input at most");
  const auto offset = floats_of(kernels, bias, n);
  Tensor y = result_for(x, n);
  if (m == 0 || n == 0) return y;

  const std::vector<Block> blocks = blocks_of(m, most_rows(kernels, m));
  const int64_t chunk = chunk_of(kernels, m, steps), part = kernels.tiles ? kTileSteps : chunk;
  Integers integers = integers_of(kernels, x, k, steps, part, std::max<int64_t>(steps, 1), per_token, input_scale ? static_cast<const float*>(input_scale->data_ptr()) : nullptr);
  std::vector<int32_t> first(m);
  for (size_t i = 0; i < integers.sums.size(); ++i) first[i] = -128 * integers.sums[i];
  const auto rest = room<Rest>(kernels.cut ? m * steps : 0);
  std::vector<int32_t> rests(kernels.cut ? m : 0);
  if (kernels.cut) {
    parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t start = 0; start < steps; start += part) {
          const int64_t count = std::min(part, steps - start);
          rests[i] += kernels.cut(start, count, integers.fours.get() + start * m + i * count, rest.get() + i * steps + rests[i]);
        }
      }
    });
  }

  const W8Tile tile{integers.fours.get(), m, steps, 0, 0, static_cast<const uint8_t*>(packed.data_ptr()), nullptr, 0, 0, first.data(), rest.get(), rests.data(), nullptr, {}};
  multiply(kernels, kernels.w8, tile, chunk, blocks, integers.scales.data(), static_cast<const float*>(weight_scale.data_ptr()), offset.get(), y);
  return y;
}

// x (..., K) bfloat16 -> (..., N) bfloat16: y = x @ weight.T + bias, with sums in float32. `bias` (N,) in float.
Tensor cpu_bfloat16(const Tensor& given, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n) {
  STD_TORCH_CHECK(given.dim() > 0 && given.scalar_type() == ScalarType::BFloat16, "bfloat16 activations are needed");
  const Tensor x = torch::stable::contiguous(given);
  const Kernels& kernels = kernels_in_use();
  const int64_t k = x.sizes().back(), m = rows_of(x), steps = round_up(k, 2) / 2;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Int && packed.is_contiguous() && packed.numel() == round_up(n, kPanel) * steps,
                  "the packed weight does not fit x");
  const auto offset = floats_of(kernels, bias, n);
  Tensor y = result_for(x, n);
  if (m == 0 || n == 0) return y;

  const std::vector<Block> blocks = blocks_of(m, most_rows(kernels, m));
  const int64_t chunk = chunk_of(kernels, m, steps), part = kernels.tiles ? kTileSteps : chunk;
  const auto pairs = room<int32_t>(m * steps);
  const char* values = static_cast<const char*>(x.data_ptr());
  parallel_for(0, (m + kRowsAtOnce - 1) / kRowsAtOnce, 1, [&](int64_t begin, int64_t end) {
    const auto rows = room<int32_t>(std::min(m, kRowsAtOnce) * steps);
    for (int64_t top = begin * kRowsAtOnce; top < std::min(m, end * kRowsAtOnce); top += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, m - top);
      for (int64_t i = 0; i < count && steps > 0; ++i) {
        rows[(i + 1) * steps - 1] = 0;  // where K is odd
        std::memcpy(rows.get() + i * steps, values + (top + i) * k * 2, k * 2);
      }
      lay_out(rows.get(), count, steps, part, top, m, pairs.get());
    }
  });
  const std::vector<int32_t> first(m);
  const W8Tile tile{pairs.get(), m, steps, 0, 0, static_cast<const uint8_t*>(packed.data_ptr()), nullptr, 0, 0, first.data(), nullptr, nullptr, nullptr, {}};
  multiply(kernels, kernels.bfloat16, tile, chunk, blocks, nullptr, nullptr, offset.get(), y);
  return y;
}

// What the products with 4-bit weights share: the weight, its checks, and the loop over panels.
struct Weight4 {
  const Kernels& kernels;
  int64_t k, n, panels, groups, steps;
  W4Tile tile;

  Weight4(const Kernels& kernels, const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t n)
      : kernels(kernels), k(x.sizes().back()), n(n), panels(round_up(n, kPanel) / kPanel), groups(scale.dim() == 3 ? scale.size(1) : 0) {
    STD_TORCH_CHECK(groups > 0 && k > 0 && k % (groups * 32) == 0 && k / groups <= 128 && packed.scalar_type() == ScalarType::Int &&
                        packed.is_contiguous() && packed.numel() == panels * kPanel * k / 8 && scale.is_contiguous() &&
                        scale.numel() == panels * groups * kPanel &&
                        (!zero_point || (zero_point->scalar_type() == ScalarType::Char && zero_point->is_contiguous() &&
                                         zero_point->numel() == scale.numel())),
                    "the packed weight does not fit x and the scales");
    steps = k / groups / 8;
    tile = {};
    tile.rows = rows_of(x);
    tile.groups = groups;
    tile.steps = steps;
    tile.scale_type = type_of(scale);
    tile.scale = scale.data_ptr();
    tile.weight = static_cast<const uint32_t*>(packed.data_ptr());
    tile.zero_point = zero_point ? static_cast<const int8_t*>(zero_point->data_ptr()) : nullptr;
  }

  // y = product of the prepared activations in `tile` with the weight, times a scale of each row if there are any, + bias.
  void multiply(const std::vector<Block>& blocks, decltype(Kernels::w4) product, const float* row_scales, const float* bias, const Tensor& y) const {
    const Result result(y, n);
    const bool tiles = kernels.tiles && product != kernels.w4;
    const int most = tiles && blocks.size() > 1 ? kernels.panels : 1;
    for_panels(panels, most, blocks, [&](int64_t first, int64_t turns, int64_t count, const Block* block) {
      const int64_t length = Panel(first, n, count, block).rows * kPanel, of_panel = kPanel * (k / 8);
      std::vector<float> sums(turns * length);  // zeros
      in_turn(turns, groups, most == 1 ? groups : kGroups, [&](int64_t panel, int64_t start, int64_t end, int64_t next, int64_t next_start) {
        const Panel own(first + panel, n, count, block);
        W4Tile t = tile;
        t.next = t.weight + (first + next) * of_panel + next_start * steps * kPanel;
        t.weight += (first + panel) * of_panel;
        t.scale = static_cast<const char*>(t.scale) + (first + panel) * groups * kPanel * size_of(t.scale_type);
        if (t.zero_point) t.zero_point += (first + panel) * groups * kPanel;
        t.start = start, t.end = end;
        t.width = tiles && t.rows > kernels.at_once ? kPanel / 2 : kPanel;
        t.y = sums.data() + panel * length;
        t.results = own.results(result);
        product(count, block, t);
        if (end == groups) own.write(kernels, t.y, t.width, row_scales, nullptr, bias, result);
      });
    });
  }
};

// y = the product of x, of a few tokens, with the weight: each number in three pieces of 8 bits, which are rows of their own: (groups, tiles, tokens, 3, tile_depth).
void few_tokens(Weight4& weight, const Tensor& x, const float* bias, const Tensor& y) {
  const Kernels& kernels = weight.kernels;
  const int64_t k = weight.k, m = rows_of(x), groups = weight.groups, group_size = k / groups, depth = tile_depth(group_size / 4) * 4;
  const auto pieces = room<int8_t>(3 * m * k);
  const auto sums = room<Fixed>(m * groups);
  const Type type = type_of(x);
  const auto row = room<float>(k);
  for (int64_t i = 0; i < m; ++i) {
    kernels.read(type, static_cast<const char*>(x.data_ptr()) + i * k * size_of(type), k, row.get());
    for (int64_t g = 0; g < groups; ++g) {
      int16_t numbers[2 * 128];  // of two channels the high pieces, then the low ones
      kernels.fix(row.get() + g * group_size, group_size, 2, reinterpret_cast<int32_t*>(numbers), nullptr, &sums[g * m + i]);
      for (int64_t at = 0; at < group_size; ++at) {
        const int64_t channel = at / 8 * 8 + kByteOrder[at % 8], number = channel / 2 * 4 + channel % 2;
        const int8_t middle = static_cast<int8_t>(numbers[number]);
        int8_t* to = pieces.get() + ((g * group_size + at / depth * depth) * m + i * depth) * 3 + at % depth;
        to[0] = static_cast<int8_t>((numbers[number] - middle) >> 8);
        to[depth] = middle;
        to[2 * depth] = static_cast<int8_t>(numbers[number + 2]);
      }
    }
  }
  weight.tile.x = pieces.get();
  weight.tile.sums = sums.get();
  weight.multiply({{0, static_cast<int>(m)}}, kernels.w4_few, nullptr, bias, y);
}

// x (..., K) in float -> (..., N): y = x @ ((nibble - 8 - zero_point) * scale).T + bias. `scale` in any float dtype and `zero_point` int8 are
// (panels, groups, 64), `bias` (N,) in float.
Tensor cpu_w4a16(const Tensor& given, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point,
                 const std::optional<Tensor>& bias, int64_t n) {
  STD_TORCH_CHECK(given.dim() > 0, "x has no input channels");
  const Tensor x = torch::stable::contiguous(given);
  const Kernels& kernels = kernels_in_use();
  Weight4 weight(kernels, x, packed, scale, zero_point, n);
  const int64_t k = weight.k, m = rows_of(x), groups = weight.groups, group_size = k / groups;
  const Type type = type_of(x);
  const auto offset = floats_of(kernels, bias, n);
  Tensor y = result_for(x, n);
  if (m == 0 || n == 0) return y;

  if (kernels.w4_few && m <= kFewTokens) {
    few_tokens(weight, x, offset.get(), y);
    return y;
  }
  const bool pairs = type == Type::kBFloat16 && kernels.w4_bfloat16, fixed = kernels.fix && !pairs;
  const int pieces = type == Type::kFloat ? 2 : 1;
  const std::vector<Block> blocks = blocks_of(m, fixed ? fixed_rows(pieces) : most_rows(kernels, m));
  const int64_t of_group = pairs ? group_size / 2 : fixed ? group_size / 2 * pieces : group_size;  // 32-bit numbers
  const int64_t depth = pairs && kernels.tiles ? tile_depth(of_group) : of_group;
  const auto prepared = room<int32_t>(m * groups * of_group);
  const auto sums = room<float>(fixed ? 0 : m * groups);
  const auto of_fixed = room<Fixed>(fixed ? m * groups : 0);
  const auto rest = room<Rest>(fixed && pieces == 1 ? m * k / 2 : 0);
  const char* values = static_cast<const char*>(x.data_ptr());
  parallel_for(0, (m + kRowsAtOnce - 1) / kRowsAtOnce, 1, [&](int64_t begin, int64_t end) {
    const auto row = room<float>(k);
    for (int64_t top = begin * kRowsAtOnce; top < std::min(m, end * kRowsAtOnce); top += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, m - top);
      for (int64_t i = top; i < top + rows; ++i) {
        const char* from = values + i * k * size_of(type);
        if (!pairs) kernels.read(type, from, k, row.get());
        for (int64_t group = 0; group < groups; ++group) {
          const float* own = row.get() + group * group_size;
          const int64_t place = group * m + i;
          int32_t* to = prepared.get() + place * of_group;
          if (fixed) {
            kernels.fix(own, group_size, pieces, to, pieces == 1 ? rest.get() + place * (group_size / 2) : nullptr, of_fixed.get() + place);
          } else if (pairs) {
            sums[place] = kernels.sum_bfloat16(from + group * of_group * 4, group_size);
          } else {
            sums[place] = kernels.sum(own, group_size);
            std::memcpy(to, own, of_group * 4);
          }
        }
      }
      if (pairs) lay_out(reinterpret_cast<const int32_t*>(values + top * k * 2), rows, k / 2, depth, top, m, prepared.get());
    }
  });
  weight.tile.x = prepared.get();
  weight.tile.sums = fixed ? static_cast<const void*>(of_fixed.get()) : sums.get();
  weight.tile.pieces = pieces;
  weight.tile.rest = rest.get();
  weight.multiply(blocks, pairs ? kernels.w4_bfloat16 : kernels.w4, nullptr, offset.get(), y);
  return y;
}

// As cpu_w4a16, with each row of x rounded to 8 bits.
Tensor cpu_w4a8(const Tensor& given, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point,
                const std::optional<Tensor>& bias, int64_t n) {
  STD_TORCH_CHECK(given.dim() > 0, "x has no input channels");
  const Tensor x = torch::stable::contiguous(given);
  const Kernels& kernels = kernels_in_use();
  Weight4 weight(kernels, x, packed, scale, zero_point, n);
  const int64_t k = weight.k, m = rows_of(x), of_group = k / weight.groups / 4;
  const auto offset = floats_of(kernels, bias, n);
  Tensor y = result_for(x, n);
  if (m == 0 || n == 0) return y;

  const std::vector<Block> blocks = blocks_of(m, most_rows(kernels, m));
  const int64_t depth = kernels.tiles ? tile_depth(of_group) : of_group;
  const Integers integers = integers_of(kernels, x, k, k / 4, depth, of_group, true, nullptr);
  parallel_for(0, m * k / 8, 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int8_t from[8], to[8];
      std::memcpy(from, integers.fours.get() + 2 * i, 8);
      for (int j = 0; j < 8; ++j) to[j] = from[kByteOrder[j]];
      std::memcpy(integers.fours.get() + 2 * i, to, 8);
    }
  });
  const std::vector<float> sums(integers.sums.begin(), integers.sums.end());
  weight.tile.x = integers.fours.get();
  weight.tile.sums = sums.data();
  weight.multiply(blocks, kernels.w4a8, integers.scales.data(), offset.get(), y);
  return y;
}

}  // namespace
}  // namespace sqplus

STABLE_TORCH_LIBRARY_FRAGMENT(smoothquant_plus, m) {
  m.def("cpu_bfloat16(Tensor x, Tensor packed, Tensor? bias, int channels) -> Tensor");
  m.def("cpu_w8a8(Tensor x, Tensor weight, Tensor weight_scale, bool per_token, Tensor? input_scale, Tensor? bias) -> Tensor");
  m.def("cpu_w4a16(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int channels) -> Tensor");
  m.def("cpu_w4a8(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int channels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smoothquant_plus, CPU, m) {
  m.impl("cpu_bfloat16", TORCH_BOX(&sqplus::cpu_bfloat16));
  m.impl("cpu_w8a8", TORCH_BOX(&sqplus::cpu_w8a8));
  m.impl("cpu_w4a16", TORCH_BOX(&sqplus::cpu_w4a16));
  m.impl("cpu_w4a8", TORCH_BOX(&sqplus::cpu_w4a8));
}
