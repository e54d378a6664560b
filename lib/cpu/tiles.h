// The one micro-kernel: R rows × C tiles of 16 outputs, summed along k in registers, in one chain per output.
//
// The chain of an output is the pairs of k in order; R, C, the row's place in its block and the tile's neighbours choose only
// which chains run side by side. So a product of 1 row and one of 64 agree bit for bit.
#pragma once

#include "lib/cpu/isa_common.h"

namespace MOEBIUS_ISA {

using F = Vec::F;
using Pair = uint32_t __attribute__((may_alias));  // two bf16 of a row

// Weights are prefetched this far ahead where a product is bound by memory (few rows): about what one core has in flight.
constexpr int64_t kPrefetchBytes = 2048;

// acc[r][c] = Σ_p w(c, p)·a(r, p). Row r's pair p is a[p·R + r]; tile c's pair p starts at w + p·kstep + c·cstep.
template <int R, int C>
MOEBIUS_INLINE void tile_block(const Pair* a, const bf16* w, int64_t kstep, int64_t cstep, int64_t pairs, F (&acc)[R][C]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = Vec::zero();
  for (int64_t p = 0; p < pairs; ++p) {
    Vec::W tile[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      tile[c] = Vec::load_w(w + p * kstep + c * cstep);
      __builtin_prefetch(w + p * kstep + c * cstep + kPrefetchBytes / 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec::A x = Vec::load_a(reinterpret_cast<const uint32_t*>(a + p * R + r));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = Vec::dot(acc[r][c], tile[c], x);
    }
  }
}

// Rows laid out for tile_block: blocks of nearly equal numbers of rows, each with the rows' pairs side by side.
struct RowBlocks {
  const Pair* data = nullptr;
  int64_t pairs = 0;
  int64_t rows = 0;
  int64_t blocks = 0;

  MOEBIUS_INLINE Range block(int64_t b) const { return share_of(rows, b, blocks); }
  MOEBIUS_INLINE const Pair* of(Range rows_of_block) const { return data + rows_of_block.begin * pairs; }
};

MOEBIUS_INLINE int64_t num_blocks(int64_t rows) { return div_up(rows, Vec::kRows); }

// row(i) → pointer to the bf16 of row i, 4-byte aligned. One row is used where it lies; more are copied into `scratch`
// (rows · pairs · 4 bytes).
template <class RowOf>
MOEBIUS_INLINE RowBlocks gather_rows(std::byte* scratch, int64_t rows, int64_t pairs, RowOf row) {
  RowBlocks out{reinterpret_cast<const Pair*>(scratch), pairs, rows, num_blocks(rows)};
  if (rows == 1) {
    out.data = reinterpret_cast<const Pair*>(row(0));
    return out;
  }
  for (int64_t b = 0; b < out.blocks; ++b) {
    const Range range = out.block(b);
    Pair* dst = reinterpret_cast<Pair*>(scratch) + range.begin * pairs;
    const int64_t n = range.size();
    for (int64_t r = 0; r < n; ++r) {
      const Pair* src = reinterpret_cast<const Pair*>(row(range.begin + r));
      for (int64_t p = 0; p < pairs; ++p) dst[p * n + r] = src[p];
    }
  }
  return out;
}

// Calls store(r, acc of row r) for every row of a block of n ≤ kRows rows: the run-time number becomes a constant here.
template <int C, int R = Vec::kRows, class Store>
MOEBIUS_INLINE void run_block(int64_t n, const Pair* a, const bf16* w, int64_t kstep, int64_t cstep, int64_t pairs, Store store) {
  if constexpr (R > 1)
    if (n < R) return run_block<C, R - 1>(n, a, w, kstep, cstep, pairs, store);
  F acc[R][C];
  tile_block<R, C>(a, w, kstep, cstep, pairs, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(r, acc[r]);
}

// Outputs of a tile range of one packed matrix for all rows: store(row, first output, acc[C], C) per block and C ≤ 2 tiles.
template <class Store>
MOEBIUS_INLINE void multiply_tiles(const RowBlocks& x, const bf16* w, int64_t tile_elements, Range tiles, Store store) {
  for (int64_t t = tiles.begin; t < tiles.end; t += 2) {
    const bf16* tile = w + t * tile_elements;
    for (int64_t b = 0; b < x.blocks; ++b) {
      const Range rows = x.block(b);
      if (t + 1 < tiles.end)
        run_block<2>(rows.size(), x.of(rows), tile, 2 * kTile, tile_elements, x.pairs,
                     [&](int64_t r, const F(&acc)[2]) { store(rows.begin + r, t * kTile, acc, 2); });
      else
        run_block<1>(rows.size(), x.of(rows), tile, 2 * kTile, tile_elements, x.pairs,
                     [&](int64_t r, const F(&acc)[1]) { store(rows.begin + r, t * kTile, acc, 1); });
    }
  }
}

}  // namespace MOEBIUS_ISA
