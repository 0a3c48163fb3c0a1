// Attention whose two products are of 8-bit integers, on keys and values that are kept in 8 bits. To a product the keys are a weight with an output channel for each
// token, the values one with an input channel for each: both are multiplied as W8A8's weights are (Kernels::w8).
//
// A cache is uint8 (pages, batch, KV heads, bytes). A page holds 64 tokens of a head: the keys as a panel, the values as panels of 64 channels, all with 128 added, and
// the scales in float32, 64 of keys and 64 of values. Each token's keys and values have a scale of their own.
//
// Queries are rounded with a scale for each token and head. The weights that softmax gives are multiplied with the values' scales, which are not the same for all that is
// added up, and rounded with a scale for each page. Softmax and all sums beyond a page are in float32.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "tensors.h"

namespace sqplus {
namespace {

constexpr int64_t kTokens = kPanel, kValueSteps = kTokens / 4;
// Rows of queries that go over the same pages together, and pages that are summed up before the next ones are. Results depend on the pages, not on the rows.
constexpr int64_t kRows = 32, kSpan = 8;

// What a page consists of.
struct Layout {
  int64_t key_steps, value_panels;
  Layout(int64_t key_channels, int64_t value_channels) : key_steps(round_up(key_channels, 4) / 4), value_panels(round_up(value_channels, kPanel) / kPanel) {}
  int64_t integers() const { return (key_steps + value_panels * kValueSteps) * kStep; }
  int64_t bytes() const { return integers() + 2 * kTokens * sizeof(float); }
  template <class T>
  T* values(T* page, int64_t panel) const {
    return page + (key_steps + panel * kValueSteps) * kStep;
  }
  const float* key_scales(const uint8_t* page) const { return reinterpret_cast<const float*>(page + integers()); }
  const float* value_scales(const uint8_t* page) const { return key_scales(page) + kTokens; }
};

// Where one number is not finite all that it is multiplied with becomes NaN: of a score of -infinity softmax would leave no trace.
float scale_for(float largest) { return largest <= std::numeric_limits<float>::max() ? scale_of(largest, nullptr) : std::numeric_limits<float>::quiet_NaN(); }

void check(const Tensor& cache, const Layout& layout, int64_t batch, int64_t length) {
  STD_TORCH_CHECK(cache.dim() == 4 && cache.scalar_type() == ScalarType::Byte && cache.is_contiguous() && cache.size(1) == batch && cache.size(3) == layout.bytes() &&
                      length >= 0 && length <= cache.size(0) * kTokens,
                  "the cache does not fit these tokens");
}

// Keys (batch, KV heads, tokens, channels) and values, in float, become the tokens of the cache from `at` on.
void cpu_cache_append(const Tensor& cache, const Tensor& given_keys, const Tensor& given_values, int64_t at) {
  STD_TORCH_CHECK(given_keys.dim() == 4 && given_values.dim() == 4, "keys and values have four dimensions");
  const Tensor keys = torch::stable::contiguous(given_keys), values = torch::stable::contiguous(given_values);
  const Kernels& kernels = kernels_in_use();
  const int64_t heads = keys.size(1), tokens = keys.size(2), of_key = keys.size(3), of_value = values.size(3), all = keys.size(0) * heads;
  const Layout layout(of_key, of_value);
  check(cache, layout, keys.size(0), at + tokens);
  STD_TORCH_CHECK(at >= 0 && cache.size(2) == heads && values.size(0) == keys.size(0) && values.size(1) == heads && values.size(2) == tokens, "keys and values do not fit");
  uint8_t* pages = static_cast<uint8_t*>(cache.data_ptr());
  parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
    const auto row = room<float>(std::max(of_key, of_value));
    const auto integers = room<int8_t>(round_up(std::max(of_key, of_value), 4));
    const auto quantize = [&](const Tensor& from, int64_t index, int64_t count) {
      const Type type = type_of(from);
      kernels.read(type, static_cast<const char*>(from.data_ptr()) + index * count * size_of(type), count, row.get());
      const float largest = kernels.absolute_maximum(row.get(), count), scale = scale_for(largest);
      kernels.quantize(row.get(), count, largest, scale, integers.get());
      return scale;
    };
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t place = (at + token) % kTokens;
        uint8_t* page = pages + ((at + token) / kTokens * all + head) * layout.bytes();
        float* scales = reinterpret_cast<float*>(page + layout.integers());
        scales[place] = quantize(keys, head * tokens + token, of_key);
        for (int64_t step = 0; step < layout.key_steps; ++step) {
          uint32_t four;
          std::memcpy(&four, integers.get() + step * 4, 4);  // past the last channel any bits: the query has zeros there
          four ^= 0x80808080;  // 128 more, as the bits of two's complement have it
          std::memcpy(page + step * kStep + place * 4, &four, 4);
        }
        scales[kTokens + place] = quantize(values, head * tokens + token, of_value);
        for (int64_t first = 0; first < of_value; first += kPanel) {
          uint8_t* to = layout.values(page, first / kPanel) + place / 4 * kStep + place % 4;
          for (int64_t i = 0; i < std::min<int64_t>(kPanel, of_value - first); ++i) to[i * 4] = static_cast<uint8_t>(integers[first + i] ^ 0x80);
        }
      }
    }
  });
}

// Rows as integers with a scale each, as Kernels::w8 takes them.
struct Integers {
  const Kernels& kernels;
  int64_t rows, steps;
  std::unique_ptr<int32_t[]> fours;
  std::vector<float> scales;
  std::vector<int32_t> first, rests;
  std::unique_ptr<Rest[]> rest;

  Integers(const Kernels& kernels, int64_t rows, int64_t steps)
      : kernels(kernels), rows(rows), steps(steps), fours(room<int32_t>(rows * steps)), scales(rows), first(rows), rests(rows),
        rest(room<Rest>(kernels.cut ? rows * steps : 0)) {}

  // Row `row` becomes these numbers, steps * 4 of them.
  void set(int64_t row, const float* numbers) {
    const float largest = kernels.absolute_maximum(numbers, steps * 4);
    scales[row] = scale_for(largest);
    int32_t* to = fours.get() + row * steps;
    first[row] = -128 * kernels.quantize(numbers, steps * 4, largest, scales[row], reinterpret_cast<int8_t*>(to));
    if (kernels.cut) rests[row] = kernels.cut(0, steps, to, rest.get() + row * steps);
  }

  // y (rows, 64) = the products with a panel, in float32 but without scales.
  void multiply(const std::vector<Block>& blocks, const uint8_t* panel, int32_t* y) const {
    kernels.w8(blocks.size(), blocks.data(), {fours.get(), rows, steps, steps, panel, first.data(), rest.get(), rests.data(), y, {}});
  }
};

// What some pages contribute to rows: softmax's weights are exp(score - largest), `sums` adds them up, and y (rows, width) the values times them.
struct Part {
  int64_t width;
  std::vector<float> largest, sums, y;
  Part(int64_t rows, int64_t width) : width(width), largest(rows, -std::numeric_limits<float>::infinity()), sums(rows), y(rows * width) {}

  // And what later pages contribute.
  void add(const Part& other) {
    for (size_t r = 0; r < sums.size(); ++r) {
      if (other.sums[r] == 0.0f) continue;  // it saw none of them
      const float most = std::max(largest[r], other.largest[r]), own = std::exp(largest[r] - most), its = std::exp(other.largest[r] - most);
      largest[r] = most;
      sums[r] = sums[r] * own + other.sums[r] * its;
      float* to = y.data() + r * width;
      const float* from = other.y.data() + r * width;
      for (int64_t i = 0; i < width; ++i) to[i] = to[i] * own + from[i] * its;
    }
  }
};

// Which tokens are seen, or what is added to their scores: bool or float32, with these distances between batches, heads and tokens.
struct Mask {
  const char* data;
  bool seen;
  int64_t batch, head, token;
};

struct Attention {
  const Kernels& kernels;
  Layout layout;
  const Tensor& query;  // (batch, heads, tokens, channels)
  int64_t heads, group, tokens, channels;  // group: heads that share one of the cache
  const uint8_t* cache;
  int64_t cache_heads, cache_stride, length;  // from a page to the next one of the same head
  float scaling, softcap;
  bool causal;
  std::optional<Mask> mask;

  // Rows of some tokens, for the heads that share one: row r is head r % group of token r / group.
  struct Task {
    int64_t batch, head, first, tokens;
  };

  // How many of the cache's tokens come no later than token t of the query, whose last one is the cache's last.
  int64_t seen_by(int64_t t) const { return causal ? length - tokens + t + 1 : length; }
  int64_t pages_of(const Task& task) const { return std::max<int64_t>(0, (seen_by(task.first + task.tokens - 1) + kTokens - 1) / kTokens); }
  const uint8_t* page(const Task& task, int64_t index) const { return cache + index * cache_stride + (task.batch * cache_heads + task.head) * layout.bytes(); }

  Integers queries(const Task& task) const {
    const int64_t count = query.size(3), steps = layout.key_steps;
    const Type type = type_of(query);
    Integers made(kernels, task.tokens * group, steps);
    std::vector<float> row(steps * 4);
    for (int64_t r = 0; r < made.rows; ++r) {
      const int64_t index = (task.batch * heads + task.head * group + r % group) * tokens + task.first + r / group;
      kernels.read(type, static_cast<const char*>(query.data_ptr()) + index * count * size_of(type), count, row.data());
      made.set(r, row.data());
    }
    return made;
  }

  // What row r's scores of the tokens from `start` on become by the mask; those that are not seen become -infinity.
  void hide(const Task& task, int64_t r, int64_t start, int64_t count, float* scores) const {
    const int64_t seen = std::clamp<int64_t>(seen_by(task.first + r / group) - start, 0, count);
    std::fill(scores + seen, scores + count, -std::numeric_limits<float>::infinity());
    if (!mask) return;
    const int64_t index = task.batch * mask->batch + (task.head * group + r % group) * mask->head + (task.first + r / group) * mask->token + start;
    if (mask->seen) {
      const bool* visible = reinterpret_cast<const bool*>(mask->data) + index;
      for (int64_t i = 0; i < seen; ++i) scores[i] = visible[i] ? scores[i] : -std::numeric_limits<float>::infinity();
    } else {
      const float* bias = reinterpret_cast<const float*>(mask->data) + index;
      for (int64_t i = 0; i < seen; ++i) scores[i] += bias[i];
    }
  }

  Part part_of(const Task& task, const Integers& own, const std::vector<Block>& blocks, int64_t from, int64_t to) const {
    const int64_t rows = own.rows, stride = (to - from) * kTokens;
    Part made(rows, layout.value_panels * kPanel);
    const auto scores = room<float>(rows * stride);
    const auto sums = room<int32_t>(rows * kPanel);
    const float* const products = reinterpret_cast<const float*>(sums.get());
    for (int64_t p = from; p < to; ++p) {
      const uint8_t* const here = page(task, p);
      own.multiply(blocks, here, sums.get());
      for (int64_t r = 0; r < rows; ++r) {
        float* row = scores.get() + r * stride + (p - from) * kTokens;
        kernels.write(Type::kFloat, products + r * kPanel, kTokens, own.scales[r] * scaling, layout.key_scales(here), nullptr, row);
      }
    }
    if (softcap > 0.0f) kernels.cap(scores.get(), rows * stride, softcap);
    for (int64_t r = 0; r < rows; ++r) {
      hide(task, r, from * kTokens, stride, scores.get() + r * stride);
      made.sums[r] = kernels.softmax(scores.get() + r * stride, stride, &made.largest[r]);
    }
    Integers weights(kernels, rows, kValueSteps);
    for (int64_t p = from; p < to; ++p) {
      const uint8_t* const here = page(task, p);
      for (int64_t r = 0; r < rows; ++r) {
        // What no token was written to holds any bits.
        const int64_t seen = std::clamp<int64_t>(seen_by(task.first + r / group) - p * kTokens, 0, kTokens);
        float row[kTokens] = {};
        kernels.write(Type::kFloat, scores.get() + r * stride + (p - from) * kTokens, seen, 1.0f, layout.value_scales(here), nullptr, row);
        weights.set(r, row);
      }
      for (int64_t panel = 0; panel < layout.value_panels; ++panel) {
        weights.multiply(blocks, layout.values(here, panel), sums.get());
        for (int64_t r = 0; r < rows; ++r) kernels.add(products + r * kPanel, kPanel, weights.scales[r], made.y.data() + r * made.width + panel * kPanel);
      }
    }
    return made;
  }

  void write(const Task& task, const Part& part, const Tensor& y) const {
    const Type type = type_of(y);
    for (size_t r = 0; r < part.sums.size(); ++r) {
      const int64_t index = (task.batch * tokens + task.first + r / group) * heads + task.head * group + r % group;
      const float sum = part.sums[r];
      kernels.write(type, part.y.data() + r * part.width, channels, sum == 0.0f ? 0.0f : 1.0f / sum, nullptr, nullptr,
                    static_cast<char*>(y.data_ptr()) + index * channels * size_of(type));
    }
  }

  void run(const Tensor& y) const {
    const int64_t at_once = std::max<int64_t>(1, kRows / group);
    std::vector<Task> tasks;
    for (int64_t batch = 0; batch < query.size(0); ++batch) {
      for (int64_t head = 0; head < cache_heads; ++head) {
        for (int64_t first = 0; first < tokens; first += at_once) tasks.push_back({batch, head, first, std::min(at_once, tokens - first)});
      }
    }
    const int64_t count = tasks.size(), spans = ((length + kTokens - 1) / kTokens + kSpan - 1) / kSpan;
    const auto blocks = [&](const Integers& own) { return blocks_of(own.rows, most_rows(kernels, own.rows)); };
    const auto span = [&](const Task& task, const Integers& own, int64_t s) {
      return part_of(task, own, blocks(own), s * kSpan, std::min((s + 1) * kSpan, pages_of(task)));
    };
    // Few tasks are divided by spans, whose parts wait for each other; they are added in the same order in both cases.
    if (count >= 4 * static_cast<int64_t>(torch::stable::get_num_threads()) || spans <= 1) {
      parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Integers own = queries(tasks[i]);
          Part all(own.rows, layout.value_panels * kPanel);
          for (int64_t s = 0; s * kSpan < pages_of(tasks[i]); ++s) all.add(span(tasks[i], own, s));
          write(tasks[i], all, y);
        }
      });
      return;
    }
    std::vector<std::optional<Part>> parts(count * spans);
    parallel_for(0, count * spans, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const Task& task = tasks[item / spans];
        if (item % spans * kSpan < pages_of(task)) parts[item] = span(task, queries(task), item % spans);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      Part all(tasks[i].tokens * group, layout.value_panels * kPanel);
      for (int64_t s = 0; s < spans; ++s) {
        if (parts[i * spans + s]) all.add(*parts[i * spans + s]);
      }
      write(tasks[i], all, y);
    }
  }
};

// softmax(cap(query @ keys.T * scaling) + mask) @ values with the first `length` tokens of the cache: query (batch, heads, tokens, channels of keys) in float -> (batch,
// tokens, heads, `channels` of values) in the same. `causal`: the query's last token is the cache's last, and each sees those up to itself. `mask` bool (true: seen)
// or float32 (added), (batch, heads, tokens, length) expanded from whatever it is the same for. cap(x) is softcap * tanh(x / softcap), or x where softcap is 0.
Tensor cpu_attention(const Tensor& given, const Tensor& cache, int64_t length, int64_t channels, double scaling, double softcap, bool causal,
                     const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(given.dim() == 4, "queries have four dimensions");
  const Tensor query = torch::stable::contiguous(given);
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2);
  const Layout layout(query.size(3), channels);
  check(cache, layout, batch, length);
  const int64_t cache_heads = cache.size(2);
  STD_TORCH_CHECK(cache_heads > 0 && heads % cache_heads == 0, "the cache's heads do not divide the query's");
  std::optional<Mask> seen;
  if (mask) {
    const bool fits = mask->dim() == 4 && mask->size(0) == batch && mask->size(1) == heads && mask->size(2) == tokens && mask->size(3) == length &&
                      (mask->stride(3) == 1 || length <= 1) && (mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == ScalarType::Float);
    STD_TORCH_CHECK(fits, "the mask does not fit queries and keys");
    seen = {static_cast<const char*>(mask->data_ptr()), mask->scalar_type() == ScalarType::Bool, mask->stride(0), mask->stride(1), mask->stride(2)};
  }
  Tensor y = torch::stable::new_empty(query, {batch, tokens, heads, channels});
  if (batch * heads * tokens * channels == 0) return y;
  const Attention attention{kernels_in_use(), layout, query, heads, heads / cache_heads, tokens, channels, static_cast<const uint8_t*>(cache.data_ptr()),
                            cache_heads, batch * cache_heads * layout.bytes(), length, static_cast<float>(scaling),
                            static_cast<float>(softcap), causal, seen};
  attention.run(y);
  return y;
}

}  // namespace
}  // namespace sqplus

STABLE_TORCH_LIBRARY_FRAGMENT(smoothquant_plus, m) {
  m.def("cpu_cache_append(Tensor(a!) cache, Tensor keys, Tensor values, int at) -> ()");
  m.def("cpu_attention(Tensor query, Tensor cache, int length, int channels, float scaling, float softcap, bool causal, Tensor? mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smoothquant_plus, CPU, m) {
  m.impl("cpu_cache_append", TORCH_BOX(&sqplus::cpu_cache_append));
  m.impl("cpu_attention", TORCH_BOX(&sqplus::cpu_attention));
}
