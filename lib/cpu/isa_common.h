// What every kernel path includes first. A path is a translation unit that defines MOEBIUS_ISA (its namespace), includes one
// isa_*.h, says which is its Vec, then includes kernels.h, and is compiled with the flags of its instruction set. Nothing with vague
// linkage from the standard library is used inside, so that the linker cannot pick another path's copy.
#pragma once

#ifndef MOEBIUS_ISA
#error "define MOEBIUS_ISA, the namespace of this kernel path"
#endif

#include <cstdint>
#include <initializer_list>

#include "lib/base/numbers.h"
#include "lib/device/ops.h"
#include "lib/tensor/dtype.h"
#include "lib/tensor/packed.h"
#include "lib/tensor/transpose.h"

// Kernels' lambdas see registers: one that is left out of line sends them through memory.
#define MOEBIUS_INLINE_LAMBDA __attribute__((always_inline))

namespace MOEBIUS_ISA {

using Pair = uint32_t __attribute__((may_alias));  // two bf16 of a row

// How rows are laid out for a product that takes bf16: as they are.
struct PairRows {
  using Laid = Pair;
  static constexpr bool kFewRegisters = false;  // 16, for which products go tile by tile
  static constexpr bool kMatrix = false;        // products are made by matrix registers (matrix.h)
  struct Unit {};

  // dst[p·n + r] = pair p of row r; row(r) → pointer to its pairs.
  template <class RowOf>
  MOEBIUS_INLINE static void interleave(Laid* dst, int64_t n, int64_t pairs, const RowOf& row) {
    if (n < 4) {
      for (int64_t r = 0; r < n; ++r)
        for (int64_t p = 0; p < pairs; ++p) dst[p * n + r] = row(r)[p];
      return;
    }
    for (int64_t next = 0; next < n; next += 4) {
      const int64_t r = next < n - 4 ? next : n - 4;  // the last four may be taken twice
      const Pair *a = row(r), *b = row(r + 1), *c = row(r + 2), *d = row(r + 3);
      Pair* out = dst + r;
      int64_t p = 0;
      for (; p + 4 <= pairs; p += 4) transpose_4x4(a + p, b + p, c + p, d + p, out + p * n, n * 4);
      for (; p < pairs; ++p) out[p * n] = a[p], out[p * n + 1] = b[p], out[p * n + 2] = c[p], out[p * n + 3] = d[p];
    }
  }
};

}  // namespace MOEBIUS_ISA
