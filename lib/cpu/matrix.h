// Products by a unit of matrix registers, single values by Base.
//
// A matrix register holds 16 lines of 64 bytes: of packed weights 16 outputs × 32 of k as they lie, of rows 32 of k of 16 rows, or the
// sums of these 16 × 16. One instruction adds up 32 of k: the even ones in order, the odd ones in order, both together, and that to the sum
// so far; each output by itself, so a row alone and one among many agree bit for bit. It takes as long for one row as for 16.
//
// MatrixUnit is, while it lives, the thread's eight registers, by number: zero<T>(), load<T>(address, bytes from a line to the next),
// store<T>(the same), dot<Sums, Rows, Weights>().
#pragma once

#include "lib/cpu/isa_common.h"

namespace MOEBIUS_ISA {

template <class Base, class MatrixUnit>
struct Matrix : Base {
  using Unit = MatrixUnit;
  static constexpr bool kMatrix = true;
  static constexpr int kRows = 32;  // two registers of rows beside two tiles, or one beside four: four of sums
  static constexpr int tiles_beside(int64_t rows) { return rows <= kTile ? 4 : 2; }
  static constexpr int kPairs = 16;  // of k that a register takes

  // acc[r][c] = Σ_p w(c, p)·a(r, p), r < rows: pair p of row r is a[r·pitch + p], of weights line p of stream c. Meanwhile the streams `ahead` are
  // fetched, but for a rest of less than 16 pairs. Rows are read up to a multiple of 16, and acc is written as far.
  template <int C, class Streams>
  MOEBIUS_INLINE static void multiply(int rows, const Pair* a, int64_t pitch, const Streams& w, int64_t pairs, const Streams& ahead,
                                      typename Base::F (*acc)[C]) {
    if constexpr (C <= 2)
      if (rows > kTile) return multiply_rows<2, C>(rows, a, pitch, w, pairs, ahead, acc);
    multiply_rows<1, C>(rows, a, pitch, w, pairs, ahead, acc);
  }

 private:
  static constexpr int kRowTile = 4, kWeightTile = 6;  // two of each, after four of sums

  // R registers of rows, from `a` on, beside the weights of tile c.
  template <int R, int C, int c>
  MOEBIUS_INLINE static void add_tile(const void* w, int64_t step) {
    Unit::template load<kWeightTile + c % 2>(w, step);
    Unit::template dot<c, kRowTile, kWeightTile + c % 2>();
    if constexpr (R == 2) Unit::template dot<C + c, kRowTile + 1, kWeightTile + c % 2>();
  }
  template <int R>
  MOEBIUS_INLINE static void load_rows(const void* a, int64_t row_bytes) {
    Unit::template load<kRowTile>(a, row_bytes);
    if constexpr (R == 2) Unit::template load<kRowTile + 1>(static_cast<const char*>(a) + kTile * row_bytes, row_bytes);
  }
  // body.operator()<c>() for each tile.
  template <int C, int c = 0, class Body>
  MOEBIUS_INLINE static void for_each_tile(const Body& body) {
    body.template operator()<c>();
    if constexpr (c + 1 < C) for_each_tile<C, c + 1>(body);
  }

  template <int R, int C, class Streams>
  MOEBIUS_INLINE static void multiply_rows(int rows, const Pair* a, int64_t pitch, const Streams& w, int64_t pairs, const Streams& ahead,
                                           typename Base::F (*acc)[C]) {
    for_each_tile<R * C>([]<int t>() MOEBIUS_INLINE_LAMBDA { Unit::template zero<t>(); });
    int64_t p = 0;
    for (; p + kPairs <= pairs; p += kPairs) {
      load_rows<R>(a + p, pitch * int64_t{sizeof(Pair)});
      for_each_tile<C>([&]<int c>() MOEBIUS_INLINE_LAMBDA {
        add_tile<R, C, c>(w.at[c] + p * w.step, w.step);
        const char* line = ahead.at[c] + p * ahead.step;  // into the second-level cache: the first one holds less than lies between
        for (const char* end = line + kPairs * ahead.step; line < end; line += 64) __builtin_prefetch(line, 0, 2);
      });
    }
    if (const int64_t rest = pairs - p; rest > 0) {  // the registers' other pairs are 0
      alignas(64) char row_lines[R * kTile][64] = {}, weight_lines[kPairs][64] = {};
      for (int r = 0; r < rows; ++r) __builtin_memcpy(row_lines[r], a + r * pitch + p, static_cast<size_t>(rest) * sizeof(Pair));
      load_rows<R>(row_lines, 64);
      for_each_tile<C>([&]<int c>() MOEBIUS_INLINE_LAMBDA {
        for (int64_t i = 0; i < rest; ++i) __builtin_memcpy(weight_lines[i], w.at[c] + (p + i) * w.step, 64);
        add_tile<R, C, c>(weight_lines, 64);
      });
    }
    for_each_tile<R * C>([&]<int t>() MOEBIUS_INLINE_LAMBDA {
      Unit::template store<t>(acc[t / C * kTile] + t % C, C * int64_t{sizeof(typename Base::F)});
    });
  }

 public:
  // Runs `iterations` × a block of products from registers; returns their operations.
  static double probe(int64_t iterations) {
    constexpr int kBlock = 64;
    const Unit unit;
    alignas(64) bf16 lines[kTile][2 * kPairs];
    for (int i = 0; i < kTile * 2 * kPairs; ++i) lines[i / (2 * kPairs)][i % (2 * kPairs)] = static_cast<bf16>(0x3c00 + i);
    for_each_tile<4>([&]<int t>() MOEBIUS_INLINE_LAMBDA { Unit::template load<kRowTile + t>(lines, 64); });
    for (int64_t i = 0; i < iterations * kBlock; ++i)
      for_each_tile<4>([]<int t>() MOEBIUS_INLINE_LAMBDA { Unit::template dot<t, kRowTile + t / 2, kWeightTile + t % 2>(); });
    return static_cast<double>(iterations * kBlock) * 4 * kTile * kTile * kPairs * 2 * 2;
  }
};

}  // namespace MOEBIUS_ISA
