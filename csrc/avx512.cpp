// AVX-512 with VNNI, 8-bit dot products of unsigned with signed numbers: Cascade Lake, Ice Lake, Zen 4 and later.
#if defined(__x86_64__)
#include "avx512.h"

namespace sqplus {

void w8_ahead_avx512(int64_t blocks, const Block* block, const W8Tile& t) { w8<Avx512, true>(blocks, block, t); }

constexpr Kernels kAvx512 = kernels_of<Avx512>("avx512", w4_fixed<Avx512>, fix_group);

}  // namespace sqplus
#endif
