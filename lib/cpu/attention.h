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
constexpr int64_t kValueTiles = Vec::kFewRegisters ? 1 : 4;  // 16-float pieces of an output kept in registers

struct QueryBlock {
  int64_t num = 0;                 // ≤ kBlockRows
  int64_t kv_head = 0;             // local
  const int32_t* pages = nullptr;  // of the rows' sequence
  int64_t longest = 0;             // the largest of end
  int64_t end[kBlockRows];         // tokens the row sees: position + 1
  const bf16* q[kBlockRows];
  bf16* out[kBlockRows];
};

struct BlockScratch {
  Laid* q;        // gathered rows
  float* scores;  // [kBlockRows][kAttentionSplit]
  float* part;    // [kBlockRows][head_dim] output of one split
  float* total;   // [kBlockRows][head_dim]
};

// Where the KV of one sequence's local head lies.
struct KvWalk {
  KvSlice slice;
  const std::byte* base;  // of the head in page 0
  int64_t page_bytes;
  const int32_t* pages;

  MOEBIUS_INLINE KvWalk(const KvView& kv, int64_t kv_head, const int32_t* page_table)
      : slice{kv.page_tokens, kv.head_dim},
        base(kv.base + kv_head * slice.bytes()),
        page_bytes(kv.num_kv_heads * slice.bytes()),
        pages(page_table) {}
  MOEBIUS_INLINE const bf16* page_of(int64_t token) const {
    return reinterpret_cast<const bf16*>(base + pages[token / slice.page_tokens] * page_bytes);
  }
  // The tile of keys that begins at `token`, a multiple of the tile.
  MOEBIUS_INLINE const bf16* keys(int64_t token) const { return page_of(token) + slice.k_index(token % slice.page_tokens, 0); }
  MOEBIUS_INLINE const f16* values(int64_t token) const { return page_of(token) + slice.v_index(token % slice.page_tokens, 0); }
};

// Some tokens of one walk.
struct Tokens {
  const KvWalk& kv;
  int64_t begin, count;

  MOEBIUS_INLINE int64_t tiles() const { return div_up(count, kTile); }
  // What is read of them comes in pieces: each tile's keys, then each tile's values. (No tile crosses a page: pages are multiples of it.)
  MOEBIUS_INLINE const char* piece(int64_t i) const {
    return i < tiles() ? reinterpret_cast<const char*>(kv.keys(begin + i * kTile))
                       : reinterpret_cast<const char*>(kv.values(begin + (i - tiles()) * kTile));
  }
};

// While a piece is worked on, the one kLeadPieces later is fetched, a line at a time: memory is busy all the while, through the
// softmax too.
constexpr int64_t kLeadPieces = 4;

struct Split {
  Tokens now;
  Tokens next;  // what is read after it: the next split of the same rows, or the first of the block worked on after; may be none

  // Where the piece is that is fetched while piece i is worked on, or what is as good if nothing is left to be fetched.
  MOEBIUS_INLINE const char* ahead_of(int64_t i) const {
    i += kLeadPieces;
    if (i < 2 * now.tiles()) return now.piece(i);
    i -= 2 * now.tiles();
    return i < 2 * next.tiles() ? next.piece(i) : now.piece(0);
  }
};

// part[r] += Σ_t p[t]·V[t] over tokens [from, to) of the split, in order, for R rows × C tiles from d0 on.
template <int R, int C>
MOEBIUS_INLINE void add_values(const Split& split, int64_t from, int64_t to, const float* p, int64_t d0,
                               float* part, int64_t stride) {
  constexpr int kTilesPerLine = kLineBytes / 2 / kTile;
  const KvWalk& kv = split.now.kv;
  F acc[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = Vec::load(part + r * stride + d0 + c * kTile);
  for (int64_t t = from; t < to;) {
    const f16* v = kv.values(split.now.begin + t) + d0;
    const int64_t tile_end = (t / kTile + 1) * kTile, run_end = tile_end < to ? tile_end : to;
    const char* ahead = split.ahead_of(split.now.tiles() + t / kTile) + (t % kTile * kv.slice.head_dim + d0) * 2;
    for (; t < run_end; ++t, v += kv.slice.head_dim, ahead += kv.slice.head_dim * 2) {
      F x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        x[c] = Vec::load_half(v + c * kTile);
        if (c % kTilesPerLine == 0) __builtin_prefetch(ahead + c * kTile * 2);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const F weight = Vec::set1(p[r * kAttentionSplit + t]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = Vec::fma(weight, x[c], acc[r][c]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) Vec::store(part + r * stride + d0 + c * kTile, acc[r][c]);
}

template <int R>
MOEBIUS_INLINE void add_value_rows(const Split& split, int64_t from, int64_t to, const float* p, float* part,
                                   int64_t stride) {
  const int64_t dim = split.now.kv.slice.head_dim;
  int64_t d = 0;
  for (; d + kValueTiles * kTile <= dim; d += kValueTiles * kTile) add_values<R, kValueTiles>(split, from, to, p, d, part, stride);
  for (; d + kTile <= dim; d += kTile) add_values<R, 1>(split, from, to, p, d, part, stride);
  if (d < dim)  // a head_dim that is no multiple of 16
    for (int r = 0; r < R; ++r)
      for (int64_t t = from; t < to; ++t) {
        const f16* v = split.now.kv.values(split.now.begin + t);
        for (int64_t i = d; i < dim; ++i) {
          float* o = part + r * stride + i;
          *o = *o + p[r * kAttentionSplit + t] * half_to_float(v[i]);
        }
      }
}

// Rows of a block together as far as all of them see, then each on its own: the order of tokens is the same either way.
MOEBIUS_INLINE void weigh_values(const Split& split, const float* scores, const int64_t* counts, int64_t num,
                                 float* part, int64_t stride) {
  for (int64_t r = 0, n; r < num; r += n) {
    n = num - r < Vec::kRowsOut ? num - r : Vec::kRowsOut;
    int64_t least = counts[r];
    for (int64_t i = r + 1; i < r + n; ++i) least = counts[i] < least ? counts[i] : least;
    with_rows<Vec::kRowsOut>(n, [&]<int R>() MOEBIUS_INLINE_LAMBDA {
      add_value_rows<R>(split, 0, least, scores + r * kAttentionSplit, part + r * stride, stride);
    });
    for (int64_t i = r; i < r + n; ++i)
      if (counts[i] > least) add_value_rows<1>(split, least, counts[i], scores + i * kAttentionSplit, part + i * stride, stride);
  }
}

// Scores of C tiles of tokens from tile `first` of the split on, for all rows of a block. (No two of them need lie in one page.)
template <int C>
[[gnu::noinline]] void score_tiles(const Split& split, const RowBlocks& q, int64_t first, float softmax_scale, float* scores) {
  Streams<C> keys, ahead;
  keys.step = ahead.step = kLineBytes;
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    keys.at[c] = split.now.piece(first + c);
    ahead.at[c] = split.ahead_of(first + c);
  }
  for (int64_t b = 0; b < q.blocks; ++b) {
    const Range rows = q.block(b);
    with_block(rows.size(), [&]<class N>(N n) MOEBIUS_INLINE_LAMBDA {
      const int R = n;
      if constexpr (kBeside<N, C>) {
        F acc[kMost<N>][C];
        tile_block<C>(n, q.of(rows.begin, R), keys, q.pairs, ahead, acc);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c)
            Vec::store(scores + (rows.begin + r) * kAttentionSplit + (first + c) * kTile, Vec::mul(acc[r][c], Vec::set1(softmax_scale)));
      }
    });
  }
}

// `after` is the block that is worked on next; it may be empty.
MOEBIUS_INLINE void attend_block(const KvView& view, float softmax_scale, float value_unscale, const QueryBlock& block, const QueryBlock& after,
                                 const BlockScratch& s) {
  const KvWalk kv(view, block.kv_head, block.pages), kv_after(view, after.kv_head, after.pages);
  const int64_t dim = kv.slice.head_dim, stride = round_up(dim, kTile), longest = block.longest;
  const RowBlocks q = gather_rows(reinterpret_cast<std::byte*>(s.q), block.num, div_up(dim, 2),
                                  [&](int64_t r) MOEBIUS_INLINE_LAMBDA { return block.q[r]; });
  float most[kBlockRows], sum[kBlockRows];

  for (int64_t begin = 0; begin < longest; begin += kAttentionSplit) {
    const int64_t end = longest < begin + kAttentionSplit ? longest : begin + kAttentionSplit;
    const bool last = end == longest;
    const int64_t left = last ? (after.num > 0 ? after.longest : 0) : longest - end;
    const Split split{{kv, begin, end - begin}, {last ? kv_after : kv, last ? 0 : end, left < kAttentionSplit ? left : kAttentionSplit}};
    for_tiles({0, split.now.tiles()}, block.num,
              [&]<int C>(int64_t t) MOEBIUS_INLINE_LAMBDA { score_tiles<C>(split, q, t, softmax_scale, s.scores); });
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
    weigh_values(split, s.scores, counts, block.num, s.part, stride);
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
    const float inverse = 1.0f / sum[r] * value_unscale;
    for (int64_t i = 0; i < dim; ++i) block.out[r][i] = to_bf16(s.total[r * stride + i] * inverse);
  }
}

MOEBIUS_INLINE int64_t attention_scratch_bytes(int64_t head_dim) {
  const int64_t stride = round_up(head_dim, kTile);
  return laid_bytes(kBlockRows, div_up(head_dim, 2)) + kBlockRows * (kAttentionSplit + 2 * stride) * 4 + 256;
}

void attention(const AttentionArgs& args, const Lane& lane) {
  const int64_t dim = args.kv.head_dim, stride = round_up(dim, kTile), width = args.num_heads * dim;
  [[maybe_unused]] const Vec::Unit unit;
  BlockScratch s;
  s.scores = reinterpret_cast<float*>(lane.scratch);
  s.part = s.scores + kBlockRows * kAttentionSplit;
  s.total = s.part + kBlockRows * stride;
  s.q = reinterpret_cast<Laid*>(s.total + kBlockRows * stride);

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
  // One block is filled, then the one before is worked on.
  QueryBlock blocks[2];
  int filling = 0;
  const auto turn = [&] {
    const QueryBlock& filled = blocks[filling];
    filling ^= 1;
    QueryBlock& before = blocks[filling];
    if (before.num > 0) attend_block(args.kv, args.softmax_scale, 1.0f / args.value_scale, before, filled, s);
    before.num = 0;
  };
  int64_t at = 0;
  for_each_unit([&](const SequenceChunk& chunk, int32_t j, int64_t first, int64_t rows, int64_t cost) {
    const bool mine = at >= from && at < to;
    at += cost;
    if (!mine) return;
    const Range heads = args.heads_of_kv[j];
    for (int64_t row = first; row < first + rows; ++row)
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        QueryBlock& block = blocks[filling];
        const int64_t at_row = (chunk.row_begin + row) * width + head * dim;
        block.kv_head = j;
        block.pages = chunk.pages;
        block.longest = block.end[block.num] = chunk.first_position + row + 1;  // rows come in the order of positions
        block.q[block.num] = args.q + at_row;
        block.out[block.num] = args.out + at_row;
        if (++block.num == kBlockRows) turn();
      }
    if (blocks[filling].num > 0) turn();
  });
  turn();
}

}  // namespace MOEBIUS_ISA
