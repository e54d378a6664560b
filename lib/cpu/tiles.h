// The one micro-kernel: R rows × C tiles of 16 outputs, summed along k in registers, in one chain per output.
//
// The chain of an output is the pairs of k in order; R, C, the row's place in its block and the tile's neighbours choose only
// which chains run side by side. So a product of 1 row and one of 64 agree bit for bit.
#pragma once

#include "lib/cpu/isa_common.h"

namespace MOEBIUS_ISA {

using F = Vec::F;
using Pair = uint32_t __attribute__((may_alias));  // two bf16 of a row

constexpr int64_t kLineBytes = 64;  // a cache line, and one pair of k of a tile

// C streams of lines, of which a product takes one each per pair of k: the weights of C tiles, or what is fetched meanwhile.
template <int C>
struct Streams {
  const char* at[C];
  int64_t step;  // bytes from a pair to the next

  // Streams that lie `apart` bytes from each other.
  MOEBIUS_INLINE static Streams of(const void* first, int64_t apart, int64_t step) {
    Streams s;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) s.at[c] = static_cast<const char*>(first) + c * apart;
    s.step = step;
    return s;
  }
  // C tiles of a packed matrix, from `first` on.
  MOEBIUS_INLINE static Streams tiles(const bf16* first, int64_t tile_elements) { return of(first, tile_elements * 2, kLineBytes); }
};

// What block b of `blocks` over a piece of weights fetches of the next piece: its b-th part, so that every block hides as much
// of the memory's time as the others. (C tiles of `pairs` pairs are C·pairs lines, one after another.)
template <int C>
MOEBIUS_INLINE Streams<C> part_of(const bf16* next, int64_t pairs, int64_t b, int64_t blocks) {
  return Streams<C>::of(reinterpret_cast<const char*>(next) + pairs * C * kLineBytes * b / blocks, kLineBytes, C * kLineBytes / blocks);
}

// acc[r][c] = Σ_p w(c, p)·a(r, p). Row r's pair p is a[p·pitch + r].
template <int R, int C>
MOEBIUS_INLINE void tile_block(const Pair* a, int64_t pitch, const Streams<C>& w, int64_t pairs, const Streams<C>& ahead, F (&acc)[R][C]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = Vec::zero();
  for (int64_t p = 0; p < pairs; ++p) {
    Vec::W tile[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      tile[c] = Vec::load_w(reinterpret_cast<const bf16*>(w.at[c] + p * w.step));
      __builtin_prefetch(ahead.at[c] + p * ahead.step);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec::A x = Vec::load_a(reinterpret_cast<const uint32_t*>(a + p * pitch + r));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = Vec::dot(acc[r][c], tile[c], x);
    }
  }
}

// Rows laid out for tile_block: blocks of nearly equal numbers of rows, each with the rows' pairs side by side.
struct RowBlocks {
  const Pair* data;
  int64_t rows, pairs, blocks;

  MOEBIUS_INLINE RowBlocks(const void* at, int64_t num_rows, int64_t row_pairs)
      : data(static_cast<const Pair*>(at)), rows(num_rows), pairs(row_pairs), blocks(div_up(num_rows, Vec::kRows)) {}
  MOEBIUS_INLINE Range block(int64_t b) const { return share_of(rows, b, blocks); }
  MOEBIUS_INLINE const Pair* of(Range rows_of_block) const { return data + rows_of_block.begin * pairs; }
};

// dst[p·n + r] = pair p of row r; row(r) → pointer to its pairs.
template <class RowOf>
MOEBIUS_INLINE void interleave_rows(Pair* dst, int64_t n, int64_t pairs, const RowOf& row) {
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

// row(i) → pointer to the bf16 of row i, 4-byte aligned. One row is used where it lies; more are copied into `scratch`
// (rows · pairs · 4 bytes).
template <class RowOf>
MOEBIUS_INLINE RowBlocks gather_rows(std::byte* scratch, int64_t rows, int64_t pairs, const RowOf& row) {
  if (rows == 1) return {row(0), 1, pairs};
  const RowBlocks out{scratch, rows, pairs};
  for (int64_t b = 0; b < out.blocks; ++b) {
    const Range range = out.block(b);
    interleave_rows(reinterpret_cast<Pair*>(scratch) + range.begin * pairs, range.size(), pairs,
                    [&](int64_t r) MOEBIUS_INLINE_LAMBDA { return reinterpret_cast<const Pair*>(row(range.begin + r)); });
  }
  return out;
}

// Calls body.operator()<R>() with R = n ≤ kRows: a block's number of rows becomes a constant.
template <int R = Vec::kRows, class Body>
MOEBIUS_INLINE void with_rows(int64_t n, const Body& body) {
  if constexpr (R > 1)
    if (n < R) return with_rows<R - 1>(n, body);
  body.template operator()<R>();
}

// Whether for_tiles ever puts R rows beside C tiles: what it does not needs no code.
template <int R, int C>
constexpr bool kBeside = R <= Vec::kWideRows || C < 4;

// Calls body.operator()<C>(t) over a range of tiles, C at a time. Few rows take more, so that enough chains run side by side and
// enough lines are under way.
template <class Body>
MOEBIUS_INLINE void for_tiles(Range tiles, int64_t rows, const Body& body) {
  int64_t t = tiles.begin;
  if (rows <= Vec::kWideRows)
    for (; t + 4 <= tiles.end; t += 4) body.template operator()<4>(t);
  for (; t + 2 <= tiles.end; t += 2) body.template operator()<2>(t);
  if (t < tiles.end) body.template operator()<1>(t);
}

// Outputs of a tile range of one packed matrix for all rows: store(row, first output, acc[C], C).
template <class Store>
MOEBIUS_INLINE void multiply_tiles(const RowBlocks& x, const bf16* w, int64_t tile_elements, Range tiles, const Store& store) {
  for_tiles(tiles, x.rows, [&]<int C>(int64_t t) MOEBIUS_INLINE_LAMBDA {
    const bf16* tile = w + t * tile_elements;
    const bf16* next = t + C < tiles.end ? tile + C * tile_elements : tile;
    for (int64_t b = 0; b < x.blocks; ++b) {
      const Range rows = x.block(b);
      with_rows(rows.size(), [&]<int R>() MOEBIUS_INLINE_LAMBDA {
        if constexpr (kBeside<R, C>) {
          F acc[R][C];
          tile_block<R, C>(x.of(rows), R, Streams<C>::tiles(tile, tile_elements), x.pairs, part_of<C>(next, x.pairs, b, x.blocks), acc);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) store(rows.begin + r, t * kTile, acc[r], C);
        }
      });
    }
  });
}

}  // namespace MOEBIUS_ISA
