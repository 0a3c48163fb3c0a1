// Plain C++, for any processor: what the compiler makes of it.
#include "tile.h"

namespace sqplus {
namespace {

struct Portable {
  static constexpr int width = 8;
  static constexpr int rows = 2;
  static constexpr int accumulators = 8;
  static constexpr int ahead = 4096;  // bytes that weights of W4A16 are fetched before they are needed
  static constexpr bool soon = true;  // into the first-level cache
  static constexpr bool saturates = false;
  struct Float {
    float v[8];
  };
  struct Int {
    int32_t v[8];
  };

  template <class Out = Float, class F>
  static SQPLUS_INLINE Out each(F&& f) {
    Out out;
    for (int i = 0; i < 8; ++i) out.v[i] = f(i);
    return out;
  }

  static SQPLUS_INLINE Int zero_int() { return {}; }
  static SQPLUS_INLINE Int broadcast_int(int32_t x) {
    return each<Int>([&](int) { return x; });
  }
  static SQPLUS_INLINE Int load_int(const void* p) {
    Int out;
    __builtin_memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static SQPLUS_INLINE void store_int(int32_t* p, const Int& a) { __builtin_memcpy(p, a.v, sizeof a.v); }
  static SQPLUS_INLINE Int add_int(const Int& a, const Int& b) {
    return each<Int>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
  }
  static SQPLUS_INLINE Float to_float(const Int& a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }

  // Of each 32 bits, with zeros below.
  static SQPLUS_INLINE Int lower_half(const Int& a) {
    return each<Int>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << 16); });
  }
  static SQPLUS_INLINE Int upper_half(const Int& a) {
    return each<Int>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) & 0xffff0000u); });
  }
  static SQPLUS_INLINE Float as_float(const Int& a) {
    Float out;
    __builtin_memcpy(out.v, a.v, sizeof out.v);
    return out;
  }
  static SQPLUS_INLINE Int as_int(const Float& a) {
    Int out;
    __builtin_memcpy(out.v, a.v, sizeof out.v);
    return out;
  }

  static SQPLUS_INLINE Float broadcast(float x) {
    return each([&](int) { return x; });
  }
  static SQPLUS_INLINE Float load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static SQPLUS_INLINE Float load_bfloat16(const uint16_t* p) {
    return each([&](int i) { return from_bfloat16(p[i]); });
  }
  static SQPLUS_INLINE Float load_half(const uint16_t* p) {
    return each([&](int i) { return from_half(p[i]); });
  }
  static SQPLUS_INLINE Int load_int8(const int8_t* p) {
    return each<Int>([&](int i) { return p[i]; });
  }
  static SQPLUS_INLINE void store(float* p, const Float& a) { __builtin_memcpy(p, a.v, sizeof a.v); }
  static SQPLUS_INLINE Float add(const Float& a, const Float& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static SQPLUS_INLINE Float fma(const Float& a, const Float& b, const Float& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static SQPLUS_INLINE Float fnma(const Float& a, const Float& b, const Float& c) {
    return each([&](int i) { return c.v[i] - a.v[i] * b.v[i]; });
  }

  static SQPLUS_INLINE Int dot4(const Int& sum, const Int& w, const Int& x) {
    return each<Int>([&](int i) {
      uint8_t a[4];
      int8_t b[4];
      __builtin_memcpy(a, &w.v[i], 4);
      __builtin_memcpy(b, &x.v[i], 4);
      return static_cast<int32_t>(static_cast<uint32_t>(sum.v[i]) + static_cast<uint32_t>(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]));
    });
  }
  static SQPLUS_INLINE Int low_nibbles(const Int& packed) {
    return each<Int>([&](int i) { return packed.v[i] & 0x0f0f0f0f; });
  }
  static SQPLUS_INLINE Int high_nibbles(const Int& packed) {
    return each<Int>([&](int i) { return (packed.v[i] >> 4) & 0x0f0f0f0f; });
  }
  static SQPLUS_INLINE Int dot8(const Int& sum, const Int& low, const Int& x, const Int& high, const Int& y) {
    return dot4(dot4(sum, low, x), high, y);
  }
  template <int shift>
  static SQPLUS_INLINE Float nibble(const Int& packed) {
    return each([&](int i) { return static_cast<float>((static_cast<uint32_t>(packed.v[i]) >> shift) & 15); });
  }

  template <bool soon>
  static SQPLUS_INLINE void prefetch(const void* p) {
    __builtin_prefetch(p, 0, soon ? 3 : 2);
  }
  template <class T>
  static SQPLUS_INLINE void touch(T& a) {
    asm volatile("" : "+m"(a));
  }
};

}  // namespace

constexpr Kernels kPortable = kernels_of<Portable>("portable", w4<Portable>, nullptr);

}  // namespace sqplus
