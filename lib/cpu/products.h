// Matrix products: projections, the expert MLP in two passes, and the sums that cross slices.
#pragma once

#include "lib/cpu/math.h"

namespace MOEBIUS_ISA {

// ---- y = x·Wᵀ

void linear(const LinearArgs& args, const Lane& lane) {
  if (args.rows.empty()) return;
  int64_t total = 0;
  for (int p = 0; p < args.num_parts; ++p) total += div_up(args.parts[p].n, kTile);
  const Range mine = share_of(total, lane.thread, lane.num_threads);
  if (mine.empty()) return;
  [[maybe_unused]] const Vec::Unit unit;
  const RowBlocks x =
      gather_rows(lane.scratch, args.rows.size(), div_up(args.k, 2), [&](int64_t r) { return args.x + (args.rows.begin + r) * args.ldx; });
  int64_t first = 0;  // tile number of the part's first tile
  for (int p = 0; p < args.num_parts && first < mine.end; ++p) {
    const LinearPart& part = args.parts[p];
    const PackedMatrix m{part.n, args.k};
    const int64_t tiles = m.tiles();
    const Range range{mine.begin > first ? mine.begin - first : 0, (mine.end < first + tiles ? mine.end - first : tiles)};
    if (!range.empty())
      multiply_tiles(x, part.w, m.tile_elements(), range, [&](int64_t r, int64_t n0, const F* acc, int c) MOEBIUS_INLINE_LAMBDA {
        float* y = part.y + (args.rows.begin + r) * part.ldy + n0;
        for (int i = 0; i < c; ++i) {
          const int64_t left = part.n - n0 - i * kTile;
          if (left >= kTile)
            Vec::store(y + i * kTile, acc[i]);
          else
            Vec::store_n(y + i * kTile, acc[i], static_cast<int>(left));
        }
      });
    first += tiles;
  }
}

// ---- exact sums

// Clears columns [n0, n1) of the rows' sums.
MOEBIUS_INLINE void clear_sums(const ExactSum& out, Range rows, int64_t hidden, Range columns) {
  const int64_t element = out.plain ? 4 : 8;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    __builtin_memset(reinterpret_cast<char*>(out.sum) + (row * hidden + columns.begin) * element, 0,
                     static_cast<size_t>(columns.size() * element));
}

MOEBIUS_INLINE Range columns_of(Range tiles, int64_t hidden) {
  return {tiles.begin * kTile, tiles.end * kTile < hidden ? tiles.end * kTile : hidden};
}

// Slices of one sum over the same rows: slice s is a packed matrix n = hidden, k = 2·pairs, that multiplies `pairs` pairs of a row.
struct SlicePart {
  const bf16* w;
  int64_t first_pair;
};

// Sums of rows × tiles that a lane gathers before they reach the rows' own: 16 KiB, so that they stay near and yet a block alone reads
// many tiles of one slice in one go: where pieces are short, the memory gives less (docs/decisions/0009).
constexpr int64_t kGatheredTiles = 128;
// Tiles of a group that several blocks of rows meet: where a product is slow beside the caches, longer pieces of the rows' own sums.
constexpr int64_t kMetTiles = Vec::kFewRegisters ? 4 : 2;
constexpr int64_t kLeadTiles = 4;  // how far ahead of such a block its weights are fetched

// The slow way for sums that hold contributions out of range or no numbers: lane by lane, those left out and their rows flagged.
template <class SliceOf, class RowOf>
void add_checked(const ExactSum& out, int64_t hidden, int num_slices, int64_t pairs, const SliceOf& slice, const BlockRows& x, int64_t rows,
                 Range tiles, const float* factors, const RowOf& row_of) {
  const int64_t tile_elements = pairs * 2 * kTile;
  for (int64_t r = 0; r < rows; ++r)
    for (int s = 0; s < num_slices; ++s)
      for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        const SlicePart part = slice(s);
        const bf16* w = part.w + t * tile_elements;
        F acc[kMost<Constant<1>>][1];
        tile_block<1>(Constant<1>{}, x.from(part.first_pair).row(r), Streams<1>::tiles(w, tile_elements), pairs, Streams<1>::of(w, 0, 0), acc);
        float v[kTile];
        Vec::store(v, Vec::mul(acc[0][0], Vec::set1(factors[r])));
        uint64_t* to = reinterpret_cast<uint64_t*>(out.sum) + row_of(r) * hidden + t * kTile;
        for (int64_t i = 0; i < kTile && t * kTile + i < hidden; ++i) {
          if (__builtin_fabsf(v[i]) < out.limit)
            to[i] += static_cast<uint64_t>(static_cast<int64_t>(__builtin_rintf(v[i])));
          else
            __atomic_store_n(out.flags + row_of(r), uint8_t{1}, __ATOMIC_RELAXED);
        }
      }
}

// What the slices' contributions to the sums of a block of rows have in common.
struct BlockSums {
  int64_t pairs;         // of a slice
  Part part;             // that is fetched of what comes next
  const float* factors;  // [rows]
  bool plain;
  int64_t* sums;
  typename Vec::Seen seen;
};

// sums[at …] (R rows × C tiles) += the contributions of one slice, each rounded to an integer by itself. Meanwhile the block's part of
// `next` is fetched.
template <int C, class N>
[[gnu::noinline]] void add_slice(N n, BlockSums& to, const Laid* x, int64_t pitch, const bf16* w, const bf16* next, int64_t at) {
  const int R = n;
  F acc[kMost<N>][C];
  tile_block<C>(n, {x, pitch}, Streams<C>::tiles(w, to.pairs * 2 * kTile), to.pairs, to.part.of<C>(next), acc);
  const auto each = [&](const auto& add) MOEBIUS_INLINE_LAMBDA {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) add(at + (r * C + c) * kTile, Vec::mul(acc[r][c], Vec::set1(to.factors[r])));
  };
  int64_t* const sums = to.sums;
  if (to.plain)
    each([&](int64_t i, F v) MOEBIUS_INLINE_LAMBDA {
      float* const sum = reinterpret_cast<float*>(sums) + i;
      Vec::store(sum, Vec::add(Vec::load(sum), v));
    });
  else {
    typename Vec::Seen seen = to.seen;
    each([&](int64_t i, F v) MOEBIUS_INLINE_LAMBDA { Vec::see(seen, v), Vec::add_fixed(sums + i, v); });
    to.seen = seen;
  }
}

// Adds all slices' contributions to the rows' sums, for a range of tiles. They are gathered first; whether all were in range is
// looked at before they reach the rows' own. after(s) is where the weights of slice s lie that are read when these have been.
template <class SliceOf, class AfterOf, class FactorOf, class RowOf>
MOEBIUS_INLINE void add_slices(const ExactSum& out, int64_t hidden, int num_slices, int64_t pairs, const SliceOf& slice, const AfterOf& after,
                               const RowBlocks& x, Range tiles, const FactorOf& factor_of, const RowOf& row_of) {
  const int64_t tile_elements = pairs * 2 * kTile;
  const float limit = out.limit < Vec::kFixedLimit ? out.limit : Vec::kFixedLimit;
  const bool plain = out.plain, alone = x.blocks == 1;
  const int64_t step = Vec::tiles_beside(x.rows);
  // Several blocks meet the same weights while these are in a near cache.
  const int64_t group = alone ? kGatheredTiles / x.rows / step * step : kMetTiles, lead = group < kLeadTiles ? group : kLeadTiles;
  alignas(64) int64_t sums[kGatheredTiles * kTile];
  for (int64_t t0 = tiles.begin; t0 < tiles.end; t0 += group) {
    const Range here{t0, t0 + group < tiles.end ? t0 + group : tiles.end};
    const auto following = [&](int s) MOEBIUS_INLINE_LAMBDA {
      const int next = alone ? (s + 1) % num_slices : s;
      if (alone && next > 0) return slice(next).w + here.begin * tile_elements;
      return here.end < tiles.end ? slice(next).w + here.end * tile_elements : after(next);
    };
    for (int64_t b = 0; b < x.blocks; ++b) {
      const Range rows = x.block(b);
      const int64_t num = rows.size();
      const BlockRows block = x.of(rows.begin, num);
      float factors[Vec::kRows];
      for (int64_t r = 0; r < num; ++r) factors[r] = factor_of(rows.begin + r);
      __builtin_memset(sums, 0, static_cast<size_t>(num * here.size() * kTile) * sizeof(int64_t));
      BlockSums gathered{pairs, Part(pairs, b, x.blocks), factors, plain, sums, Vec::nothing_seen()};
      with_block(num, [&]<class N>(N n) MOEBIUS_INLINE_LAMBDA {
        for (int s = 0; s < num_slices; ++s) {
          const SlicePart part = slice(s);
          for_tiles(here, x.rows, [&]<int C>(int64_t t) MOEBIUS_INLINE_LAMBDA {
            if constexpr (kBeside<N, C>) {
              const bf16* w = part.w + t * tile_elements;
              const bf16* next = t + lead < here.end ? w + lead * tile_elements : following(s) + (t + lead - here.end) * tile_elements;
              add_slice<C>(n, gathered, block.from(part.first_pair).at, block.pitch, w, next, (t - here.begin) * num * kTile);
            }
          });
        }
      });
      if (!plain && !Vec::all_below(gathered.seen, limit)) {
        add_checked(out, hidden, num_slices, pairs, slice, block, num, here, factors, [&](int64_t r) { return row_of(rows.begin + r); });
        continue;
      }
      for_tiles(here, x.rows, [&]<int C>(int64_t t) MOEBIUS_INLINE_LAMBDA {
        const Range columns = columns_of({t, t + C}, hidden);  // outputs past hidden are products with 0
        for (int64_t r = 0; r < num; ++r) {
          const int64_t to = row_of(rows.begin + r) * hidden + columns.begin, from = ((t - here.begin) * num + r * C) * kTile;
          if (plain)
            for (int64_t i = 0; i < columns.size(); ++i) reinterpret_cast<float*>(out.sum)[to + i] += reinterpret_cast<const float*>(sums)[from + i];
          else
            for (int64_t i = 0; i < columns.size(); ++i)
              out.sum[to + i] = static_cast<int64_t>(static_cast<uint64_t>(out.sum[to + i]) + static_cast<uint64_t>(sums[from + i]));
        }
      });
    }
  }
}

void exact_linear(const ExactLinearArgs& args, const Lane& lane) {
  if (args.rows.empty() || args.num_parts == 0) return;
  const Range tiles = share_of(div_up(args.hidden, kTile), lane.thread, lane.num_threads);
  if (tiles.empty()) return;
  clear_sums(args.out, args.rows, args.hidden, columns_of(tiles, args.hidden));
  [[maybe_unused]] const Vec::Unit unit;
  const RowBlocks x = gather_rows(lane.scratch, args.rows.size(), args.ldx / 2,
                                  [&](int64_t r) MOEBIUS_INLINE_LAMBDA { return args.x + (args.rows.begin + r) * args.ldx; });
  const int64_t pairs = args.k / 2, tile_elements = pairs * 2 * kTile;
  const auto slice = [&](int s) MOEBIUS_INLINE_LAMBDA { return SlicePart{args.parts[s].w, args.parts[s].column / 2}; };
  const auto after = [&](int s) MOEBIUS_INLINE_LAMBDA { return slice(s).w + tiles.begin * tile_elements; };
  const auto factor_of = [&](int64_t) MOEBIUS_INLINE_LAMBDA { return args.out.plain ? 1.0f : args.out.scale; };
  const auto row_of = [&](int64_t r) MOEBIUS_INLINE_LAMBDA { return args.rows.begin + r; };
  add_slices(args.out, args.hidden, args.num_parts, pairs, slice, after, x, tiles, factor_of, row_of);
}

// ---- experts

// A tile's cost is about max(time to read it, rows · time to multiply it): with some 40 GB/s and 500 GFLOP/s a core the two meet
// near 12 rows (2026-11, AVX-512-BF16, Zen 5), with 10 and 75 near 7 (AVX2, Zen 3), with 14 and 500 near 35 (AMX). It only balances the lanes.
constexpr int64_t kRowsPerTileRead = Vec::kRows;

MOEBIUS_INLINE int64_t cost_of(int64_t num_pairs) { return num_pairs < kRowsPerTileRead ? kRowsPerTileRead : num_pairs; }

// One expert and the pairs that chose it.
struct ExpertJob {
  int64_t pair_begin, num_pairs;
  const bf16* const* cuts;
};

// Calls fn(job, cuts of the one after it, or its own) for each expert that has pairs, until it returns false.
template <class F>
MOEBIUS_INLINE void for_experts(const ExpertsArgs& args, F&& fn) {
  const auto next_from = [&](int e) {
    while (e < args.num_experts && args.begins[e] == args.begins[e + 1]) ++e;
    return e;
  };
  const auto cuts_of = [&](int e) { return args.cuts + int64_t{e} * args.num_cuts; };
  for (int e = next_from(0), next; e < args.num_experts; e = next) {
    next = next_from(e + 1);
    const ExpertJob job{args.begins[e], args.begins[e + 1] - args.begins[e], cuts_of(e)};
    if (!fn(job, cuts_of(next < args.num_experts ? next : e))) return;
  }
}

// act = silu(gate)·up of one tile for the rows of a block, stored as experts_down takes it.
// (No part of the loop above it: its constants would push accumulators out of their registers.)
[[gnu::noinline]] void activate(const float (*gate_up)[2][kTile], int64_t rows, Laid* act, int64_t act_pairs, int64_t first_pair) {
  alignas(64) bf16 out[Vec::kRows < 4 ? 4 : Vec::kRows][kTile];  // as many as are interleaved at once
  for (int64_t r = 0; r < rows; ++r) Vec::store_bf16(out[r], Vec::mul(silu(Vec::load(gate_up[r][0])), Vec::load(gate_up[r][1])));
  lay_rows(act, rows, act_pairs, first_pair, kTile / 2, [&](int64_t r) MOEBIUS_INLINE_LAMBDA { return reinterpret_cast<const Pair*>(out[r]); });
}

// One tile of 16 neurons of a cut, for all rows of a job: act [act_pairs] per row, from pair first_pair on.
[[gnu::noinline]] void gate_up_tile(const RowBlocks& x, const bf16* w, const bf16* next, Laid* act, int64_t act_pairs, int64_t first_pair) {
  for (int64_t b = 0; b < x.blocks; ++b) {
    const Range rows = x.block(b);
    with_block(rows.size(), [&]<class N>(N n) MOEBIUS_INLINE_LAMBDA {
      const int R = n;
      alignas(64) float gate_up[kMost<N>][2][kTile];
      const Streams<2> both = Streams<2>::of(w, kLineBytes, 2 * kLineBytes);
      if constexpr (kBeside<N, 2>) {
        F acc[kMost<N>][2];
        tile_block<2>(n, x.of(rows.begin, R), both, x.pairs, Part(x.pairs, b, x.blocks).of<2>(next), acc);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) Vec::store(gate_up[r][0], acc[r][0]), Vec::store(gate_up[r][1], acc[r][1]);
      } else {
        for (int c = 0; c < 2; ++c) {  // each fetches half of what comes next, line by line
          F acc[kMost<N>][1];
          tile_block<1>(n, x.of(rows.begin, R), both.one(c), x.pairs, Part(x.pairs, 2 * b + c, 2 * x.blocks).by_one<2>(next), acc);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) Vec::store(gate_up[r][c], acc[r][0]);
        }
      }
      activate(gate_up, R, act + rows.begin * laid_pairs(act_pairs), act_pairs, first_pair);
    });
  }
}

void experts_gate_up(const ExpertsArgs& args, const Lane& lane) {
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const int64_t units = args.num_cuts * cut.tiles();  // per job
  const int64_t act_pairs = args.num_cuts * cut.padded() / 2;
  int64_t total = 0;
  for_experts(args, [&](const ExpertJob& job, const bf16* const*) MOEBIUS_INLINE_LAMBDA { return total += cost_of(job.num_pairs) * units, true; });
  const int64_t from = total * lane.thread / lane.num_threads, to = total * (lane.thread + 1) / lane.num_threads;
  [[maybe_unused]] const Vec::Unit unit;
  int64_t at = 0;
  for_experts(args, [&](const ExpertJob& job, const bf16* const* next_cuts) MOEBIUS_INLINE_LAMBDA {
    const int64_t cost = cost_of(job.num_pairs);
    // Unit u belongs to the lane whose range holds its start.
    const int64_t first = from > at ? div_up(from - at, cost) : 0;
    const int64_t last = to - at < cost * units ? div_up(to - at, cost) : units;
    at += cost * units;
    if (first >= last) return at < to;
    const int32_t* rows = args.pair_rows + job.pair_begin;
    const RowBlocks x = gather_rows(lane.scratch, job.num_pairs, div_up(args.hidden, 2),
                                    [&](int64_t r) MOEBIUS_INLINE_LAMBDA { return args.x + rows[r] * args.hidden; });
    const auto weights = [&](int64_t u) { return job.cuts[u / cut.tiles()] + u % cut.tiles() * cut.gate_up_tile_elements(); };
    const bf16* after = next_cuts == job.cuts ? weights(first) : next_cuts[0];
    Laid* act = reinterpret_cast<Laid*>(args.act) + job.pair_begin * laid_pairs(act_pairs);
    for (int64_t u = first; u < last; ++u)
      gate_up_tile(x, weights(u), u + 1 < units ? weights(u + 1) : after, act, act_pairs,
                   (u / cut.tiles() * cut.padded() + u % cut.tiles() * kTile) / 2);
    return at < to;
  });
}

void experts_down(const ExpertsArgs& args, const Lane& lane) {
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const PackedMatrix down = cut.down();
  const Range tiles = share_of(down.tiles(), lane.thread, lane.num_threads);
  if (tiles.empty()) return;
  clear_sums(args.out, args.rows, args.hidden, columns_of(tiles, args.hidden));
  const float scale = args.out.plain ? 1.0f : args.out.scale;
  const int64_t pairs = down.k_pairs(), act_pairs = args.num_cuts * pairs;
  [[maybe_unused]] const Vec::Unit unit;
  for_experts(args, [&](const ExpertJob& job, const bf16* const* next_cuts) MOEBIUS_INLINE_LAMBDA {
    const RowBlocks x(reinterpret_cast<const Laid*>(args.act) + job.pair_begin * laid_pairs(act_pairs), job.num_pairs, act_pairs);
    const auto slice = [&](int s) MOEBIUS_INLINE_LAMBDA { return SlicePart{job.cuts[s] + cut.gate_up_elements(), s * pairs}; };
    const auto factor_of = [&](int64_t r) MOEBIUS_INLINE_LAMBDA { return args.pair_weights[job.pair_begin + r] * scale; };
    const auto row_of = [&](int64_t r) MOEBIUS_INLINE_LAMBDA { return int64_t{args.pair_rows[job.pair_begin + r]}; };
    const auto after = [&](int s) MOEBIUS_INLINE_LAMBDA { return next_cuts[s] + cut.gate_up_elements() + tiles.begin * down.tile_elements(); };
    add_slices(args.out, args.hidden, args.num_cuts, pairs, slice, after, x, tiles, factor_of, row_of);
    return true;
  });
}

}  // namespace MOEBIUS_ISA
