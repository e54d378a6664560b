// How packed weights meet the tensor cores (mma.sync m16n8k16): which lane loads what, and which output lands where.
//
// A tile is [k/2][16 outputs][2 of k]: 16 bytes are 4 outputs at one pair of k. A warp takes two tiles together, 32 outputs (for gate and up
// these are the gate's and the up's tile, which lie side by side). Lane 4·g + t loads for each pair of k the outputs 4·(g mod 4) … + 3 of
// tile g / 4: words 0 and 1 are fragment rows g and g + 8 of product 0, words 2 and 3 those of product 1. In a block of 16 pairs (k32) lane
// t has pairs 4t … 4t + 3, which are two steps of k16: pairs 4t, 4t + 1 and then 4t + 2, 4t + 3 stand where the fragment wants its pairs t
// and t + 4. The order along k is odd, but it is the same for both operands and for every number of rows.
// Inputs then need one load of 16 bytes a lane: 4 consecutive pairs of row g of each 8 rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.h"
#include "lib/tensor/packed.h"

namespace moebius::cuda {

constexpr int kWarpOutputs = 2 * kTile;   // outputs that a warp works on at once
constexpr int kBlockPairs = 16;           // pairs of k of one block of k32
constexpr int kLanePairs = 4;             // of these, a lane's own: 4t … 4t + 3

// One lane's weights of a block of k32: [pair of the lane][4 outputs].
struct WeightBlock {
  uint4 pair[kLanePairs];
};

// Where a lane's words of pair 0 are: `first` and `second` are the two tiles, `pair_words` the 4-byte words from one pair of k to the next.
struct WeightStream {
  const uint4* base;
  int pair_stride;  // in 16-byte units

  WeightStream() = default;
  __device__ WeightStream(const bf16* first, const bf16* second, int pair_words)
      : base(reinterpret_cast<const uint4*>((lane_g() < 4 ? first : second)) + lane_g() % 4), pair_stride(pair_words / 4) {}
  // The two tiles of a packed matrix from `tile` on; where it is the last, it twice.
  __device__ WeightStream(const PackedMatrix& matrix, const bf16* w, int64_t tile)
      : WeightStream(w + tile * matrix.tile_elements(), w + min(tile + 1, matrix.tiles() - 1) * matrix.tile_elements(), kTile) {}
  static __device__ int lane_g() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ int lane_t() { return static_cast<int>(threadIdx.x) % 4; }

  // Block `b`; pairs from `pairs` on are zeros. kWhole: no block ends within.
  template <bool kWhole>
  __device__ __forceinline__ WeightBlock load(int b, int pairs) const {
    WeightBlock w;
    const int first = b * kBlockPairs + lane_t() * kLanePairs;
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i)
      w.pair[i] = kWhole || first + i < pairs ? load_once(base + static_cast<int64_t>(first + i) * pair_stride) : make_uint4(0, 0, 0, 0);
    return w;
  }
};

// acc[product] += the block's weights · inputs of 8 rows (x: the lane's 4 pairs of row g).
__device__ __forceinline__ void multiply_block(float (&acc)[2][4], const WeightBlock& w, const uint4& x) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint4 &low = w.pair[2 * step], &high = w.pair[2 * step + 1];
    const uint32_t b[2] = {step == 0 ? x.x : x.z, step == 0 ? x.y : x.w};
    const uint32_t a0[4] = {low.x, low.y, high.x, high.y}, a1[4] = {low.z, low.w, high.z, high.w};
    mma_bf16(acc[0], a0, b);
    mma_bf16(acc[1], a1, b);
  }
}

// The outputs of the accumulators of lane 4·g + t: acc[product][e] is tile g / 4, output 4·(g mod 4) + 2·product + e / 2, of row 2·t + e mod 2.
__device__ __forceinline__ int output_of(int g, int product, int e) { return 4 * (g % 4) + 2 * product + e / 2; }

}  // namespace moebius::cuda
