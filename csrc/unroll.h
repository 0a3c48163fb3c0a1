// Loops that are unrolled at compile time: GCC keeps an array of accumulators in registers only when all of its indices are constants.
#pragma once

#include <utility>

#define SQPLUS_INLINE inline __attribute__((always_inline))
// A function of its own, with all registers for its loop: nothing that its caller needs is kept in them.
#define SQPLUS_NOINLINE __attribute__((noinline))
#define SQPLUS_EACH(i) [&](auto i) __attribute__((always_inline))

namespace sqplus {
namespace {

template <class F, int... I>
SQPLUS_INLINE void unroll_(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
SQPLUS_INLINE void unroll(F&& f) {
  unroll_(f, std::make_integer_sequence<int, N>{});
}

// Calls f with `rows`, one of 1..Most, as a constant.
template <int Most, class F>
SQPLUS_INLINE void with_rows(int rows, F&& f) {
  unroll<Most>([&](auto r) {
    if (rows == r + 1) f(std::integral_constant<int, r + 1>{});
  });
}

}  // namespace
}  // namespace sqplus
