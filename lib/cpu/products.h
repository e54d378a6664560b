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
  const RowBlocks x = gather_rows(lane.scratch, args.rows.size(), div_up(args.k, 2),
                                  [&](int64_t r) { return args.x + (args.rows.begin + r) * args.ldx; });
  int64_t first = 0;  // tile number of the part's first tile
  for (int p = 0; p < args.num_parts && first < mine.end; ++p) {
    const LinearPart& part = args.parts[p];
    const PackedMatrix m{part.n, args.k};
    const int64_t tiles = m.tiles();
    const Range range{mine.begin > first ? mine.begin - first : 0, (mine.end < first + tiles ? mine.end - first : tiles)};
    if (!range.empty())
      multiply_tiles(x, part.w, m.tile_elements(), range, [&](int64_t r, int64_t n0, const F* acc, int c) {
        float* y = part.y + (args.rows.begin + r) * part.ldy + n0;
        for (int i = 0; i < c; ++i) {
          const int64_t left = part.n - n0 - i * kTile;
          if (left >= kTile) Vec::store(y + i * kTile, acc[i]);
          else Vec::store_n(y + i * kTile, acc[i], static_cast<int>(left));
        }
      });
    first += tiles;
  }
}

// ---- exact sums

// Adds 16 contributions (already times the router weight and the scale) of a row; `left` of them exist.
MOEBIUS_INLINE void add_contributions(const ExactSum& out, int64_t row, int64_t hidden, int64_t n0, F scaled) {
  const int64_t left = hidden - n0 < kTile ? hidden - n0 : kTile;
  if (out.plain) {
    float* sum = reinterpret_cast<float*>(out.sum) + row * hidden + n0;
    Vec::store_n(sum, Vec::add(Vec::load_n(sum, static_cast<int>(left), 0), scaled), static_cast<int>(left));
    return;
  }
  const uint32_t all = left == kTile ? 0xffffu : (1u << left) - 1;
  const uint32_t good = Vec::less(Vec::abs(scaled), Vec::set1(out.limit)) & all;
  if (good != all) __atomic_store_n(out.flags + row, uint8_t{1}, __ATOMIC_RELAXED);
  int64_t* sum = out.sum + row * hidden + n0;
  if (left == kTile) {
    Vec::add_fixed(sum, scaled, good);
    return;
  }
  int64_t tail[kTile] = {};
  for (int64_t i = 0; i < left; ++i) tail[i] = sum[i];
  Vec::add_fixed(tail, scaled, good);
  for (int64_t i = 0; i < left; ++i) sum[i] = tail[i];
}

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

void exact_linear(const ExactLinearArgs& args, const Lane& lane) {
  if (args.rows.empty()) return;
  const Range tiles = share_of(div_up(args.hidden, kTile), lane.thread, lane.num_threads);
  if (tiles.empty()) return;
  clear_sums(args.out, args.rows, args.hidden, columns_of(tiles, args.hidden));
  const F scale = Vec::set1(args.out.plain ? 1.0f : args.out.scale);
  for (int p = 0; p < args.num_parts; ++p) {
    const ExactLinearPart& part = args.parts[p];
    const RowBlocks x = gather_rows(lane.scratch, args.rows.size(), div_up(part.k, 2), [&](int64_t r) {
      return args.x + (args.rows.begin + r) * args.ldx + part.column;
    });
    multiply_tiles(x, part.w, PackedMatrix{args.hidden, part.k}.tile_elements(), tiles, [&](int64_t r, int64_t n0, const F* acc, int c) {
      for (int i = 0; i < c; ++i)
        add_contributions(args.out, args.rows.begin + r, args.hidden, n0 + i * kTile, Vec::mul(acc[i], scale));
    });
  }
}

// ---- experts

// A tile's cost is about max(time to read it, rows · time to multiply it): with some 12 GB/s and 150 GFLOP/s a core the two meet
// near 12 rows (2026-11, Zen 5). It only balances the lanes.
constexpr int64_t kRowsPerTileRead = 12;

MOEBIUS_INLINE int64_t cost_of(const ExpertJob& job) {
  return job.num_pairs == 0 ? 0 : job.num_pairs < kRowsPerTileRead ? kRowsPerTileRead : job.num_pairs;
}

MOEBIUS_INLINE void gate_up_tile(const ExpertsArgs& args, const ExpertJob& job, const RowBlocks& x, const MlpCut& cut, int32_t s,
                                 int64_t t) {
  const int64_t act_width = args.num_cuts * cut.padded();
  const bf16* w = job.cuts[s] + t * cut.gate_up_tile_elements();
  for (int64_t b = 0; b < x.blocks; ++b) {
    const Range rows = x.block(b);
    run_block<2>(rows.size(), x.of(rows), w, 4 * kTile, 2 * kTile, x.pairs, [&](int64_t r, const F(&acc)[2]) {
      bf16* act = args.act + (job.pair_begin + rows.begin + r) * act_width + s * cut.padded() + t * kTile;
      Vec::store_bf16(act, Vec::mul(silu(acc[0]), acc[1]));
    });
  }
}

void experts_gate_up(const ExpertsArgs& args, const Lane& lane) {
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const int64_t units = args.num_cuts * cut.tiles();  // per job
  int64_t total = 0;
  for (int j = 0; j < args.num_jobs; ++j) total += cost_of(args.jobs[j]) * units;
  const int64_t from = total * lane.thread / lane.num_threads, to = total * (lane.thread + 1) / lane.num_threads;
  int64_t at = 0;
  for (int j = 0; j < args.num_jobs && at < to; ++j) {
    const ExpertJob& job = args.jobs[j];
    const int64_t cost = cost_of(job);
    // Unit u belongs to the lane whose range holds its start.
    const int64_t first = from > at ? div_up(from - at, cost == 0 ? 1 : cost) : 0;
    const int64_t last = to - at < cost * units ? div_up(to - at, cost == 0 ? 1 : cost) : units;
    at += cost * units;
    if (cost == 0 || first >= last) continue;
    const int32_t* rows = args.pair_rows + job.pair_begin;
    const RowBlocks x =
        gather_rows(lane.scratch, job.num_pairs, div_up(args.hidden, 2), [&](int64_t r) { return args.x + rows[r] * args.hidden; });
    for (int64_t u = first; u < last; ++u)
      gate_up_tile(args, job, x, cut, static_cast<int32_t>(u / cut.tiles()), u % cut.tiles());
  }
}

// One block of rows × C tiles through all cuts of a job: the cuts' contributions meet in `local`, in the first-level cache, and
// are added to the rows' sums once. (Integers: the same bits as adding each by itself.)
template <int C>
MOEBIUS_INLINE void down_block(const ExpertsArgs& args, const ExpertJob& job, const MlpCut& cut, const RowBlocks& x, Range rows, int64_t t,
                               float scale) {
  const PackedMatrix down = cut.down();
  const int64_t pairs = down.k_pairs(), n0 = t * kTile;
  alignas(64) int64_t local[Vec::kRows * C * kTile];
  const int32_t* row_of = args.pair_rows + job.pair_begin + rows.begin;
  __builtin_memset(local, 0, static_cast<size_t>(rows.size()) * C * kTile * sizeof(int64_t));
  for (int32_t s = 0; s < args.num_cuts; ++s)
    run_block<C>(rows.size(), x.of(rows) + s * pairs * rows.size(), job.cuts[s] + cut.gate_up_elements() + t * down.tile_elements(),
                 2 * kTile, down.tile_elements(), pairs, [&](int64_t r, const F(&acc)[C]) {
                   const F factor = Vec::set1(args.pair_weights[job.pair_begin + rows.begin + r] * scale);
                   for (int c = 0; c < C; ++c) {
                     const F v = Vec::mul(acc[c], factor);
                     const uint32_t good = Vec::less(Vec::abs(v), Vec::set1(args.out.limit));
                     if (good != 0xffffu) __atomic_store_n(args.out.flags + row_of[r], uint8_t{1}, __ATOMIC_RELAXED);
                     Vec::add_fixed(local + (r * C + c) * kTile, v, good);
                   }
                 });
  const int64_t width = args.hidden - n0 < C * kTile ? args.hidden - n0 : C * kTile;  // outputs past hidden are products with 0
  for (int64_t r = 0; r < rows.size(); ++r) {
    int64_t* sum = args.out.sum + row_of[r] * args.hidden + n0;
    for (int64_t i = 0; i < width; ++i) sum[i] = static_cast<int64_t>(static_cast<uint64_t>(sum[i]) + static_cast<uint64_t>(local[r * C * kTile + i]));
  }
}

MOEBIUS_INLINE void down_block_plain(const ExpertsArgs& args, const ExpertJob& job, const MlpCut& cut, const RowBlocks& x, Range rows,
                                     Range tiles) {
  const PackedMatrix down = cut.down();
  for (int32_t s = 0; s < args.num_cuts; ++s)
    for (int64_t t = tiles.begin; t < tiles.end; ++t)
      run_block<1>(rows.size(), x.of(rows) + s * down.k_pairs() * rows.size(),
                   job.cuts[s] + cut.gate_up_elements() + t * down.tile_elements(), 2 * kTile, 0, down.k_pairs(),
                   [&](int64_t r, const F(&acc)[1]) {
                     const int64_t pair = job.pair_begin + rows.begin + r;
                     add_contributions(args.out, args.pair_rows[pair], args.hidden, t * kTile, Vec::mul(acc[0], Vec::set1(args.pair_weights[pair])));
                   });
}

void experts_down(const ExpertsArgs& args, const Lane& lane) {
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const int64_t act_width = args.num_cuts * cut.padded();
  const Range tiles = share_of(cut.down().tiles(), lane.thread, lane.num_threads);
  if (tiles.empty()) return;
  clear_sums(args.out, args.zero_rows, args.hidden, columns_of(tiles, args.hidden));
  for (int j = 0; j < args.num_jobs; ++j) {
    const ExpertJob& job = args.jobs[j];
    if (job.num_pairs == 0) continue;
    const RowBlocks x =
        gather_rows(lane.scratch, job.num_pairs, act_width / 2, [&](int64_t r) { return args.act + (job.pair_begin + r) * act_width; });
    if (args.out.plain) {
      for (int64_t b = 0; b < x.blocks; ++b) down_block_plain(args, job, cut, x, x.block(b), tiles);
      continue;
    }
    for (int64_t t = tiles.begin; t < tiles.end; t += 2)
      for (int64_t b = 0; b < x.blocks; ++b) {
        if (t + 1 < tiles.end) down_block<2>(args, job, cut, x, x.block(b), t, args.out.scale);
        else down_block<1>(args, job, cut, x, x.block(b), t, args.out.scale);
      }
  }
}

}  // namespace MOEBIUS_ISA
