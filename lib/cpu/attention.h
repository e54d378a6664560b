// Attention over paged KV. A block of query rows (rows × the query heads that share a KV head) walks the splits of
// kAttentionSplit tokens in order; each split has its own maximum, sum and output, merged into the row's running ones.
//
// Everything about a row is decided by its position: scores are chains along head_dim, the exponentials' sum takes token t in
// lane t mod 16, outputs add tokens in order, a split ends at the row's position. Slots beyond it are never read into a sum
// (they may hold NaN): the last scores are masked by selection, and the value loop of each row ends where the row ends.
#pragma once

#include "lib/cpu/math.h"

namespace MOEBIUS_ISA {

// Query rows of a block. The scores of a block are kBlockRows × kAttentionSplit floats: 12 KiB, half of a small L1 cache.
constexpr int64_t kBlockRows = 12;
constexpr int64_t kValueTiles = 4;  // 16-float pieces of an output kept in registers

struct QueryBlock {
  int64_t num = 0;             // ≤ kBlockRows
  int64_t end[kBlockRows];     // tokens the row sees: position + 1
  const bf16* q[kBlockRows];
  bf16* out[kBlockRows];
};

struct BlockScratch {
  Pair* q;         // gathered rows
  float* scores;   // [kBlockRows][kAttentionSplit]
  float* part;     // [kBlockRows][head_dim] output of one split
  float* total;    // [kBlockRows][head_dim]
};

// part[r] = Σ_t p[t]·V[t] over tokens [0, count) of the split, in order, for one row's tiles [d0, d0 + C).
template <int R, int C, class ValueAt>
MOEBIUS_INLINE void add_values(const float* p, int64_t from, int64_t count, int64_t d0, float* part, int64_t stride, ValueAt value) {
  F acc[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = Vec::load(part + r * stride + d0 + c * kTile);
  for (int64_t t = from; t < count; ++t) {
    const bf16* v = value(t) + d0;
    F x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[c] = Vec::load_bf16(v + c * kTile);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const F weight = Vec::set1(p[r * kAttentionSplit + t]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = Vec::fma(weight, x[c], acc[r][c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) Vec::store(part + r * stride + d0 + c * kTile, acc[r][c]);
}

template <int R, class ValueAt>
MOEBIUS_INLINE void add_value_rows(const float* p, int64_t from, int64_t count, int64_t dim, float* part, int64_t stride, ValueAt value) {
  int64_t d = 0;
  for (; d + kValueTiles * kTile <= dim; d += kValueTiles * kTile) add_values<R, kValueTiles>(p, from, count, d, part, stride, value);
  for (; d + kTile <= dim; d += kTile) add_values<R, 1>(p, from, count, d, part, stride, value);
  if (d < dim)  // a head_dim that is no multiple of 16
    for (int r = 0; r < R; ++r)
      for (int64_t t = from; t < count; ++t) {
        const bf16* v = value(t);
        for (int64_t i = d; i < dim; ++i) {
          float* o = part + r * stride + i;
          *o = *o + p[r * kAttentionSplit + t] * to_float(v[i]);
        }
      }
}

// All rows of a block together as far as all of them see, then each on its own: the order of tokens is the same either way.
template <int R, class ValueAt>
MOEBIUS_INLINE void weigh_values(const float* scores, const int64_t* counts, int64_t num, int64_t dim, float* part, int64_t stride,
                                 ValueAt value) {
  for (int64_t r = 0; r < num;) {
    if (num - r >= R) {
      int64_t least = counts[r];
      for (int i = 1; i < R; ++i) least = counts[r + i] < least ? counts[r + i] : least;
      add_value_rows<R>(scores + r * kAttentionSplit, 0, least, dim, part + r * stride, stride, value);
      for (int i = 0; i < R; ++i)
        if (counts[r + i] > least)
          add_value_rows<1>(scores + (r + i) * kAttentionSplit, least, counts[r + i], dim, part + (r + i) * stride, stride, value);
      r += R;
    } else {
      add_value_rows<1>(scores + r * kAttentionSplit, 0, counts[r], dim, part + r * stride, stride, value);
      ++r;
    }
  }
}

MOEBIUS_INLINE void attend_block(const KvView& kv, int64_t local_head, const int32_t* pages, float softmax_scale, const QueryBlock& block,
                                 const BlockScratch& s) {
  const int64_t dim = kv.head_dim, stride = round_up(dim, kTile);
  const KvSlice slice{kv.page_tokens, dim};
  const auto page_at = [&](int64_t token) {
    return reinterpret_cast<const bf16*>(kv.base + (pages[token / kv.page_tokens] * int64_t{kv.num_kv_heads} + local_head) * slice.bytes());
  };
  const RowBlocks q = gather_rows(reinterpret_cast<std::byte*>(s.q), block.num, div_up(dim, 2), [&](int64_t r) { return block.q[r]; });
  int64_t longest = 0;
  for (int64_t r = 0; r < block.num; ++r) longest = block.end[r] > longest ? block.end[r] : longest;
  float most[kBlockRows], sum[kBlockRows];

  for (int64_t begin = 0; begin < longest; begin += kAttentionSplit) {
    const int64_t end = longest < begin + kAttentionSplit ? longest : begin + kAttentionSplit;
    for (int64_t t = begin; t < end; t += kTile) {  // a tile never crosses a page: page sizes are multiples of it
      const bf16* keys = page_at(t) + (t % kv.page_tokens) / kTile * kTile * round_up(dim, 2);
      for (int64_t b = 0; b < q.blocks; ++b) {
        const Range rows = q.block(b);
        with_rows(rows.size(), [&]<int R>() MOEBIUS_INLINE_LAMBDA {
          F acc[R][1];
          tile_block<R, 1>(q.of(rows), R, keys, 2 * kTile, 0, q.pairs, {reinterpret_cast<const char*>(keys), 0}, acc);
          for (int r = 0; r < R; ++r)
            Vec::store(s.scores + (rows.begin + r) * kAttentionSplit + (t - begin), Vec::mul(acc[r][0], Vec::set1(softmax_scale)));
        });
      }
    }
    int64_t counts[kBlockRows];
    float split_most[kBlockRows], split_sum[kBlockRows];
    for (int64_t r = 0; r < block.num; ++r) {
      counts[r] = block.end[r] <= begin ? 0 : (block.end[r] < end ? block.end[r] : end) - begin;
      float* p = s.scores + r * kAttentionSplit;
      F high = Vec::set1(-kInfinity);
      for (int64_t i = 0; i < counts[r]; i += kTile) {
        const int n = counts[r] - i < kTile ? static_cast<int>(counts[r] - i) : kTile;
        high = Vec::max(high, n == kTile ? Vec::load(p + i) : Vec::load_n(p + i, n, -kInfinity));  // NaN scores come through
      }
      split_most[r] = Vec::max_of(high);
      F sums = Vec::zero();
      for (int64_t i = 0; i < counts[r]; i += kTile) {
        const int n = counts[r] - i < kTile ? static_cast<int>(counts[r] - i) : kTile;
        F e = exp_of(Vec::sub(n == kTile ? Vec::load(p + i) : Vec::load_n(p + i, n, -kInfinity), Vec::set1(split_most[r])));
        if (n < kTile) e = Vec::select_first(n, e, Vec::zero());
        Vec::store_n(p + i, e, n);
        sums = Vec::add(sums, e);
      }
      split_sum[r] = Vec::sum(sums);
      for (int64_t i = 0; i < stride; ++i) s.part[r * stride + i] = 0;
    }
    weigh_values<Vec::kRowsOut>(s.scores, counts, block.num, dim, s.part, stride,
                                [&](int64_t t) { return page_at(begin + t) + slice.v_index((begin + t) % kv.page_tokens, 0); });
    for (int64_t r = 0; r < block.num; ++r) {
      if (counts[r] == 0) continue;
      float* total = s.total + r * stride;
      const float* part = s.part + r * stride;
      if (begin == 0) {
        most[r] = split_most[r];
        sum[r] = split_sum[r];
        for (int64_t i = 0; i < dim; ++i) total[i] = part[i];
        continue;
      }
      const float higher = most[r] > split_most[r] ? most[r] : split_most[r];
      const float a = exp_of(most[r] - higher), b = exp_of(split_most[r] - higher);
      most[r] = higher;
      sum[r] = sum[r] * a + split_sum[r] * b;
      for (int64_t i = 0; i < dim; ++i) total[i] = total[i] * a + part[i] * b;
    }
  }
  for (int64_t r = 0; r < block.num; ++r) {
    const float inverse = 1.0f / sum[r];
    for (int64_t i = 0; i < dim; ++i) block.out[r][i] = to_bf16(s.total[r * stride + i] * inverse);
  }
}

MOEBIUS_INLINE int64_t attention_scratch_bytes(int64_t head_dim) {
  const int64_t stride = round_up(head_dim, kTile);
  return kBlockRows * (round_up(head_dim, 2) * 2 + kAttentionSplit * 4 + 2 * stride * 4) + 256;
}

void attention(const AttentionArgs& args, const Lane& lane) {
  const int64_t dim = args.kv.head_dim, stride = round_up(dim, kTile), width = args.num_heads * dim;
  BlockScratch s;
  s.scores = reinterpret_cast<float*>(lane.scratch);
  s.part = s.scores + kBlockRows * kAttentionSplit;
  s.total = s.part + kBlockRows * stride;
  s.q = reinterpret_cast<Pair*>(s.total + kBlockRows * stride);

  // Units: (chunk, KV head, block of rows); a unit's cost is the tokens its rows see. Each lane takes the units that begin in
  // its share of the total cost.
  const auto for_each_unit = [&](auto&& visit) {
    for (int c = 0; c < args.num_chunks; ++c) {
      const SequenceChunk& chunk = args.chunks[c];
      for (int32_t j = 0; j < args.kv.num_kv_heads; ++j) {
        const int64_t heads = args.heads_of_kv[j].size();
        if (heads == 0) continue;
        const int64_t step = heads >= kBlockRows ? 1 : kBlockRows / heads;
        for (int64_t row = 0; row < chunk.num_rows; row += step) {
          const int64_t rows = chunk.num_rows - row < step ? chunk.num_rows - row : step;
          visit(chunk, j, row, rows, rows * (chunk.first_position + row + rows));
        }
      }
    }
  };
  int64_t total = 0;
  for_each_unit([&](const SequenceChunk&, int32_t, int64_t, int64_t, int64_t cost) { total += cost; });
  const int64_t from = total * lane.thread / lane.num_threads, to = total * (lane.thread + 1) / lane.num_threads;
  int64_t at = 0;
  for_each_unit([&](const SequenceChunk& chunk, int32_t j, int64_t first, int64_t rows, int64_t cost) {
    const bool mine = at >= from && at < to;
    at += cost;
    if (!mine) return;
    const Range heads = args.heads_of_kv[j];
    QueryBlock block;
    const auto flush = [&] {
      if (block.num > 0) attend_block(args.kv, j, chunk.pages, args.softmax_scale, block, s);
      block.num = 0;
    };
    for (int64_t row = first; row < first + rows; ++row)
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        const int64_t at_row = (chunk.row_begin + row) * width + head * dim;
        block.end[block.num] = chunk.first_position + row + 1;
        block.q[block.num] = args.q + at_row;
        block.out[block.num] = args.out + at_row;
        if (++block.num == kBlockRows) flush();
      }
    flush();
  });
}

}  // namespace MOEBIUS_ISA
