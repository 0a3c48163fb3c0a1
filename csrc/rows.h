// Passes over rows of activations and results: plain loops that the compiler vectorizes for the instruction set of the file that includes this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace sqplus {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bfloat16(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// Without branches, so that loops over it are vectorized. The exponent is corrected by a product, which is exact for denormals too.
inline float from_half(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  const uint32_t finite = as_bits(as_float(magnitude) * as_float(0x77800000));  // 2^112
  const uint32_t special = magnitude | 0x7f800000;
  return as_float((magnitude >= 0x0f800000 ? special : finite) | static_cast<uint32_t>(x & 0x8000) << 16);
}

// Ties to even in every range: adding a constant of the right size lets the hardware round denormals.
inline uint16_t to_half(float value) {
  const uint32_t bits = as_bits(value), sign = bits & 0x80000000, magnitude = bits ^ sign;
  const uint32_t denormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? denormal : normal;
  return static_cast<uint16_t>(half | sign >> 16);
}

inline void read_row(Type type, const void* x, int64_t count, float* to) {
  const uint16_t* bits = static_cast<const uint16_t*>(x);
  switch (type) {
    case Type::kFloat:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<const float*>(x)[i];
      return;
    case Type::kBFloat16:
      for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(bits[i]);
      return;
    case Type::kHalf:
      for (int64_t i = 0; i < count; ++i) to[i] = from_half(bits[i]);
      return;
  }
}

// As integers: the order of magnitudes is that of their bits, and NaN is above infinity.
inline float absolute_maximum_of(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(as_bits(x[i]) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
  }
  return as_float(static_cast<uint32_t>(largest));
}

// Sixteen numbers, in pairs.
inline float added_up(float* parts) {
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) parts[j] += parts[j + half];
  }
  return parts[0];
}

// In sixteen parts, each in order.
inline float sum_of(const float* x, int64_t count) {
  float parts[16] = {};
  for (int64_t i = 0; i < count; i += 16) {
    for (int j = 0; j < 16; ++j) parts[j] += x[i + j];
  }
  return added_up(parts);
}

// Of x + 1.5 * 2^23.
inline int32_t as_int8(float shifted) {
  const int32_t integer = static_cast<int32_t>(as_bits(shifted)) - 0x4b400000, above = integer > -128 ? integer : -128;
  return above < 127 ? above : 127;
}

// x / scale, rounded to the nearest integer, ties to the even one: below 2^22 adding 1.5 * 2^23 leaves no bits behind the point. NaN becomes any number.
template <bool clip>
inline int32_t quantize_each(const float* x, int64_t count, float scale, int8_t* to) {
  constexpr float shift = 12582912.0f;
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    float value = x[i] / scale;
    if (clip) {
      value = value > -128.0f ? value : -128.0f;
      value = value < 127.0f ? value : 127.0f;
    }
    const int32_t bounded = as_int8(value + shift);
    to[i] = static_cast<int8_t>(bounded);
    sum += bounded;
  }
  return sum;
}

// The same without divisions, which take a quarter of the time: x * (1 / scale) is off by 2^-16 at most where it is not beyond 128, and rounds to the same integer unless it is that
// near to the middle between two. Returns whether none is.
inline bool quantize_quickly(const float* x, int64_t count, float inverse, int8_t* to, int32_t* sum) {
  constexpr float shift = 12582912.0f;
  int32_t total = 0, farthest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = x[i] * inverse, shifted = value + shift;
    const int32_t off = static_cast<int32_t>(as_bits(value - (shifted - shift)) & 0x7fffffff);
    farthest = off > farthest ? off : farthest;
    const int32_t bounded = as_int8(shifted);
    to[i] = static_cast<int8_t>(bounded);
    total += bounded;
  }
  *sum += total;
  return as_float(static_cast<uint32_t>(farthest)) < 0.5f - 0x1p-14f;
}

// Clipped as integers where all are small enough for that: comparing floats takes as long as everything else together.
inline int32_t quantize_row(const float* x, int64_t count, float largest, float scale, int8_t* to) {
  if (!(largest < scale * 0x1p20f)) return quantize_each<true>(x, count, scale, to);
  constexpr int64_t at_once = 128;
  const bool quick = scale > 0x1p-100f && scale < 0x1p100f;  // or its inverse, or what is multiplied with it, would not be exact enough
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i += at_once) {
    const int64_t each = count - i < at_once ? count - i : at_once;
    int32_t part = 0;
    if (!quick || !quantize_quickly(x + i, each, 1.0f / scale, to + i, &part)) part = quantize_each<false>(x + i, each, scale, to + i);
    sum += part;
  }
  return sum;
}

// exp(x) of what is not positive, to two units in the last place, and 0 of what is below -86. As 2^n * exp(rest), with a polynomial for the rest (Cephes, expf).
inline float exponential(float x) {
  constexpr float shift = 12582912.0f;
  const float shifted = x * 1.44269504f + shift, n = shifted - shift;
  const float rest = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float value = 1.9875691500e-4f;
  value = value * rest + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * rest * rest + rest + 1.0f;
  const float power = as_float((as_bits(shifted) - 0x4b400000 + 127) << 23);
  return x < -86.0f ? 0.0f : value * power;  // NaN stays
}

// In sixteen parts, each in order.
inline float softmax_row(float* x, int64_t count, float* largest) {
  constexpr float none = -__builtin_inff();
  float most[16], sums[16] = {};
  for (int j = 0; j < 16; ++j) most[j] = none;
  for (int64_t i = 0; i < count; i += 16) {
    for (int j = 0; j < 16; ++j) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) most[j] = most[j + half] > most[j] ? most[j + half] : most[j];
  }
  *largest = most[0];
  const float from = most[0] == none ? 0.0f : most[0];  // NaN among nothing but -infinity stays NaN
  for (int64_t i = 0; i < count; i += 16) {
    for (int j = 0; j < 16; ++j) {
      const float value = exponential(x[i + j] - from);
      x[i + j] = value;
      sums[j] += value;
    }
  }
  return added_up(sums);
}

// cap * tanh(x / cap): as (1 - e) / (1 + e) with e = exp(-2 |x / cap|).
inline void cap_row(float* x, int64_t count, float cap) {
  for (int64_t i = 0; i < count; ++i) {
    const float e = exponential(-2.0f * std::fabs(x[i] / cap));
    x[i] = std::copysign(cap * ((1.0f - e) / (1.0f + e)), x[i]);
  }
}

inline void add_row(const float* x, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += x[i] * scale;
}

template <bool scaled, bool biased, class Store>
inline void write_each(const float* y, int64_t count, float row_scale, const float* scale, const float* bias, Store&& store) {
  for (int64_t i = 0; i < count; ++i) {
    float value = y[i] * row_scale;
    if (scaled) value *= scale[i];
    if (biased) value += bias[i];
    store(i, value);
  }
}

inline void write_row(Type type, const float* y, int64_t count, float row_scale, const float* scale, const float* bias, void* to) {
  const auto write = [&](auto store) {
    const auto all = [&](int64_t known) {
      if (scale && bias) return write_each<true, true>(y, known, row_scale, scale, bias, store);
      if (scale) return write_each<true, false>(y, known, row_scale, scale, bias, store);
      if (bias) return write_each<false, true>(y, known, row_scale, scale, bias, store);
      return write_each<false, false>(y, known, row_scale, scale, bias, store);
    };
    count == kPanel ? all(kPanel) : count == kPanel / 2 ? all(kPanel / 2) : all(count);  // a constant for nearly all
  };
  switch (type) {
    case Type::kFloat: return write([to](int64_t i, float value) { static_cast<float*>(to)[i] = value; });
    case Type::kBFloat16: return write([to](int64_t i, float value) { static_cast<uint16_t*>(to)[i] = to_bfloat16(value); });
    case Type::kHalf: return write([to](int64_t i, float value) { static_cast<uint16_t*>(to)[i] = to_half(value); });
  }
}

}  // namespace
}  // namespace sqplus
