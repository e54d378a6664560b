// A warp works on 16 query rows of one KV head: rows of one chunk times the query heads that share the head. It walks splits of
// kSplitTokens tokens at absolute positions. Each split has its own (maximum, sum, output); they are merged in order. So a row's bits
// depend on its position alone, whether one warp walks all splits (prompts, large batches) or each split has a warp of its own and the
// last of them merges (few rows, long contexts). Which of the two is decided on the device, where the chunks' lengths are known: a
// captured step serves any lengths.
//
// Where chunks are of one row each, Q, K and V may come as the projection left them (rope_attention): a warp turns its queries in registers, each
// split's anew, and the warp with the row's own token puts its K and V into their page before it reads them.
//
// Floors. Decode: K and V of each KV head once, 4 · tokens · head_dim bytes. Prompts: 4 · rows · tokens / 2 · heads · head_dim operations.
//
// Fragments, for lane 4·g + t. Scores of 32 tokens, two tiles of keys, are Q · Kᵀ in four products of 8 tokens: a load of 16 bytes of a key
// tile is 4 tokens at one pair of dimensions, and product b takes token b of the four, so that its column n is token 4·(n mod 4) + b of
// tile n / 4. Pairs of dimensions are taken as cuda/fragments.h takes those of k. A lane's scores are then of the 8 tokens 16·(t / 2) +
// 8·(t mod 2) … + 7 in rows g and g + 8, and stand where P · V wants its left operand. For V a lane loads 8 dimensions, 8g … 8g + 7 of each
// 64, of its 8 tokens: product j takes dimension j of these, and leaves row g, dimensions 16t + j and 16t + 8 + j with the lane.
//
// P is rounded to f16 (it is in [0, 1], so by at most 2^-11 of itself or 2^-25), as V is stored; sums are float.
#include "cuda/attention.h"

#include <algorithm>

#include "cuda/fragments.h"
#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/rope.h"
#include "cuda/rows.h"
#include "cuda/scratch.h"

namespace moebius::cuda {
namespace {

constexpr int kWarps = 4;         // of a block; they share the cache
constexpr int kRows = 16;         // query rows of a warp
constexpr int kStep = 64;         // tokens between two looks at the maximum
constexpr int kSplitTokens = 128;  // shorter than the CPU's kAttentionSplit: a warp's steps wait one for the other
constexpr int kGroupTokens = 32;  // two tiles of keys
constexpr int kLineBytes = 128;
constexpr float kLog2E = 1.44269504f;
constexpr int kGroupsWithRoom = 2;  // of 64 dimensions: larger heads leave no registers for rope_attention and for two kinds of steps
constexpr int kPrefetchBytes = 16 << 20;  // of all warps together: it has to stay in the second-level cache until it is read
// Splits that may wait to be merged: some 4 for each warp that a device runs. (Few where kernels are emulated: tests want both ways.)
#ifdef MOEBIUS_EMULATED
constexpr int kMaxPartials = 64;
#else
constexpr int kMaxPartials = 4096;
#endif
static_assert(kMaxPartials <= kCounters);
constexpr int kMaxChunks = 4096;    // of one launch

struct Heads {
  int first[kGpuMaxKvHeads], count[kGpuMaxKvHeads];  // of each local KV head, its local query heads
};

// A row's running softmax: of rows g and g + 8, of this lane's part of the tokens (sum) and of the dimensions (output).
template <int kGroups>
struct State {
  float most[2], sum[2], output[kGroups][8][4];

  __device__ void clear() {
    for (int r = 0; r < 2; ++r) most[r] = -__uint_as_float(0x7f800000u), sum[r] = 0;
#pragma unroll
    for (int q = 0; q < kGroups; ++q)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) output[q][j][e] = 0;
  }
  // As kWords words of 32 lanes each.
  static constexpr int kWords = kGroups * 32 + 4;
  template <class F>
  __device__ __forceinline__ void for_words(F&& f) {
    int at = 0;
#pragma unroll
    for (int q = 0; q < kGroups; ++q)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(at++, output[q][j][e], e / 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) f(at++, sum[r], r);
#pragma unroll
    for (int r = 0; r < 2; ++r) f(at++, most[r], r);
  }
};

__device__ __forceinline__ float scale_from(float from, float to, float to_exponent) { return from == to ? 1.0f : exp2_of((from - to) * to_exponent); }

// `words` holds a state as for_words goes; adds `part` to it, for the rows that have tokens in the part.
template <int kGroups>
__device__ __forceinline__ void merge(float* words, State<kGroups>& part, const bool (&has)[2], float to_exponent) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float old_scale[2], new_scale[2], most[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float before = words[(State<kGroups>::kWords - 2 + r) * 32 + lane];
    most[r] = larger(before, part.most[r]);
    old_scale[r] = scale_from(before, most[r], to_exponent);
    new_scale[r] = scale_from(part.most[r], most[r], to_exponent);
  }
  part.for_words([&](int at, float& v, int r) {
    float& total = words[at * 32 + lane];
    if (!has[r]) return;
    total = at < State<kGroups>::kWords - 2 ? __fmaf_rn(total, old_scale[r], v * new_scale[r]) : most[r];
  });
}

// What a warp works on.
struct Unit {
  int kv_head = 0, heads = 0;         // the query heads of a row: first … first + heads − 1
  int first_row = 0, first_head = 0;  // of the step; of the rank
  int m0 = 0, num_m = 0;              // its query rows are m0 … of the chunk's rows × heads; none where a head has fewer than others
  int first_position = 0;
  const int32_t* pages = nullptr;

  __device__ int row_of(int m) const { return (m0 + min(m, num_m - 1)) / heads; }   // of the chunk; past the last it repeats
  __device__ int head_of(int m) const { return first_head + (m0 + min(m, num_m - 1)) % heads; }
  __device__ int position_of(int m) const { return first_position + row_of(m); }
  __device__ int end() const { return position_of(num_m - 1) + 1; }                 // tokens that any of its rows sees
};

// The work of a launch as items: for each chunk the KV heads, for each of these its units, so that the warps of a block read the same K and V,
// and for each of these its splits where they have warps of their own. begin[c] is the first item of chunk c. Every block makes it for itself
// from the chunks.
struct Work {
  int begin[kMaxChunks + 1];
  bool spread;
};

__device__ __forceinline__ int units_of(const SequenceChunk& chunk, int heads) { return (chunk.num_rows * heads + kRows - 1) / kRows; }
__device__ __forceinline__ int splits_of(int end) { return (end + kSplitTokens - 1) / kSplitTokens; }
__device__ __forceinline__ int splits_of(const SequenceChunk& chunk) { return splits_of(chunk.first_position + chunk.num_rows); }

__device__ void block_list_work(Work& work, const AttentionArgs& args, int most_heads) {
  if (threadIdx.x < 32) {
    const auto list = [&](bool spread) {
      if (threadIdx.x == 0) work.spread = spread;
      return warp_lay_end_to_end(work.begin, args.num_chunks, [&](int c) {
        const SequenceChunk chunk = load_early(args.chunks + c);
        const int alone = units_of(chunk, most_heads) * args.kv.num_kv_heads;
        return !spread ? alone : static_cast<int>(min(int64_t{alone} * splits_of(chunk), int64_t{kMaxPartials + 1}));  // no sum of them overflows
      });
    };
    if (list(true) > kMaxPartials) list(false);
  }
  __syncthreads();
}

// An item: a unit and, where they are spread, one of its chunk's splits.
__device__ Unit unit_at(const Work& work, const AttentionArgs& args, const Heads& heads, int most_heads, int item, int* split) {
  const int c = holder_of(args.num_chunks, [&](int i) { return work.begin[i]; }, item);
  const SequenceChunk chunk = args.chunks[c];
  const int units = units_of(chunk, most_heads), splits = work.spread ? splits_of(chunk) : 1, at = item - work.begin[c];
  *split = at % splits;
  Unit u;
  u.kv_head = at / splits / units;
  u.heads = heads.count[u.kv_head];
  u.first_head = heads.first[u.kv_head];
  u.first_row = chunk.row_begin;
  u.m0 = at / splits % units * kRows;
  u.num_m = min(chunk.num_rows * u.heads - u.m0, kRows);
  u.first_position = chunk.first_position;
  u.pages = chunk.pages;
  return u;
}

// K and V of one local head of one layer.
struct KvWalk {
  const char* base;
  int64_t page_bytes, value_bytes;
  int page_tiles, head_dim;
  float pages_of_tile;
  const int32_t* pages;

  __device__ KvWalk(const KvView& kv, int kv_head, const int32_t* page_table)
      : page_tiles(kv.page_tokens / kTile), head_dim(kv.head_dim), pages_of_tile(1.0f / static_cast<float>(page_tiles)), pages(page_table) {
    const KvSlice slice{kv.page_tokens, kv.head_dim};
    base = reinterpret_cast<const char*>(kv.base) + kv_head * slice.bytes();
    page_bytes = kv.num_kv_heads * slice.bytes();
    value_bytes = slice.k_elements() * 2;
  }
  // The tile that begins at `token`: its keys; its values are value_bytes behind.
  static_assert(kGpuMaxContext / kTile <= 1 << 21);
  __device__ const char* tile(int token) const {
    const int number = token / kTile;
    // number / page_tiles: the half keeps it off whole numbers by more than it is rounded.
    const int page = static_cast<int>((static_cast<float>(number) + 0.5f) * pages_of_tile);
    return base + pages[page] * page_bytes + (number - page * page_tiles) * (kTile * head_dim * 2);
  }
  // Tokens [begin, end), by the whole warp, tile for tile as they are read.
  __device__ void prefetch(int begin, int end) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int token = begin; token < end; token += kTile) {
      const char* lines = tile(token) + lane % 2 * value_bytes;
      const int bytes = (lane % 2 == 0 ? kTile : min(end - token, kTile)) * head_dim * 2;  // of keys the whole tile, whose tokens lie side by side
      for (int at = lane / 2 * kLineBytes; at < bytes; at += 16 * kLineBytes) prefetch_line(lines + at);
    }
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Of K and V; where other warps of the block read the same, through the first-level cache.
template <bool kOnce>
__device__ __forceinline__ uint4 load_kv(const char* p) {
  return kOnce ? load_written(reinterpret_cast<const uint4*>(p)) : *reinterpret_cast<const uint4*>(p);
}

// The kStep tokens from `step` on, those below `end`. kAll: each row sees all of them, and head_dim is 64·kGroups; the bits are the same.
// q: the lane's pairs of dimensions of rows g and g + 8, by blocks of 32 dimensions.
template <bool kAll, bool kOnce, int kGroups>
__device__ __forceinline__ void walk_step(const KvWalk& kv, int step, int end, const int (&position)[2], float to_exponent,
                                          const uint4 (&q)[2 * kGroups][2], State<kGroups>& state) {
  const int g = WeightStream::lane_g(), t = WeightStream::lane_t(), head_dim = kAll ? 64 * kGroups : kv.head_dim;
  float scores[2][4][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int b = 0; b < 4; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[half][b][e] = 0;
    const int tile = step + half * kGroupTokens + g / 4 * kTile;
    const bool there = kAll || tile < end;
    const char* keys = there ? kv.tile(tile) : nullptr;
#pragma unroll
    for (int d = 0; d < 2 * kGroups; ++d) {
      uint4 k[kLanePairs];
#pragma unroll
      for (int i = 0; i < kLanePairs; ++i) {
        const int pair = d * kBlockPairs + t * kLanePairs + i;
        k[i] = there && pair < head_dim / 2 ? load_kv<kOnce>(keys + (pair * 4 + g % 4) * 16) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const uint32_t first[4] = {q[d][0].x, q[d][1].x, q[d][0].y, q[d][1].y}, second[4] = {q[d][0].z, q[d][1].z, q[d][0].w, q[d][1].w};
        const uint32_t k_first[2] = {word_of(k[0], b), word_of(k[1], b)}, k_second[2] = {word_of(k[2], b), word_of(k[3], b)};
        mma_bf16(scores[half][b], first, k_first);
        mma_bf16(scores[half][b], second, k_second);
      }
    }
  }

  // Score e of product b is of token 4·(e mod 2) + b of the lane's eight, in row e / 2.
  const auto token_of = [&](int half, int i) { return step + half * kGroupTokens + 16 * (t / 2) + 8 * (t % 2) + i; };
  const auto sees = [&](int half, int b, int e) { return kAll || token_of(half, 4 * (e % 2) + b) <= position[e / 2]; };
  float most[2] = {-__uint_as_float(0x7f800000u), -__uint_as_float(0x7f800000u)};
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int b = 0; b < 4; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (sees(half, b, e)) most[e / 2] = larger(scores[half][b][e], most[e / 2]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = larger(most[r], __shfl_xor_sync(kAllLanes, most[r], 1));
    most[r] = larger(most[r], __shfl_xor_sync(kAllLanes, most[r], 2));
    most[r] = larger(most[r], state.most[r]);
    const float scale = scale_from(state.most[r], most[r], to_exponent);
    state.most[r] = most[r];
    state.sum[r] *= scale;
#pragma unroll
    for (int v = 0; v < kGroups; ++v)
#pragma unroll
      for (int j = 0; j < 8; ++j) state.output[v][j][2 * r] *= scale, state.output[v][j][2 * r + 1] *= scale;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int b = 0; b < 4; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[half][b][e] = sees(half, b, e) ? exp2_of((scores[half][b][e] - most[e / 2]) * to_exponent) : 0;
        state.sum[e / 2] += scores[half][b][e];
      }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int tile = step + half * kGroupTokens + t / 2 * kTile;
    const char* values = kAll || tile < end ? kv.tile(tile) + kv.value_bytes : nullptr;
#pragma unroll
    for (int two = 0; two < 4; two += 2) {  // products b = two and two + 1 are one of P · V
      const auto& low = scores[half][two];
      const auto& high = scores[half][two + 1];
      const uint32_t p[4] = {pack_f16(low[0], low[1]), pack_f16(low[2], low[3]), pack_f16(high[0], high[1]), pack_f16(high[2], high[3])};
#pragma unroll
      for (int v = 0; v < kGroups; ++v) {
        const int dim = v * 64 + 8 * g;
        uint4 x[4];  // of tokens two, two + 4, two + 1, two + 5 of the lane's eight
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 4 * (i % 2) + two + i / 2;
          const bool there = kAll || (token_of(half, token) < end && dim < head_dim);  // slots behind the end may hold anything
          x[i] = there ? load_kv<kOnce>(values + ((8 * (t % 2) + token) * head_dim + dim) * 2) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const unsigned halves = j % 2 == 0 ? 0x5410u : 0x7632u;
          const uint32_t b[2] = {__byte_perm(word_of(x[0], j / 2), word_of(x[1], j / 2), halves),
                                 __byte_perm(word_of(x[2], j / 2), word_of(x[3], j / 2), halves)};
          mma_f16(state.output[v][j], p, b);
        }
      }
    }
  }
}

// Tokens [begin, end) of one split. lowest: of the warp's rows' positions.
template <bool kOnce, int kGroups>
__device__ __forceinline__ void walk_split(const KvWalk& kv, int begin, int end, const int (&position)[2], int lowest, float to_exponent,
                                           const uint4 (&q)[2 * kGroups][2], State<kGroups>& state) {
  for (int step = begin; step < end; step += kStep) {
    if (kGroups <= kGroupsWithRoom && step + kStep - 1 <= lowest && kv.head_dim == 64 * kGroups)
      walk_step<true, kOnce>(kv, step, end, position, to_exponent, q, state);
    else
      walk_step<false, kOnce>(kv, step, end, position, to_exponent, q, state);
  }
  // The four lanes of a row join their parts of the sum.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.sum[r] += __shfl_xor_sync(kAllLanes, state.sum[r], 1);
    state.sum[r] += __shfl_xor_sync(kAllLanes, state.sum[r], 2);
  }
}

template <int kGroups>
__device__ __forceinline__ void load_queries(const AttentionArgs& args, const Unit& u, uint4 (&q)[2 * kGroups][2]) {
  const int g = WeightStream::lane_g(), t = WeightStream::lane_t(), dim = args.kv.head_dim;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = g + 8 * r;
    const bf16* row = args.q + ((static_cast<int64_t>(u.first_row) + u.row_of(m)) * args.num_heads + u.head_of(m)) * dim;
#pragma unroll
    for (int d = 0; d < 2 * kGroups; ++d) {
      const int at = d * 32 + t * 8;
      q[d][r] = at < dim ? *reinterpret_cast<const uint4*>(row + at) : make_uint4(0, 0, 0, 0);
    }
  }
}

__device__ __forceinline__ uint4 to_words(const float (&v)[8]) {
  const uint2 low = bf16_piece(v), high = bf16_piece(v + 4);
  return make_uint4(low.x, low.y, high.x, high.y);
}

// The same from what the projection left, for a chunk of one row; head_dim = 64·kGroups, so that a lane's halves are its dimensions.
template <int kGroups>
__device__ __forceinline__ void rope_queries(const RopeStoreArgs& args, const Unit& u, const float* rope, uint4 (&q)[2 * kGroups][2]) {
  constexpr int kHalf = 32 * kGroups, kDim = 2 * kHalf;
  RopeHalves<kGroups> x;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r == 0 || u.num_m > 8) {
      const int64_t head = u.head_of(WeightStream::lane_g() + 8 * r);
      x.load(args.q + (static_cast<int64_t>(u.first_row) * args.num_heads + head) * kDim, kHalf);
      if (args.q_bias != nullptr) x.add(args.q_bias + head * kDim, kHalf);
      x.norm_and_rotate(args.q_norm, args.eps, rope, kHalf);
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      q[n][r] = to_words(x.low[n]);
      q[kGroups + n][r] = to_words(x.high[n]);
    }
  }
}

// K and V of such a chunk's row, into their page.
template <int kGroups>
__device__ __forceinline__ void rope_key(const RopeStoreArgs& args, const Unit& u, const float* rope) {
  constexpr int kHalf = 32 * kGroups;
  const int64_t at = (static_cast<int64_t>(u.first_row) * args.kv.num_kv_heads + u.kv_head) * 2 * kHalf;
  RopeHalves<kGroups> k, v;
  k.load(args.k + at, kHalf);
  v.load(args.v + at, kHalf);
  if (args.q_bias != nullptr) {
    const int64_t head = static_cast<int64_t>(u.kv_head) * 2 * kHalf;
    k.add(args.k_bias + head, kHalf);
    v.add(args.v_bias + head, kHalf);
  }
  k.norm_and_rotate(args.k_norm, args.eps, rope, kHalf);
  if (threadIdx.x % 32 < 4) store_kv(args.kv, u.pages, u.first_position, u.kv_head, k, v, args.value_scale, kHalf);
  __syncwarp();  // who reads them next
}

// output / sum, as bf16.
template <int kGroups>
__device__ __forceinline__ void store_rows(const AttentionArgs& args, const Unit& u, const State<kGroups>& state) {
  const int g = WeightStream::lane_g(), t = WeightStream::lane_t(), dim = args.kv.head_dim;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = g + 8 * r;
    if (m >= u.num_m) continue;
    bf16* row = args.out + ((static_cast<int64_t>(u.first_row) + u.row_of(m)) * args.num_heads + u.head_of(m)) * dim;
    const float factor = __fdiv_rn(1.0f, state.sum[r] * args.value_scale);
#pragma unroll
    for (int v = 0; v < kGroups; ++v)
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int at = v * 64 + 16 * t + 8 * high;
        if (at >= dim) continue;
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          words[i] = pack_bf16(state.output[v][2 * i][2 * r + high] * factor, state.output[v][2 * i + 1][2 * r + high] * factor);
        *reinterpret_cast<uint4*>(row + at) = make_uint4(words[0], words[1], words[2], words[3]);
      }
  }
}

// partials: [item][word][lane], of items that are splits; counters: [item]. kOnce: no two warps read the same K and V, as where chunks are of one
// row each; not decided on the device, where it would cost registers. Then also, where rope has a q: Q is its, and K and V it has are stored first.
// Three blocks of small heads fit, and two of others, as long as the compiler keeps to it.
template <bool kOnce, int kGroups>
__global__ void __launch_bounds__(kWarps * 32, kGroups == 1 ? 3 : 2)
    attention_kernel(AttentionArgs args, RopeStoreArgs rope, const __grid_constant__ Heads heads, int most_heads, float* partials, unsigned* counters) {
  begin_next();
  __shared__ Work work;
  block_list_work(work, args, most_heads);  // from the step's tables, which are there before its first kernel
  await_previous();
  const int lane = static_cast<int>(threadIdx.x) % 32, g = WeightStream::lane_g(), warp = static_cast<int>(threadIdx.x) / 32;
  float* const total = dynamic_shared<float>() + warp * (State<kGroups>::kWords * 32);
  for (int item = static_cast<int>(blockIdx.x) * kWarps + warp; item < work.begin[args.num_chunks]; item += static_cast<int>(gridDim.x) * kWarps) {
    int own_split = 0;
    const Unit u = unit_at(work, args, heads, most_heads, item, &own_split);
    if (u.num_m <= 0) continue;
    const int end = u.end(), splits = splits_of(end);
    if (own_split >= splits) continue;  // of a later unit of the chunk
    const KvWalk kv(args.kv, u.kv_head, u.pages);
    if constexpr (kOnce) {
      const int begin = own_split * kSplitTokens, tokens = kPrefetchBytes / (args.kv.head_dim * 4) / work.begin[args.num_chunks];
      kv.prefetch(begin, min(end, begin + min(tokens, kSplitTokens)));
    }
    const bool alone = work.spread && splits > 1;  // with one split: the last warp of the unit adds up all of them
    const int last = alone ? own_split + 1 : splits;
    uint4 q[2 * kGroups][2];
    if (kOnce && kGroups <= kGroupsWithRoom && rope.q != nullptr) {
      const float* const table = rope.rope + static_cast<int64_t>(u.first_position) * args.kv.head_dim;
      rope_queries<kGroups>(rope, u, table, q);  // first: its loads wait for no stores
      if (last == splits) rope_key<kGroups>(rope, u, table);
    } else {
      load_queries<kGroups>(args, u, q);
    }
    const int position[2] = {u.position_of(g), u.position_of(g + 8)};
    const float to_exponent = args.softmax_scale * kLog2E;  // of 2, from a score
    State<kGroups> state;
    const auto add_split = [&](int split) {
      if (split == 0) state.for_words([&](int at, float& v, int) { total[at * 32 + lane] = v; });
      else merge(total, state, {position[0] >= split * kSplitTokens, position[1] >= split * kSplitTokens}, to_exponent);
    };
    for (int split = own_split; split < last; ++split) {
      const int begin = split * kSplitTokens;
      state.clear();
      walk_split<kOnce>(kv, begin, min(end, begin + kSplitTokens), position, u.position_of(0), to_exponent, q, state);
      if (splits > 1 && !alone) add_split(split);
    }
    if (alone) {
      constexpr int kPartial = State<kGroups>::kWords * 32;
      float* const words = partials + static_cast<int64_t>(item) * kPartial;
      state.for_words([&](int at, float& v, int) { words[at * 32 + lane] = v; });
      __syncwarp();
      const int first = item - own_split;
      if (__shfl_sync(kAllLanes, lane == 0 && comes_last(counters + first, splits), 0) == 0) continue;
      __syncwarp();  // what lane 0 knows of the others' writes holds for all lanes
      for (int split = 0; split < splits; ++split) {
        const float* part = partials + static_cast<int64_t>(first + split) * kPartial;
        state.for_words([&](int at, float& v, int) { v = part[at * 32 + lane]; });
        add_split(split);
      }
    }
    if (splits > 1) state.for_words([&](int at, float& v, int) { v = total[at * 32 + lane]; });
    store_rows(args, u, state);
  }
}

template <int kGroups>
void launch_attention(const AttentionArgs& args, const RopeStoreArgs& rope, const Heads& heads, int most_heads, const Lane& lane) {
  constexpr size_t kTotals = kWarps * State<kGroups>::kWords * 32 * sizeof(float);
  const int64_t units = args.num_rows * most_heads / kRows + args.num_chunks;  // each chunk's last may be short
  // The host knows no lengths: as many blocks as there may be items, up to what a device runs at once.
  const int64_t items = units * args.kv.num_kv_heads * std::max<int64_t>(1, div_up(args.max_tokens, kSplitTokens));
  const auto kernel = args.num_rows > args.num_chunks ? attention_kernel<false, kGroups> : attention_kernel<true, kGroups>;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(div_up(items, kWarps), resident_blocks(kernel, kWarps * 32, kTotals)));
  launch(kernel, blocks, kWarps * 32, kTotals, lane.queue, args, rope, heads, most_heads, scratch_of<float>(lane), counters_of(lane));
}

void attend(AttentionArgs args, const RopeStoreArgs& rope, const Lane& lane) {
  Heads heads{};
  int most_heads = 0;
  for (int j = 0; j < args.kv.num_kv_heads; ++j) {
    heads.first[j] = static_cast<int>(args.heads_of_kv[j].begin);
    heads.count[j] = static_cast<int>(args.heads_of_kv[j].size());
    most_heads = std::max(most_heads, heads.count[j]);
  }
  const SequenceChunk* const chunks = args.chunks;
  const int num_chunks = args.num_chunks;
  for (int first = 0; first < num_chunks; first += kMaxChunks) {
    args.chunks = chunks + first;
    args.num_chunks = std::min(num_chunks - first, kMaxChunks);
    switch ((args.kv.head_dim + 63) / 64) {
      case 1: launch_attention<1>(args, rope, heads, most_heads, lane); break;
      case 2: launch_attention<2>(args, rope, heads, most_heads, lane); break;
      case 3: launch_attention<3>(args, rope, heads, most_heads, lane); break;
      default: launch_attention<4>(args, rope, heads, most_heads, lane); break;
    }
  }
}

}  // namespace

void attention(const AttentionArgs& args, const Lane& lane) { attend(args, {}, lane); }

void rope_attention(const RopeAttentionArgs& args, const Lane& lane) {
  const AttentionArgs& a = args.attention;
  const auto in_one_unit = [](Range heads) { return !heads.empty() && heads.size() <= kRows; };
  if (a.num_rows <= a.num_chunks && a.num_chunks <= kMaxChunks && a.kv.head_dim % 64 == 0 && a.kv.head_dim <= 64 * kGroupsWithRoom &&
      std::all_of(a.heads_of_kv, a.heads_of_kv + a.kv.num_kv_heads, in_one_unit))
    return attend(a, args.rope, lane);
  rope_store(args.rope, lane);
  attend(a, {}, lane);
}

size_t scratch_bytes_attention(const OpLimits& limits) {
  const int64_t words = div_up(limits.head_dim, 64) * 32 + 4;
  return static_cast<size_t>(int64_t{kMaxPartials} * words * 32) * sizeof(float);
}

}  // namespace moebius::cuda
