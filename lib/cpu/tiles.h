// The micro-kernel: R rows × C tiles of 16 outputs, summed along k in registers, in one chain per output.
//
// The chain of an output is the pairs of k in order (of 16 at a time where Vec::kMatrix); R, C, the row's place in its block and the
// tile's neighbours choose only which chains run side by side. So a product of 1 row and one of 64 agree bit for bit.
//
// Functions with such products are left out of line: in the loops around them GCC ran out of registers, and took several times
// as long (docs/decisions/0018).
#pragma once

#include "lib/cpu/isa_common.h"

namespace MOEBIUS_ISA {

using F = Vec::F;
using Laid = Vec::Laid;

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
  MOEBIUS_INLINE Streams<1> one(int c) const { return Streams<1>::of(at[c], 0, step); }
  // C tiles of a packed matrix, from `first` on.
  MOEBIUS_INLINE static Streams tiles(const bf16* first, int64_t tile_elements) { return of(first, tile_elements * 2, kLineBytes); }
};

// What block b of `blocks` over a piece of weights fetches of the next piece: its b-th part, so that every block hides as much
// of the memory's time as the others. (C tiles of `pairs` pairs are C·pairs lines, one after another, of which each stream takes a run.)
struct Part {
  int64_t begin, bytes, step;  // of one tile

  MOEBIUS_INLINE Part(int64_t pairs, int64_t b, int64_t blocks)
      : begin(pairs * kLineBytes * b / blocks), bytes(pairs * kLineBytes / blocks), step(kLineBytes / blocks) {}
  template <int C>
  MOEBIUS_INLINE Streams<C> of(const bf16* next) const {
    return Streams<C>::of(reinterpret_cast<const char*>(next) + C * begin, bytes, step);
  }
  // The same by one stream.
  template <int C>
  MOEBIUS_INLINE Streams<1> by_one(const bf16* next) const {
    return Streams<1>::of(reinterpret_cast<const char*>(next) + C * begin, 0, C * step);
  }
};

// A block's rows as they are laid out: their pairs side by side or, where Vec::kMatrix, row after row.
struct BlockRows {
  const Laid* at;
  int64_t pitch;  // from a pair of k to the next or, where Vec::kMatrix, from a row to the next

  MOEBIUS_INLINE BlockRows from(int64_t pair) const { return {at + (Vec::kMatrix ? pair : pair * pitch), pitch}; }
  MOEBIUS_INLINE BlockRows row(int64_t r) const { return {at + (Vec::kMatrix ? r * pitch : r), pitch}; }
};

template <int R, int C>
MOEBIUS_INLINE void multiply_in_registers(const BlockRows& a, const Streams<C>& w, int64_t pairs, const Streams<C>& ahead, F (&acc)[R][C]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = Vec::zero();
  for (int64_t p = 0; p < pairs; ++p) {
    Vec::W tile[C];
    const auto load = [&](int c) MOEBIUS_INLINE_LAMBDA {
      tile[c] = Vec::load_w(reinterpret_cast<const bf16*>(w.at[c] + p * w.step));
      __builtin_prefetch(ahead.at[c] + p * ahead.step);
    };
    if constexpr (Vec::kFewRegisters) {  // tile by tile
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        load(c);
        const Laid* rows = a.at + p * a.pitch;
        if constexpr (R > 1 && C > 1) asm volatile("" : "+r"(rows));  // they are loaded for each tile: there is no register to keep them in
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r][c] = Vec::dot(acc[r][c], tile[c], Vec::load_a(rows + r));
      }
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) load(c);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec::A x = Vec::load_a(a.at + p * a.pitch + r);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = Vec::dot(acc[r][c], tile[c], x);
      }
    }
  }
}

// How many rows a block has, as a constant: kernels are unrolled over it. (Where Vec::kMatrix it is a plain int, and sums of a block have room
// for the most there are.)
template <int N>
struct Constant {
  MOEBIUS_INLINE constexpr operator int() const { return N; }
};
template <class Rows>
constexpr int kMost = Vec::kRows;
template <int N>
constexpr int kMost<Constant<N>> = Vec::kMatrix ? Vec::kRows : N;

// acc[r][c] = Σ_p w(c, p)·a(r, p), r < rows.
template <int C, class Rows, class V = Vec>
MOEBIUS_INLINE void tile_block(Rows rows, const BlockRows& a, const Streams<C>& w, int64_t pairs, const Streams<C>& ahead,
                               F (&acc)[kMost<Rows>][C]) {
  if constexpr (V::kMatrix)
    V::template multiply<C>(rows, a.at, a.pitch, w, pairs, ahead, acc);
  else
    multiply_in_registers<kMost<Rows>, C>(a, w, pairs, ahead, acc);
}

// From a row of so many pairs to the next one. Row after row they are an odd number of lines apart, so that 16 of them do not meet in a few sets of
// the cache.
constexpr int64_t laid_pairs(int64_t pairs) {
  constexpr int64_t kLine = kLineBytes / int64_t{sizeof(Pair)};
  return Vec::kMatrix ? (div_up(pairs, kLine) | 1) * kLine : pairs;
}
// What so many rows take, with the 15 behind the last that are read with it and never used.
constexpr int64_t laid_bytes(int64_t rows, int64_t pairs) {
  return (rows + (Vec::kMatrix ? kTile - 1 : 0)) * laid_pairs(pairs) * int64_t{sizeof(Laid)};
}

// Rows laid out for tile_block: blocks of nearly equal numbers of rows or, where Vec::kMatrix, of as many as it takes.
struct RowBlocks {
  const Laid* data;
  int64_t rows, pairs, blocks;

  MOEBIUS_INLINE RowBlocks(const void* at, int64_t num_rows, int64_t row_pairs)
      : data(static_cast<const Laid*>(at)), rows(num_rows), pairs(row_pairs), blocks(div_up(num_rows, Vec::kRows)) {}
  MOEBIUS_INLINE Range block(int64_t b) const {
    if constexpr (Vec::kMatrix) return {b * Vec::kRows, rows < (b + 1) * Vec::kRows ? rows : (b + 1) * Vec::kRows};
    return share_of(rows, b, blocks);
  }
  // The n rows of a block from `first` on. (A row alone is read as all 16.)
  MOEBIUS_INLINE BlockRows of(int64_t first, int64_t n) const {
    return {data + first * laid_pairs(pairs), !Vec::kMatrix ? n : rows > 1 ? laid_pairs(pairs) : 0};
  }
};

// Lays out pairs [first, first + count) of a block of n rows that have `pairs` each; row(r) → pointer to row r's first one.
template <class RowOf>
MOEBIUS_INLINE void lay_rows(Laid* block, int64_t n, int64_t pairs, int64_t first, int64_t count, const RowOf& row) {
  if constexpr (Vec::kMatrix)
    for (int64_t r = 0; r < n; ++r) __builtin_memcpy(block + r * laid_pairs(pairs) + first, row(r), static_cast<size_t>(count) * sizeof(Laid));
  else
    Vec::interleave(block + first * n, n, count, row);
}

// row(i) → pointer to the bf16 of row i, 4-byte aligned. They are laid out in `scratch` (laid_bytes); one row that needs no widening is used
// where it lies.
template <class RowOf>
MOEBIUS_INLINE RowBlocks gather_rows(std::byte* scratch, int64_t rows, int64_t pairs, const RowOf& row) {
  if (rows == 1 && sizeof(Laid) == sizeof(Pair)) return {row(0), 1, pairs};
  const RowBlocks out{scratch, rows, pairs};
  for (int64_t b = 0; b < out.blocks; ++b) {
    const Range range = out.block(b);
    lay_rows(reinterpret_cast<Laid*>(scratch) + range.begin * laid_pairs(pairs), range.size(), pairs, 0, pairs,
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

// Calls body(n), n a block's rows.
template <class Body>
MOEBIUS_INLINE void with_block(int64_t n, const Body& body) {
  if constexpr (Vec::kMatrix)
    body(static_cast<int>(n));
  else
    with_rows(n, [&]<int R>() MOEBIUS_INLINE_LAMBDA { body(Constant<R>{}); });
}

// Whether for_tiles ever puts so many rows of a block beside C tiles: what it does not needs no code.
template <class Rows, int C>
constexpr bool kBeside = Vec::kMatrix || C <= Vec::tiles_beside(kMost<Rows>);

// Calls body.operator()<C>(t) over a range of tiles, C at a time: as many as registers allow beside so many rows. Few rows take more, so
// that enough chains run side by side and enough lines are under way.
template <class Body>
MOEBIUS_INLINE void for_tiles(Range tiles, int64_t rows, const Body& body) {
  const int most = Vec::tiles_beside(rows);
  int64_t t = tiles.begin;
  if constexpr (kBeside<Constant<1>, 4>)
    if (most >= 4)
      for (; t + 4 <= tiles.end; t += 4) body.template operator()<4>(t);
  if (most >= 2)
    for (; t + 2 <= tiles.end; t += 2) body.template operator()<2>(t);
  for (; t < tiles.end; ++t) body.template operator()<1>(t);
}

// C tiles from the one at `w` on, the t-th, for all rows; `next` is what is read after them.
template <int C, class Store>
[[gnu::noinline]] void multiply_blocks(const RowBlocks& x, const bf16* w, int64_t tile_elements, const bf16* next, int64_t t, const Store& store) {
  for (int64_t b = 0; b < x.blocks; ++b) {
    const Range rows = x.block(b);
    with_block(rows.size(), [&]<class N>(N n) MOEBIUS_INLINE_LAMBDA {
      const int R = n;
      if constexpr (kBeside<N, C>) {
        F acc[kMost<N>][C];
        tile_block<C>(n, x.of(rows.begin, R), Streams<C>::tiles(w, tile_elements), x.pairs, Part(x.pairs, b, x.blocks).of<C>(next), acc);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) store(rows.begin + r, t * kTile, acc[r], C);
      }
    });
  }
}

// Outputs of a tile range of one packed matrix for all rows: store(row, first output, acc[C], C).
template <class Store>
MOEBIUS_INLINE void multiply_tiles(const RowBlocks& x, const bf16* w, int64_t tile_elements, Range tiles, const Store& store) {
  for_tiles(tiles, x.rows, [&]<int C>(int64_t t) MOEBIUS_INLINE_LAMBDA {
    const bf16* tile = w + t * tile_elements;
    multiply_blocks<C>(x, tile, tile_elements, t + C < tiles.end ? tile + C * tile_elements : tile, t, store);
  });
}

}  // namespace MOEBIUS_ISA
