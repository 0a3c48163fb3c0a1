// Plain C++, for any processor: what the compiler makes of it.
#include "tile.h"

namespace sqplus {
namespace {

struct Portable {
  static constexpr int width = 8;
  static constexpr bool unsigned_x = false;
  static constexpr int accumulators = 8;
  struct Float {
    float v[8];
  };
  struct Int {
    int32_t v[8];
  };

  template <class F>
  static SQPLUS_INLINE Float each(F&& f) {
    Float out;
    for (int i = 0; i < 8; ++i) out.v[i] = f(i);
    return out;
  }

  static SQPLUS_INLINE Float zero() { return {}; }
  static SQPLUS_INLINE Int zero_int() { return {}; }
  static SQPLUS_INLINE Float load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static SQPLUS_INLINE Int load_int(const void* p) {
    Int out;
    __builtin_memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static SQPLUS_INLINE void store(float* p, const Float& v) { __builtin_memcpy(p, v.v, sizeof v.v); }
  static SQPLUS_INLINE Float broadcast(const float* p) {
    return each([&](int) { return *p; });
  }
  static SQPLUS_INLINE Int broadcast4(int32_t v) {
    Int out;
    for (int i = 0; i < 8; ++i) out.v[i] = v;
    return out;
  }
  static SQPLUS_INLINE Float to_float(const Int& v) {
    return each([&](int i) { return static_cast<float>(v.v[i]); });
  }
  static SQPLUS_INLINE Float fma(const Float& a, const Float& b, const Float& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static SQPLUS_INLINE Float fnma(const Float& a, const Float& b, const Float& c) {
    return each([&](int i) { return c.v[i] - a.v[i] * b.v[i]; });
  }
  static SQPLUS_INLINE void prefetch(const void*) {}

  static SQPLUS_INLINE Int dot4(Int sum, const Int& x, const Int& w) {
    for (int i = 0; i < 8; ++i) {
      int8_t a[4], b[4];
      __builtin_memcpy(a, &x.v[i], 4);
      __builtin_memcpy(b, &w.v[i], 4);
      sum.v[i] += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
    }
    return sum;
  }

  template <int shift>
  static SQPLUS_INLINE Float nibble(const Int& packed) {
    return each([&](int i) { return static_cast<float>((static_cast<uint32_t>(packed.v[i]) >> shift) & 15); });
  }
};

}  // namespace

const Kernels kPortable = {"portable", 2, false, w8<Portable>, w4<Portable>};

}  // namespace sqplus
