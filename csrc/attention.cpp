// Attention whose two products are of 8-bit integers, on keys and values that are kept in 8 bits. To a product the keys are a weight with an output channel for each
// token, the values one with an input channel for each: both are multiplied as W8A8's weights are (Kernels::w8).
//
// A cache is three tensors, whose pages hold 64 tokens of a head each: keys uint8 (batch, KV heads, pages, bytes), a page of which is a panel; values likewise, as panels
// of 64 channels; and scales float32 (batch, KV heads, 2, pages * 64), of keys and of values, each token's its own. Both have 128 added. Pages of a head follow one
// another, or memory could not be read ahead.
//
// Queries are rounded with a scale for each token and head. The weights that softmax gives are multiplied with the values' scales, which are not the same for all that is
// added up, and rounded with a scale for each page. Softmax and all sums beyond a page are in float32.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
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

struct Cache {
  uint8_t *all_keys, *all_values;
  float* all_scales;
  int64_t heads, pages, key_steps, value_panels;

  Cache(const Tensor& keys, const Tensor& values, const Tensor& scales, int64_t batch, int64_t key_channels, int64_t value_channels, int64_t length)
      : all_keys(static_cast<uint8_t*>(keys.data_ptr())), all_values(static_cast<uint8_t*>(values.data_ptr())), all_scales(static_cast<float*>(scales.data_ptr())),
        heads(keys.dim() == 4 ? keys.size(1) : 0), pages(keys.dim() == 4 ? keys.size(2) : 0), key_steps(round_up(key_channels, 4) / 4),
        value_panels(round_up(value_channels, kPanel) / kPanel) {
    STD_TORCH_CHECK(keys.dim() == 4 && keys.scalar_type() == ScalarType::Byte && keys.is_contiguous() && keys.size(0) == batch && keys.size(3) == key_steps * kStep &&
                        values.scalar_type() == ScalarType::Byte && values.is_contiguous() && values.numel() == batch * heads * pages * value_bytes() &&
                        scales.scalar_type() == ScalarType::Float && scales.is_contiguous() && scales.numel() == batch * heads * pages * 2 * kTokens && length >= 0 &&
                        length <= pages * kTokens,
                    "the cache does not fit these tokens");
  }
  int64_t value_bytes() const { return value_panels * kValueSteps * kStep; }
  // Of page p of a head, counted over the batch.
  uint8_t* keys(int64_t head, int64_t p) const { return all_keys + (head * pages + p) * key_steps * kStep; }
  uint8_t* values(int64_t head, int64_t p, int64_t panel) const { return all_values + (head * pages + p) * value_bytes() + panel * kValueSteps * kStep; }
  float* key_scales(int64_t head, int64_t p) const { return all_scales + (head * 2 * pages + p) * kTokens; }
  float* value_scales(int64_t head, int64_t p) const { return all_scales + ((head * 2 + 1) * pages + p) * kTokens; }
};

// Keys (batch, KV heads, tokens, channels) and values, in float, become the tokens of the cache from `at` on.
void cpu_cache_append(const Tensor& cached_keys, const Tensor& cached_values, const Tensor& scales, const Tensor& given_keys, const Tensor& given_values, int64_t at) {
  STD_TORCH_CHECK(given_keys.dim() == 4 && given_values.dim() == 4, "keys and values have four dimensions");
  const Tensor keys = torch::stable::contiguous(given_keys), values = torch::stable::contiguous(given_values);
  const Kernels& kernels = vectors_in_use();
  const int64_t heads = keys.size(1), tokens = keys.size(2), of_key = keys.size(3), of_value = values.size(3), all = keys.size(0) * heads;
  const Cache cache(cached_keys, cached_values, scales, keys.size(0), of_key, of_value, at + tokens);
  STD_TORCH_CHECK(at >= 0 && cache.heads == heads && values.size(0) == keys.size(0) && values.size(1) == heads && values.size(2) == tokens, "keys and values do not fit");
  const Type key_type = type_of(keys), value_type = type_of(values);
  if (tokens == 0) return;
  const int64_t first_page = at / kTokens, pages = (at + tokens - 1) / kTokens - first_page + 1;
  parallel_for(0, all * pages, 1, [&](int64_t begin, int64_t end) {
    const int64_t longest = round_up(std::max(of_key, of_value), 4);
    const auto row = room<float>(longest);
    const auto integers = room<uint8_t>(4 * longest);  // of four tokens, 128 added
    const auto quantize = [&](const Tensor& from, Type type, int64_t index, int64_t count, uint8_t* to) {
      kernels.read(type, static_cast<const char*>(from.data_ptr()) + index * count * size_of(type), count, row.get());
      const float largest = kernels.absolute_maximum(row.get(), count), scale = scale_of(largest, nullptr);
      kernels.quantize(row.get(), count, largest, scale, reinterpret_cast<int8_t*>(to));
      for (int64_t i = 0; i < count; ++i) to[i] ^= 0x80;  // as the bits of two's complement have it
      return scale;
    };
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / pages, p = first_page + item % pages;
      const int64_t start = std::max(at - p * kTokens, int64_t{0}), stop = std::min(at + tokens - p * kTokens, kTokens);
      const int64_t index = head * tokens + p * kTokens - at;  // of the page's first token among the given ones
      for (int64_t place = start; place < stop; ++place) {
        cache.key_scales(head, p)[place] = quantize(keys, key_type, index + place, of_key, integers.get());
        // Past the last channel any bits: the query has zeros there.
        uint8_t* to = cache.keys(head, p) + place * 4;
        for (int64_t step = 0; step < cache.key_steps; ++step) std::memcpy(to + step * kStep, integers.get() + step * 4, 4);
      }
      for (int64_t place = start; place < stop;) {
        const int64_t count = place % 4 == 0 && place + 4 <= stop ? 4 : 1;
        for (int64_t t = 0; t < count; ++t) {
          cache.value_scales(head, p)[place + t] = quantize(values, value_type, index + place + t, of_value, integers.get() + t * longest);
        }
        for (int64_t first = 0; first < of_value; first += kPanel) {
          const uint8_t* from = integers.get() + first;
          uint8_t* to = cache.values(head, p, first / kPanel) + place / 4 * kStep + place % 4;
          const int64_t channels = std::min<int64_t>(kPanel, of_value - first);
          if (count == 4) {
            for (int64_t i = 0; i < channels; ++i) {
              for (int64_t t = 0; t < 4; ++t) to[i * 4 + t] = from[t * longest + i];
            }
          } else {
            for (int64_t i = 0; i < channels; ++i) to[i * 4] = from[i];
          }
        }
        place += count;
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
    scales[row] = scale_of(largest, nullptr);
    int32_t* to = fours.get() + row * steps;
    first[row] = -128 * kernels.quantize(numbers, steps * 4, largest, scales[row], reinterpret_cast<int8_t*>(to));
    if (kernels.cut) rests[row] = kernels.cut(0, steps, to, rest.get() + row * steps);
  }

  // y (rows, 64) = the products with a panel, in float32 but without scales.
  void multiply(const std::vector<Block>& blocks, const uint8_t* panel, int32_t* y) const {
    kernels.w8(blocks.size(), blocks.data(), {fours.get(), rows, steps, 0, steps, panel, panel + steps * kStep, 0, static_cast<int64_t>(blocks.size()), first.data(), rest.get(), rests.data(), y, {}});
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
  Cache cache;
  const Tensor& query;  // (batch, heads, tokens, channels)
  int64_t heads, group, tokens, channels;  // group: heads that share one of the cache
  int64_t length;
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

  Integers queries(const Task& task) const {
    const int64_t count = query.size(3), steps = cache.key_steps;
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

  int64_t in_mask(const Task& task, int64_t r) const {
    return task.batch * mask->batch + (task.head * group + r % group) * mask->head + (task.first + r / group) * mask->token;
  }

  // Whether any row sees any token of page p.
  bool is_seen(const Task& task, int64_t p) const {
    if (!mask || !mask->seen) return true;
    const int64_t count = std::min(kTokens, length - p * kTokens);
    for (int64_t r = 0; r < task.tokens * group; ++r) {
      const char* visible = mask->data + in_mask(task, r) + p * kTokens;
      if (std::any_of(visible, visible + count, [](char each) { return each != 0; })) return true;
    }
    return false;
  }

  // What row r's scores of the tokens from `start` on become by the mask; those that are not seen become -infinity.
  void hide(const Task& task, int64_t r, int64_t start, int64_t count, float* scores) const {
    const int64_t seen = std::clamp<int64_t>(seen_by(task.first + r / group) - start, 0, count);
    std::fill(scores + seen, scores + count, -std::numeric_limits<float>::infinity());
    if (!mask) return;
    if (mask->seen) {
      const char* visible = mask->data + in_mask(task, r) + start;
      for (int64_t i = 0; i < seen; ++i) scores[i] = visible[i] ? scores[i] : -std::numeric_limits<float>::infinity();
    } else {
      const float* bias = reinterpret_cast<const float*>(mask->data) + in_mask(task, r) + start;
      for (int64_t i = 0; i < seen; ++i) scores[i] += bias[i];
    }
  }

  Part part_of(const Task& task, const Integers& own, const std::vector<Block>& blocks, int64_t from, int64_t to) const {
    const int64_t rows = own.rows, stride = (to - from) * kTokens, head = task.batch * cache.heads + task.head;
    Part made(rows, cache.value_panels * kPanel);
    const auto scores = room<float>(rows * stride);
    const auto sums = room<int32_t>(rows * kPanel);
    const float* const products = reinterpret_cast<const float*>(sums.get());
    std::vector<int64_t> seen;
    for (int64_t p = from; p < to; ++p) {
      if (is_seen(task, p)) {
        seen.push_back(p);
      } else {
        for (int64_t r = 0; r < rows; ++r) std::fill_n(scores.get() + r * stride + (p - from) * kTokens, kTokens, 0.0f);  // until they are hidden
      }
    }
    for (const int64_t p : seen) {
      own.multiply(blocks, cache.keys(head, p), sums.get());
      for (int64_t r = 0; r < rows; ++r) {
        float* row = scores.get() + r * stride + (p - from) * kTokens;
        kernels.write(Type::kFloat, products + r * kPanel, kTokens, own.scales[r] * scaling, cache.key_scales(head, p), nullptr, row);
      }
    }
    if (softcap > 0.0f) kernels.cap(scores.get(), rows * stride, softcap);
    for (int64_t r = 0; r < rows; ++r) {
      hide(task, r, from * kTokens, stride, scores.get() + r * stride);
      made.sums[r] = kernels.softmax(scores.get() + r * stride, stride, &made.largest[r]);
    }
    Integers weights(kernels, rows, kValueSteps);
    for (const int64_t p : seen) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* own_weights = scores.get() + r * stride + (p - from) * kTokens;
        float row[kTokens];
        kernels.write(Type::kFloat, own_weights, kTokens, 1.0f, cache.value_scales(head, p), nullptr, row);
        // What is not seen must leave no trace, whatever its value is; where no token was written to, scales are any bits.
        for (int64_t i = 0; i < kTokens; ++i) row[i] = own_weights[i] == 0.0f ? 0.0f : row[i];
        weights.set(r, row);
      }
      for (int64_t panel = 0; panel < cache.value_panels; ++panel) {
        weights.multiply(blocks, cache.values(head, p, panel), sums.get());
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
      for (int64_t head = 0; head < cache.heads; ++head) {
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
      // The later a query's tokens, the more they see: the longest tasks first, whichever thread is free.
      std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.first > b.first; });
      std::atomic<int64_t> next = 0;
      parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t i = next++; i < count; i = next++) {
          const Integers own = queries(tasks[i]);
          Part all(own.rows, cache.value_panels * kPanel);
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
      Part all(tasks[i].tokens * group, cache.value_panels * kPanel);
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
Tensor cpu_attention(const Tensor& given, const Tensor& keys, const Tensor& values, const Tensor& scales, int64_t length, int64_t channels, double scaling, double softcap, bool causal,
                     const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(given.dim() == 4, "queries have four dimensions");
  const Tensor query = torch::stable::contiguous(given);
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2);
  const Cache cache(keys, values, scales, batch, query.size(3), channels, length);
  STD_TORCH_CHECK(cache.heads > 0 && heads % cache.heads == 0, "the cache's heads do not divide the query's");
  std::optional<Mask> seen;
  if (mask) {
    const bool fits = mask->dim() == 4 && mask->size(0) == batch && mask->size(1) == heads && mask->size(2) == tokens && mask->size(3) == length &&
                      (mask->stride(3) == 1 || length <= 1) && (mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == ScalarType::Float);
    STD_TORCH_CHECK(fits, "the mask does not fit queries and keys");
    seen = {static_cast<const char*>(mask->data_ptr()), mask->scalar_type() == ScalarType::Bool, mask->stride(0), mask->stride(1), mask->stride(2)};
  }
  Tensor y = torch::stable::new_empty(query, {batch, tokens, heads, channels});
  if (batch * heads * tokens * channels == 0) return y;
  const Attention attention{vectors_in_use(), cache, query, heads, heads / cache.heads, tokens, channels, length, static_cast<float>(scaling), static_cast<float>(softcap),
                            causal, seen};
  attention.run(y);
  return y;
}

}  // namespace
}  // namespace sqplus

STABLE_TORCH_LIBRARY_FRAGMENT(smoothquant_plus, m) {
  m.def("cpu_cache_append(Tensor(a!) cached_keys, Tensor(b!) cached_values, Tensor(c!) scales, Tensor keys, Tensor values, SymInt at) -> ()");
  m.def("cpu_attention(Tensor query, Tensor keys, Tensor values, Tensor scales, SymInt length, int channels, float scaling, float softcap, bool causal, Tensor? mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smoothquant_plus, CPU, m) {
  m.impl("cpu_cache_append", TORCH_BOX(&sqplus::cpu_cache_append));
  m.impl("cpu_attention", TORCH_BOX(&sqplus::cpu_attention));
}
