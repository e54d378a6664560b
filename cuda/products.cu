// A warp works on 32 outputs and up to kBlocks · 8 rows at a time: weights go from memory into registers, inputs come through the first-level
// cache; nothing is staged in shared memory. (Many rows in mode fast: cuda/wide.h.)
//
// Floors. Few rows: the weights that are reached, once (bytes ÷ bandwidth). A warp has some 6 KiB of them on the way, a multiprocessor must have
// some 23 KiB (4.3 TB/s · 700 ns ÷ 132): four warps that work, so where outputs are few several warps share them, each with a part of k.
// Many rows: 2 · rows · n · k operations. There a block of k32 costs a warp 2 KiB of weights and 512 bytes of inputs for each 8 rows, and
// gives 16 Ki operations for each 8 rows: with 64 rows 6 KiB for 128 Ki operations, with 32 rows 4 KiB for 64 Ki; at 128 bytes a clock from the
// first-level cache that is 2,730 and 2,048 operations a clock and multiprocessor, of 4,096 that the tensor cores have and some 2,600 that
// mma.sync reaches.
#include "cuda/products.h"

#include <algorithm>

#include "cuda/dense.h"
#include "cuda/fragments.h"
#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/norm.h"
#include "cuda/rows.h"
#include "cuda/wide.h"

namespace moebius::cuda {
namespace {

constexpr int kWarps = 4;  // of a block

// Blocks of k32 that are in registers at once, the one at work included: what is in flight hides the memory's latency.
constexpr int depth_of(int blocks) { return blocks == 1 ? 4 : blocks == 2 ? 3 : 2; }

// The rows of a warp's unit: row j·8 + g of lane 4·g + t, as 4-byte pairs of k.
template <int kBlocks>
struct InputRows {
  const uint32_t* row[kBlocks];

  // Pairs 4t … 4t + 3 of block b; from `pairs` on they are zeros. kWhole: rows are aligned to 16 bytes, and no block ends within.
  template <bool kWhole>
  __device__ __forceinline__ uint4 load(int j, int b, int pairs, bool aligned) const {
    const int first = b * kBlockPairs + WeightStream::lane_t() * kLanePairs;
    const uint32_t* p = row[j] + first;
    if (kWhole || (aligned && first + kLanePairs <= pairs)) return *reinterpret_cast<const uint4*>(p);
    return make_uint4(first < pairs ? p[0] : 0, first + 1 < pairs ? p[1] : 0, first + 2 < pairs ? p[2] : 0, first + 3 < pairs ? p[3] : 0);
  }
};

__device__ __forceinline__ int blocks_of(int pairs) { return (pairs + kBlockPairs - 1) / kBlockPairs; }

// Calls use(slot, b) for each block of [begin, end) once load(slot, b) has been called for it, kDepth − 1 blocks ahead.
template <int kDepth, class Load, class Use>
__device__ __forceinline__ void in_depth(int begin, int end, const Load& load, const Use& use) {
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i)
    if (begin + i < end) load(i, begin + i);
  for (int first = begin; first < end; first += kDepth)
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int b = first + i;
      if (b >= end) break;
      if (b + kDepth - 1 < end) load((i + kDepth - 1) % kDepth, b + kDepth - 1);
      use(i, b);
    }
}

// (What is loaded are arrays of the function: as members of a struct they took a third more registers.)
template <bool kWhole, int kBlocks>
__device__ __forceinline__ void multiply_blocks(float (&acc)[kBlocks][2][4], const WeightStream& weights, const InputRows<kBlocks>& rows, int pairs, bool aligned,
                                                int begin, int end) {
  constexpr int kDepth = depth_of(kBlocks);
  WeightBlock w[kDepth];
  uint4 x[kDepth][kBlocks];
  in_depth<kDepth>(
      begin, end,
      [&](int slot, int b) {
        w[slot] = weights.load<kWhole>(b, pairs);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) x[slot][j] = rows.template load<kWhole>(j, b, pairs, aligned);
      },
      [&](int slot, int) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) multiply_block(acc[j], w[slot], x[slot][j]);
      });
}

// acc += weights · rows over blocks [begin, end) of `pairs` pairs of k.
template <int kBlocks>
__device__ __forceinline__ void multiply(float (&acc)[kBlocks][2][4], const WeightStream& weights, const InputRows<kBlocks>& rows, int pairs, bool aligned,
                                         int begin, int end) {
  if (aligned && pairs % kBlockPairs == 0) multiply_blocks<true>(acc, weights, rows, pairs, aligned, begin, end);
  else multiply_blocks<false>(acc, weights, rows, pairs, aligned, begin, end);
}

// Over all of them.
template <int kBlocks>
__device__ __forceinline__ void multiply(float (&acc)[kBlocks][2][4], const WeightStream& weights, const InputRows<kBlocks>& rows, int pairs, bool aligned) {
  multiply(acc, weights, rows, pairs, aligned, 0, blocks_of(pairs));
}

template <int kBlocks>
__device__ __forceinline__ void clear(float (&acc)[kBlocks][2][4]) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][p][e] = 0;
}

// The sums of a warp's unit, as its accumulators lie: integers whose order does not matter, or ordinary floats.
template <int kBlocks>
struct FixedSums {
  using Value = int64_t;
  int64_t sum[kBlocks][2][4] = {};
  unsigned bad = 0;  // bit 2·j + e mod 2: a contribution of that row was none

  // Adds the products as contributions of their rows. factors: of rows 2t and 2t + 1 of each block.
  __device__ __forceinline__ void add(const float (&acc)[kBlocks][2][4], const float (&factors)[kBlocks][2], float limit) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
      for (int p = 0; p < 2; ++p)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float c = acc[j][p][e] * factors[j][e % 2];
          const bool good = fabsf(c) < limit;  // no infinity, no NaN
          if (!good) bad |= 1u << (2 * j + e % 2);
          sum[j][p][e] += good ? __float2ll_rn(c) : 0;
        }
  }
};

template <int kBlocks>
struct FloatSums {
  using Value = float;
  float sum[kBlocks][2][4] = {};
  static constexpr unsigned bad = 0;  // what is no number shows by itself

  __device__ __forceinline__ void add(const float (&acc)[kBlocks][2][4], const float (&factors)[kBlocks][2], float) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
      for (int p = 0; p < 2; ++p)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][p][e] = __fmaf_rn(acc[j][p][e], factors[j][e % 2], sum[j][p][e]);
  }
};

// Calls store(row of the unit, first output, the row's 4 outputs in the lane) for both rows of each block.
template <int kBlocks, class T, class F>
__device__ __forceinline__ void for_outputs(const T (&v)[kBlocks][2][4], F&& store) {
  const int g = WeightStream::lane_g(), t = WeightStream::lane_t();
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const T four[4] = {v[j][0][odd], v[j][0][2 + odd], v[j][1][odd], v[j][1][2 + odd]};
      store(j, odd, j * 8 + 2 * t + odd, output_of(g, 0, 0), four);
    }
}

// Adds what the block's warps have of the same outputs, those of the upper half to those of the lower one, until warp 0 has all: always in one
// order. `room`: shared memory. All threads of the block call it.
template <int kNumWarps, int kSize, class T>
__device__ __forceinline__ void block_join(T (&v)[kSize], T (*room)[kSize][32]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int half = kNumWarps / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half)
#pragma unroll
      for (int i = 0; i < kSize; ++i) room[warp - half][i][lane] = v[i];
    __syncthreads();
    if (warp < half)
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] += room[warp][i][lane];
    __syncthreads();
  }
}

// The two tiles from `tile` on, or one where it is the last.
__device__ __forceinline__ void prefetch_tiles(const PackedMatrix& matrix, const bf16* w, int64_t tile) {
  prefetch_bytes(w + tile * matrix.tile_elements(), min(matrix.tiles() - tile, int64_t{2}) * matrix.tile_elements() * 2);
}

// What a lane has of the unit's `num` rows, of the two tiles from `tile` on, to a matrix of n columns; out: the unit's first row.
template <int kBlocks, class T>
__device__ __forceinline__ void store_unit(T* out, int64_t ld, int64_t n, int64_t tile, int64_t num, const T (&sums)[kBlocks][2][4]) {
  const int64_t n0 = (tile + WeightStream::lane_g() / 4) * kTile;
  for_outputs(sums, [&](int, int, int r, int output, const T (&v)[4]) {
    if (r >= num) return;
    T* const to = out + r * ld + n0 + output;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n0 + output + i < n) to[i] = v[i];
  });
}

// Whether so many blocks of 128 rows and 256 outputs keep the device busy.
bool fills_wide(int64_t units) { return units >= resident_blocks(1) && has_wide(); }

// ---- linear

template <int kParts>
struct LinearTable {
  LinearPart parts[kParts];
  int units[kParts + 1];  // running number of pairs of tiles
};

// A block has a unit, each of its warps a part of k: one warp alone has too little in flight, and units are few in a decode step. Who has which
// blocks of k depends on k alone, so that a row's bits are the same among any number of rows. With kNormParts above 0 there is one row, which each
// block norms by itself first, and the first one stores.
template <int kParts, int kBlocks, int kNormParts>
__global__ void __launch_bounds__(kWarps * 32) linear_kernel(LinearArgs args, const __grid_constant__ LinearTable<kParts> table, int row_units,
                                                             NormAhead ahead) {
  __shared__ float room[kWarps / 2][kBlocks * 8][32];
  begin_next();
  const int tiles_unit = static_cast<int>(blockIdx.x) / row_units, row_unit = static_cast<int>(blockIdx.x) % row_units;
  const int p = holder_of(args.num_parts, [&](int i) { return table.units[i]; }, tiles_unit);
  const LinearPart& part = table.parts[p];
  const PackedMatrix matrix{part.n, args.k};
  const int64_t tile = 2 * static_cast<int64_t>(tiles_unit - table.units[p]);
  const WeightStream weights(matrix, part.w, tile);
  if (row_unit == 0 && threadIdx.x == 0) prefetch_tiles(matrix, part.w, tile);

  const int64_t row0 = static_cast<int64_t>(row_unit) * kBlocks * 8, num = min(args.rows.size() - row0, int64_t{kBlocks} * 8);
  InputRows<kBlocks> rows;
  if constexpr (kNormParts > 0) {
    __shared__ uint4 normed[BlockRow<kWarps * 32, kNormParts>::kLongest / 8];
    static_assert(kBlocks == 1);
    const int64_t row = args.rows.begin;
    BlockRow<kWarps * 32, kNormParts> mine;
    mine.load_weight(ahead.args);
    await_previous();
    mine.load_and_add(ahead.args, ahead.partials, 0, ahead.partials.num, row);
    if (blockIdx.x == 0 && ahead.partials.num > 0) mine.store(ahead.args, row);
    mine.norm(ahead.args, [&](int64_t i, float v) { reinterpret_cast<bf16*>(normed)[i] = to_bf16(v); });
    __syncthreads();
    rows.row[0] = reinterpret_cast<const uint32_t*>(normed);
  } else {
    await_previous();
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const int64_t r = min(int64_t{j * 8 + WeightStream::lane_g()}, num - 1);
      rows.row[j] = reinterpret_cast<const uint32_t*>(args.x + (args.rows.begin + row0 + r) * args.ldx);
    }
  }
  float acc[kBlocks][2][4];
  clear(acc);
  const int pairs = static_cast<int>(matrix.k_pairs()), blocks = blocks_of(pairs), warp = static_cast<int>(threadIdx.x) / 32;
  multiply(acc, weights, rows, pairs, args.ldx % 8 == 0, blocks * warp / kWarps, blocks * (warp + 1) / kWarps);
  block_join<kWarps>(reinterpret_cast<float (&)[kBlocks * 8]>(acc), room);
  if (warp == 0) store_unit(part.y + (args.rows.begin + row0) * part.ldy, part.ldy, part.n, tile, num, acc);
}

template <int kParts>
__global__ void __launch_bounds__(kWideWarps * 32, 1) wide_linear_kernel(LinearArgs args, const __grid_constant__ LinearTable<kParts> table, int row_units) {
  follow_previous();
  const int all = table.units[args.num_parts], own = static_cast<int>(blockIdx.x) / row_units * kWideWarps + static_cast<int>(threadIdx.x) / 32;
  const int unit = min(own, all - 1), p = holder_of(args.num_parts, [&](int i) { return table.units[i]; }, unit);
  const LinearPart& part = table.parts[p];
  const PackedMatrix matrix{part.n, args.k};
  const int64_t tile = 2 * static_cast<int64_t>(unit - table.units[p]), row0 = static_cast<int64_t>(blockIdx.x) % row_units * kWideRows;
  const int64_t num = min(args.rows.size() - row0, int64_t{kWideRows});
  const bf16* rows[kWideThreadRows];
  wide_rows(rows, [&](int r) { return args.x + (args.rows.begin + row0 + min(int64_t{r}, num - 1)) * args.ldx; });
  float acc[kWideBlocks][2][4];
  clear(acc);
  block_multiply_wide(acc, rows, WideStream([&](int) { return WeightStream(matrix, part.w, tile); }, 1, args.k));
  if (own < all) store_unit(part.y + (args.rows.begin + row0) * part.ldy, part.ldy, part.n, tile, num, acc);
}

template <int kParts, int kBlocks, int kNormParts = 0>
void launch_linear(const LinearArgs& args, const LinearTable<kParts>& table, void* queue, const NormAhead& ahead = {}) {
  const int row_units = static_cast<int>(div_up(args.rows.size(), kBlocks * 8));
  launch(linear_kernel<kParts, kBlocks, kNormParts>, static_cast<unsigned>(int64_t{table.units[args.num_parts]} * row_units), kWarps * 32, 0, queue, args, table,
         row_units, ahead);
}

// norm: of one row that has parts_ahead, or null.
template <int kParts>
void launch_linear(const LinearArgs& args, void* queue, const AddNormArgs* norm) {
  LinearTable<kParts> table;
  table.units[0] = 0;
  for (int p = 0; p < args.num_parts; ++p) {
    table.parts[p] = args.parts[p];
    table.units[p + 1] = table.units[p] + static_cast<int>(div_up(args.parts[p].n, kWarpOutputs));
  }
  const int row_units = static_cast<int>(div_up(args.rows.size(), kWideRows));
  const int64_t units = div_up(table.units[args.num_parts], kWideWarps) * row_units;
  if (norm != nullptr && parts_ahead(*norm) == 1) launch_linear<kParts, 1, 1>(args, table, queue, NormAhead(*norm));
  else if (norm != nullptr) launch_linear<kParts, 1, 2>(args, table, queue, NormAhead(*norm));
  else if (args.plain && args.k % 32 == 0 && args.ldx % 8 == 0 && fills_wide(units))
    launch(wide_linear_kernel<kParts>, static_cast<unsigned>(units), kWideWarps * 32, kWideShared, queue, args, table, row_units);
  else if (args.rows.size() <= 8) launch_linear<kParts, 1>(args, table, queue);
  else if (args.rows.size() <= 16) launch_linear<kParts, 2>(args, table, queue);
  else if (args.rows.size() <= 32) launch_linear<kParts, 4>(args, table, queue);
  else launch_linear<kParts, 8>(args, table, queue);
}

// ---- O projection

constexpr int kSplitWarps = 8;  // of a block

template <int kParts>
struct ExactTable {
  ExactLinearPart parts[kParts];
};

// kSplit warps have a unit together, and each some of the parts: where units are few.
template <int kParts, int kBlocks, class Sums, int kSplit>
__global__ void __launch_bounds__(kSplitWarps * 32) exact_linear_kernel(ExactLinearArgs args, const __grid_constant__ ExactTable<kParts> table, int row_units) {
  using Value = typename Sums::Value;
  begin_next();
  const int warp = static_cast<int>(threadIdx.x) / 32, split = warp % kSplit;
  const int unit = (static_cast<int>(blockIdx.x) * kSplitWarps + warp) / kSplit;
  const int64_t tile = 2 * static_cast<int64_t>(unit / row_units);
  const PackedMatrix matrix{args.hidden, args.k};
  if (tile < matrix.tiles() && unit % row_units == 0 && threadIdx.x % 32 == 0)
    for (int g = split; g < args.num_parts; g += kSplit) prefetch_tiles(matrix, table.parts[g].w, tile);
  await_previous();
  if (tile >= matrix.tiles()) return;
  const int64_t row0 = static_cast<int64_t>(unit % row_units) * kBlocks * 8, num = min(args.rows.size() - row0, int64_t{kBlocks} * 8);
  Sums sums;
  float factors[kBlocks][2];
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) factors[j][0] = factors[j][1] = args.out.scale;
  for (int g = split; g < args.num_parts; g += kSplit) {
    const WeightStream weights(matrix, table.parts[g].w, tile);
    InputRows<kBlocks> rows;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const int64_t r = min(int64_t{j * 8 + WeightStream::lane_g()}, num - 1);
      rows.row[j] = reinterpret_cast<const uint32_t*>(args.x + (args.rows.begin + row0 + r) * args.ldx + table.parts[g].column);
    }
    float acc[kBlocks][2][4];
    clear(acc);
    multiply(acc, weights, rows, static_cast<int>(matrix.k_pairs()), args.ldx % 8 == 0 && table.parts[g].column % 8 == 0);
    sums.add(acc, factors, args.out.limit);
  }
  // Whoever had a bad contribution says so; the sums are warp 0's.
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int r = j * 8 + 2 * WeightStream::lane_t() + odd;
      if (r < num && (sums.bad >> (2 * j + odd) & 1) != 0) args.out.flags[args.rows.begin + row0 + r] = 1;
    }
  if constexpr (kSplit > 1) {
    __shared__ Value room[kSplit / 2][kBlocks * 8][32];
    block_join<kSplit>(reinterpret_cast<Value(&)[kBlocks * 8]>(sums.sum), room);
    if (split > 0) return;
  }
  store_unit(reinterpret_cast<Value*>(args.out.sum) + (args.rows.begin + row0) * args.hidden, args.hidden, args.hidden, tile, num, sums.sum);
}

template <int kParts>
__global__ void __launch_bounds__(kWideWarps * 32, 1) wide_exact_linear_kernel(ExactLinearArgs args, const __grid_constant__ ExactTable<kParts> table, int row_units) {
  follow_previous();
  const PackedMatrix matrix{args.hidden, args.k};
  const int64_t own = 2 * (static_cast<int64_t>(blockIdx.x) / row_units * kWideWarps + threadIdx.x / 32), tile = min(own, (matrix.tiles() - 1) / 2 * 2);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) % row_units * kWideRows, num = min(args.rows.size() - row0, int64_t{kWideRows});
  const bf16* rows[kWideThreadRows];
  wide_rows(rows, [&](int r) { return args.x + (args.rows.begin + row0 + min(int64_t{r}, num - 1)) * args.ldx; });
  float acc[kWideBlocks][2][4];
  clear(acc);
  block_multiply_wide(acc, rows, WideStream([&](int g) { return WeightStream(matrix, table.parts[g].w, tile); }, args.num_parts, args.k));
  float* const out = reinterpret_cast<float*>(args.out.sum) + (args.rows.begin + row0) * args.hidden;
  if (own < matrix.tiles()) store_unit(out, args.hidden, args.hidden, tile, num, acc);
}

template <int kParts, int kBlocks, int kSplit>
void launch_exact_linear(const ExactLinearArgs& args, int row_units, int64_t units, void* queue) {
  ExactTable<kParts> table;
  std::copy_n(args.parts, args.num_parts, table.parts);
  const auto blocks = static_cast<unsigned>(div_up(units * kSplit, kSplitWarps));
  if (args.out.plain) launch(exact_linear_kernel<kParts, kBlocks, FloatSums<kBlocks>, kSplit>, blocks, kSplitWarps * 32, 0, queue, args, table, row_units);
  else launch(exact_linear_kernel<kParts, kBlocks, FixedSums<kBlocks>, kSplit>, blocks, kSplitWarps * 32, 0, queue, args, table, row_units);
}

template <int kParts, int kBlocks>
void launch_exact_linear(const ExactLinearArgs& args, void* queue) {
#ifdef MOEBIUS_EMULATED
  constexpr int64_t kManyUnits = 4;  // so that small tests have many
#else
  constexpr int64_t kManyUnits = 1024;  // warps that have enough in flight together
#endif
  const int row_units = static_cast<int>(div_up(args.rows.size(), kBlocks * 8));
  const int64_t units = div_up(args.hidden, kWarpOutputs) * row_units;
  if (units < kManyUnits) launch_exact_linear<kParts, kBlocks, kSplitWarps>(args, row_units, units, queue);
  else launch_exact_linear<kParts, kBlocks, 1>(args, row_units, units, queue);
}

template <int kParts>
void launch_exact_linear(const ExactLinearArgs& args, void* queue) {
  const int row_units = static_cast<int>(div_up(args.rows.size(), kWideRows));
  const int64_t units = div_up(args.hidden, kWideWarps * kWarpOutputs) * row_units;
  bool one_product = args.k % 32 == 0 && args.ldx % 8 == 0;  // inputs in the order of the parts
  for (int g = 0; g < args.num_parts; ++g) one_product = one_product && args.parts[g].column == g * args.k;
  if (args.out.plain && one_product && fills_wide(units)) {
    ExactTable<kParts> table;
    std::copy_n(args.parts, args.num_parts, table.parts);
    launch(wide_exact_linear_kernel<kParts>, static_cast<unsigned>(units), kWideWarps * 32, kWideShared, queue, args, table, row_units);
  } else if (args.rows.size() <= 8) launch_exact_linear<kParts, 1>(args, queue);
  else if (args.rows.size() <= 16) launch_exact_linear<kParts, 2>(args, queue);
  else launch_exact_linear<kParts, 4>(args, queue);
}

// ---- experts

// Experts are worked on in up to four classes by their number of rows, each by a kernel of its own: with up to 8, 16 and 32 rows a unit has all
// of an expert's rows, so its weights are read once; beyond, units of as many rows as the last argument says times 8. The more rows a step
// has, the fewer classes of few rows: reading the weights takes longer than multiplying by rows that are not there, and a kernel less is no
// gap in reading.
struct RowClass {
  int above, upto;  // rows
  bool first = false;  // of the classes that are started

  __device__ bool has(int rows) const { return rows > above && rows <= upto; }
};
constexpr RowClass kClasses[] = {{0, 8}, {8, 16}, {16, 32}, {32, 0x7fffffff}};

// Which unit is whose: begin[e] is the first of expert e's. A unit is a group of outputs and some rows of an expert; those of the same
// outputs follow one another. Made by every block for itself from args.begins, of which it keeps a copy: only the device knows it.
struct ExpertUnits {
  int begin[kGpuMaxExperts + 1], pairs[kGpuMaxExperts + 1];

  __device__ int rows_of(int e) const { return pairs[e + 1] - pairs[e]; }
};

__device__ void block_count_units(ExpertUnits& units, const ExpertsArgs& args, RowClass rows_of_class, int output_groups, int rows_of_unit) {
  for (int e = static_cast<int>(threadIdx.x); e <= args.num_experts; e += static_cast<int>(blockDim.x)) units.pairs[e] = args.begins[e];
  __syncthreads();
  if (threadIdx.x < 32)
    warp_lay_end_to_end(units.begin, args.num_experts, [&](int e) {
      const int rows = units.rows_of(e);
      return rows_of_class.has(rows) ? output_groups * ((rows + rows_of_unit - 1) / rows_of_unit) : 0;
    });
  __syncthreads();
}

struct ExpertUnit {
  int expert, group, row0, num;
  int64_t pair0;
};

__device__ ExpertUnit unit_at(const ExpertUnits& units, const ExpertsArgs& args, int unit, int rows_of_unit) {
  const int e = holder_of(args.num_experts, [&](int i) { return units.begin[i]; }, unit);
  const int rows = units.rows_of(e), row_units = (rows + rows_of_unit - 1) / rows_of_unit;
  ExpertUnit u;
  u.expert = e;
  u.group = (unit - units.begin[e]) / row_units;
  u.row0 = (unit - units.begin[e]) % row_units * rows_of_unit;
  u.num = min(rows - u.row0, rows_of_unit);
  u.pair0 = units.pairs[e] + u.row0;
  return u;
}

// silu(gate)·up of one tile of 16 neurons of one cut for the unit's rows.
template <int kBlocks>
__device__ __forceinline__ void store_gate_up(const ExpertsArgs& args, const ExpertUnit& u, float (&acc)[kBlocks][2][4]) {
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const int tiles = static_cast<int>(cut.tiles()), c = u.group / tiles, tile = u.group % tiles;
  // Lanes of g < 4 hold the gates, those of g + 4 the ups of the same neurons and rows.
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][p][e] = silu(acc[j][p][e]) * __shfl_xor_sync(kAllLanes, acc[j][p][e], 16);
  if (WeightStream::lane_g() >= 4) return;
  const int64_t width = args.num_cuts * cut.padded(), n0 = c * cut.padded() + tile * kTile;
  for_outputs(acc, [&](int, int, int r, int output, const float (&v)[4]) {
    if (r >= u.num) return;
    *reinterpret_cast<uint2*>(static_cast<bf16*>(args.act) + (u.pair0 + r) * width + n0 + output) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
  });
}

__device__ __forceinline__ WeightStream gate_up_weights(const ExpertsArgs& args, const ExpertUnit& u) {
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const int tiles = static_cast<int>(cut.tiles()), c = u.group / tiles, tile = u.group % tiles;
  const bf16* gate = args.cuts[static_cast<int64_t>(u.expert) * args.num_cuts + c] + tile * cut.gate_up_tile_elements();
  return {gate, gate + 2 * kTile, 2 * kTile};
}

template <int kBlocks>
__device__ __forceinline__ void warp_gate_up(const ExpertsArgs& args, const ExpertUnit& u) {
  const WeightStream weights = gate_up_weights(args, u);
  InputRows<kBlocks> rows;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    const int r = min(j * 8 + WeightStream::lane_g(), u.num - 1);
    rows.row[j] = reinterpret_cast<const uint32_t*>(args.x + args.pair_rows[u.pair0 + r] * args.hidden);
  }
  float acc[kBlocks][2][4];
  clear(acc);
  multiply(acc, weights, rows, static_cast<int>(div_up(args.hidden, 2)), args.hidden % 8 == 0);
  store_gate_up(args, u, acc);
}

constexpr int64_t kFetchedBytes = 32 << 20;  // of down matrices: what the second-level cache keeps beside the others, which pass through it

// Where few experts are reached, a unit fetches all of its weights at once, since then warps are too few to have enough of them on the way, and
// its share of its cut's down matrix, so that the memory does not rest between the two kernels.
__device__ __forceinline__ void prefetch_unit(const ExpertsArgs& args, const ExpertUnit& u) {
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const int64_t tiles = cut.tiles(), c = u.group / tiles, tile = u.group % tiles;
  const bf16* weights = args.cuts[u.expert * args.num_cuts + c];
  prefetch_bytes(weights + tile * cut.gate_up_tile_elements(), cut.gate_up_tile_elements() * 2);
  const int64_t down = cut.down().bytes();
  prefetch_bytes(reinterpret_cast<const char*>(weights + cut.gate_up_elements()) + down * tile / tiles, down * (tile + 1) / tiles - down * tile / tiles);
}

// Sets the sums that down_kernel adds to to 0.
__device__ void grid_clear_sums(const ExpertsArgs& args) {
  const int64_t words = args.hidden * (args.out.plain ? 1 : 2), begin = args.rows.begin * words, end = args.rows.end * words;
  auto* const sums = reinterpret_cast<uint32_t*>(args.out.sum);
  for (int64_t i = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += static_cast<int64_t>(gridDim.x) * blockDim.x) sums[i] = 0;
}

template <int kBlocks>
__global__ void __launch_bounds__(kWarps * 32) gate_up_kernel(ExpertsArgs args, RowClass rows) {
  follow_previous();
  if (rows.first) grid_clear_sums(args);
  __shared__ ExpertUnits units;
  block_count_units(units, args, rows, static_cast<int>(args.num_cuts * MlpCut{args.neurons_per_cut, args.hidden}.tiles()), kBlocks * 8);
  const int warps = static_cast<int>(gridDim.x) * kWarps, num = units.begin[args.num_experts];
  const bool fetches = kBlocks == 1 && int64_t{num} * args.hidden * kTile * 2 <= kFetchedBytes;  // of tiles' shares, padding aside
  for (int i = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32; i < num; i += warps) {
    const ExpertUnit unit = unit_at(units, args, i, kBlocks * 8);
    if (fetches && threadIdx.x % 32 == 0) prefetch_unit(args, unit);
    warp_gate_up<kBlocks>(args, unit);
  }
}

// The cuts of an expert one after the other, as one run of blocks: the next cut's are on their way while the last ones of this are multiplied.
template <bool kWhole, int kBlocks, class Sums>
__device__ __forceinline__ void add_cuts(Sums& sums, const float (&factors)[kBlocks][2], const ExpertsArgs& args, const ExpertUnit& u, int64_t tile) {
  constexpr int kDepth = depth_of(kBlocks);
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const PackedMatrix down = cut.down();
  const int64_t width = args.num_cuts * cut.padded();
  const int pairs = static_cast<int>(down.k_pairs()), blocks = blocks_of(pairs);
  const bf16* const* next_cut = args.cuts + static_cast<int64_t>(u.expert) * args.num_cuts;
  InputRows<kBlocks> rows;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    const int r = min(j * 8 + WeightStream::lane_g(), u.num - 1);
    rows.row[j] = reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(args.act) + (u.pair0 + r) * width);
  }
  WeightStream weights;
  WeightBlock w[kDepth];
  uint4 x[kDepth][kBlocks];
  float acc[kBlocks][2][4];
  clear(acc);
  int loaded = 0, used = 0;  // blocks of their cuts
  in_depth<kDepth>(
      0, args.num_cuts * blocks,
      [&](int slot, int) {
        if (loaded == 0) {
          const bf16* first = *next_cut++ + cut.gate_up_elements() + tile * down.tile_elements();
          weights = WeightStream(first, tile + 1 < down.tiles() ? first + down.tile_elements() : first, kTile);
        }
        w[slot] = weights.load<kWhole>(loaded, pairs);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) x[slot][j] = rows.template load<kWhole>(j, loaded, pairs, true);  // widths are multiples of 16
        if (++loaded < blocks) return;
        loaded = 0;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) rows.row[j] += cut.padded() / 2;
      },
      [&](int slot, int) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) multiply_block(acc[j], w[slot], x[slot][j]);
        if (++used < blocks) return;
        used = 0;
        sums.add(acc, factors, args.out.limit);
        clear(acc);
      });
}

template <int kBlocks, class Value>
__device__ __forceinline__ void add_down(const ExpertsArgs& args, const ExpertUnit& u, int64_t tile, const Value (&sums)[kBlocks][2][4], unsigned bad) {
  const int64_t n0 = (tile + WeightStream::lane_g() / 4) * kTile;
  for_outputs(sums, [&](int j, int odd, int r, int output, const Value (&v)[4]) {
    if (r >= u.num) return;
    const int64_t row = args.pair_rows[u.pair0 + r];
    Value* const out = reinterpret_cast<Value*>(args.out.sum) + row * args.hidden + n0 + output;
    if (args.hidden % 4 == 0) {
      if (n0 + output < args.hidden) add_relaxed(out, v);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n0 + output + i < args.hidden) add_relaxed(out + i, v[i]);
    }
    if (bad >> (2 * j + odd) & 1) args.out.flags[row] = 1;
  });
}

// 32 outputs of the hidden size: the sum over the rank's cuts for the unit's rows.
template <int kBlocks, class Sums>
__device__ __forceinline__ void warp_down(const ExpertsArgs& args, const ExpertUnit& u) {
  const int64_t tile = 2 * static_cast<int64_t>(u.group);
  const int t = WeightStream::lane_t();
  float factors[kBlocks][2];
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) factors[j][odd] = args.pair_weights[u.pair0 + min(j * 8 + 2 * t + odd, u.num - 1)] * args.out.scale;
  Sums sums;
  if (MlpCut{args.neurons_per_cut, args.hidden}.down().k_pairs() % kBlockPairs == 0) add_cuts<true, kBlocks>(sums, factors, args, u, tile);
  else add_cuts<false, kBlocks>(sums, factors, args, u, tile);
  add_down(args, u, tile, sums.sum, sums.bad);
}

template <int kBlocks, template <int> class Sums>
__global__ void __launch_bounds__(kWarps * 32) down_kernel(ExpertsArgs args, RowClass rows) {
  follow_previous();
  __shared__ ExpertUnits units;
  block_count_units(units, args, rows, static_cast<int>(div_up(args.hidden, kWarpOutputs)), kBlocks * 8);
  const int warps = static_cast<int>(gridDim.x) * kWarps;
  for (int i = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32; i < units.begin[args.num_experts]; i += warps)
    warp_down<kBlocks, Sums<kBlocks>>(args, unit_at(units, args, i, kBlocks * 8));
}

// Experts of many rows: a warp of a block has one of eight neighbouring groups of outputs; f(unit, whether the group exists).
template <class F>
__device__ __forceinline__ void for_wide_units(const ExpertsArgs& args, RowClass rows, int output_groups, const F& f) {
  __shared__ ExpertUnits units;
  block_count_units(units, args, rows, (output_groups + kWideWarps - 1) / kWideWarps, kWideRows);
  for (int i = static_cast<int>(blockIdx.x); i < units.begin[args.num_experts]; i += static_cast<int>(gridDim.x)) {
    ExpertUnit u = unit_at(units, args, i, kWideRows);
    const int own = u.group * kWideWarps + static_cast<int>(threadIdx.x) / 32;
    u.group = min(own, output_groups - 1);
    f(u, own < output_groups);
  }
}

__global__ void __launch_bounds__(kWideWarps * 32, 1) wide_gate_up_kernel(ExpertsArgs args, RowClass rows) {
  follow_previous();
  for_wide_units(args, rows, static_cast<int>(args.num_cuts * MlpCut{args.neurons_per_cut, args.hidden}.tiles()), [&](const ExpertUnit& u, bool exists) {
    const bf16* inputs[kWideThreadRows];
    wide_rows(inputs, [&](int r) { return args.x + args.pair_rows[u.pair0 + min(r, u.num - 1)] * args.hidden; });
    float acc[kWideBlocks][2][4];
    clear(acc);
    block_multiply_wide(acc, inputs, WideStream([&](int) { return gate_up_weights(args, u); }, 1, args.hidden));
    if (exists) store_gate_up(args, u, acc);
  });
}

// All of an expert's cuts are one product: what is added up is float.
__global__ void __launch_bounds__(kWideWarps * 32, 1) wide_down_kernel(ExpertsArgs args, RowClass rows) {
  follow_previous();
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const PackedMatrix down = cut.down();
  for_wide_units(args, rows, static_cast<int>(div_up(args.hidden, kWarpOutputs)), [&](const ExpertUnit& u, bool exists) {
    const int64_t tile = 2 * static_cast<int64_t>(u.group);
    const bf16* inputs[kWideThreadRows];
    wide_rows(inputs, [&](int r) { return static_cast<const bf16*>(args.act) + (u.pair0 + min(r, u.num - 1)) * args.num_cuts * cut.padded(); });
    float acc[kWideBlocks][2][4];
    clear(acc);
    const bf16* const* cuts = args.cuts + static_cast<int64_t>(u.expert) * args.num_cuts;
    block_multiply_wide(acc, inputs, WideStream([&](int c) { return WeightStream(down, cuts[c] + cut.gate_up_elements(), tile); }, args.num_cuts, cut.padded()));
    if (!exists) return;
#pragma unroll
    for (int j = 0; j < kWideBlocks; ++j)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const float weight = args.pair_weights[u.pair0 + min(j * 8 + 2 * WeightStream::lane_t() + odd, u.num - 1)];
#pragma unroll
        for (int p = 0; p < 2; ++p) acc[j][p][odd] *= weight, acc[j][p][2 + odd] *= weight;
      }
    add_down(args, u, tile, acc, 0);
  });
}

// Starts the kernels of the classes that an expert may be in; the host knows no more than how many rows there are. wide: of a fifth class in mode
// fast, of experts that have more rows than that, where they may have so many on average.
using ExpertsKernel = void (*)(ExpertsArgs, RowClass);
void launch_classes(const ExpertsArgs& args, const ExpertsKernel (&kernels)[4], const int (&blocks)[4], ExpertsKernel wide, int64_t output_groups, void* queue) {
  constexpr int kWideAbove = 48;
  const MlpCut cut{args.neurons_per_cut, args.hidden};
  const int64_t wide_units = div_up(output_groups, kWideWarps) * std::max<int64_t>(args.num_experts, args.max_pairs / kWideRows);
  const bool has_fifth = args.out.plain && args.rows.size() > kWideAbove && args.max_pairs >= 32 * int64_t{args.num_experts} && args.hidden % 32 == 0 &&
                         cut.padded() % 32 == 0 && fills_wide(wide_units);
  const int first = args.rows.size() <= 8 ? 0 : args.rows.size() <= 96 ? 1 : 2;
  const auto most_units = [&](int above, int64_t groups, int rows_of_unit) {
    return groups * (std::min<int64_t>(args.num_experts, args.max_pairs / (above + 1)) + args.max_pairs / rows_of_unit);
  };
  for (int c = first; c < 4; ++c) {
    const RowClass rows{c == first ? 0 : kClasses[c].above, c == 3 && has_fifth ? kWideAbove : kClasses[c].upto, c == first};
    if (args.rows.size() <= rows.above) return;
    const int64_t blocks_of_all = std::max<int64_t>(1, div_up(most_units(rows.above, output_groups, blocks[c] * 8), kWarps));  // one at least clears sums
    launch(kernels[c], static_cast<unsigned>(std::min<int64_t>(blocks_of_all, resident_blocks(kernels[c], kWarps * 32))), kWarps * 32, 0, queue, args, rows);
  }
  if (!has_fifth) return;
  const int64_t units = most_units(kWideAbove, div_up(output_groups, kWideWarps), kWideRows);
  launch(wide, static_cast<unsigned>(std::min<int64_t>(units, resident_blocks(1))), kWideWarps * 32, kWideShared, queue, args, RowClass{kWideAbove, 0x7fffffff});
}

}  // namespace

namespace {

void multiply_parts(const LinearArgs& args, const Lane& lane, const AddNormArgs* norm) {
  if (args.num_parts <= 16) launch_linear<16>(args, lane.queue, norm);
  else if (args.num_parts <= 128) launch_linear<128>(args, lane.queue, norm);
  else launch_linear<kMaxLinearParts>(args, lane.queue, norm);
}

}  // namespace

void linear(const LinearArgs& args, const Lane& lane) {
  if (args.rows.empty()) return;
  if (args.row_major) return dense_linear(args, lane);
  multiply_parts(args, lane, nullptr);
}

void norm_linear(const NormLinearArgs& args, const Lane& lane) {
  if (args.linear.rows.size() == 1 && args.linear.num_parts > 0 && parts_ahead(args.norm) > 0) return multiply_parts(args.linear, lane, &args.norm);
  add_norm(args.norm, lane);
  linear(args.linear, lane);
}

void exact_linear(const ExactLinearArgs& given, const Lane& lane) {
  if (given.rows.empty() || given.num_parts == 0) return;
  ExactLinearArgs args = given;
  if (args.out.plain) args.out.scale = 1;
  if (args.num_parts <= 16) launch_exact_linear<16>(args, lane.queue);
  else if (args.num_parts <= 128) launch_exact_linear<128>(args, lane.queue);
  else launch_exact_linear<kMaxLinearParts>(args, lane.queue);
}

void experts_gate_up(const ExpertsArgs& args, const Lane& lane) {
  launch_classes(args, {gate_up_kernel<1>, gate_up_kernel<2>, gate_up_kernel<4>, gate_up_kernel<8>}, {1, 2, 4, 8}, wide_gate_up_kernel,
                 args.num_cuts * MlpCut{args.neurons_per_cut, args.hidden}.tiles(), lane.queue);
}

void experts_down(const ExpertsArgs& given, const Lane& lane) {
  if (given.rows.empty()) return;
  ExpertsArgs args = given;
  if (args.out.plain) args.out.scale = 1;
  const int64_t groups = div_up(args.hidden, kWarpOutputs);
  const int blocks[] = {1, 2, 4, 4};
  if (args.out.plain)
    launch_classes(args, {down_kernel<1, FloatSums>, down_kernel<2, FloatSums>, down_kernel<4, FloatSums>, down_kernel<4, FloatSums>}, blocks, wide_down_kernel, groups, lane.queue);
  else
    launch_classes(args, {down_kernel<1, FixedSums>, down_kernel<2, FixedSums>, down_kernel<4, FixedSums>, down_kernel<4, FixedSums>}, blocks, nullptr, groups, lane.queue);
}

}  // namespace moebius::cuda
