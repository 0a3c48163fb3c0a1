// AVX-512 with VNNI, 8-bit dot products of unsigned with signed numbers: Cascade Lake, Ice Lake, Zen 4 and later.
#if defined(__x86_64__)
#include "avx512.h"

namespace sqplus {

constexpr Kernels kAvx512 = kernels_of<Avx512>("avx512", w4_fixed<Avx512>, fix_group);

}  // namespace sqplus
#endif
