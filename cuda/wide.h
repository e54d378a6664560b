// Products of many rows by Hopper's wgmma, in mode fast: its sums have no order to keep, so few rows may go another way.
//
// A block of two groups of four warps has 8 · 32 outputs and 128 rows. Weights go from memory into registers, each warp its own 32 outputs (two
// tiles), as in cuda/fragments.h but for the order of pairs: of a block of k32 lane t has pairs t, t + 4, t + 8 and t + 12. Inputs are staged in
// shared memory in their own order: 64 of k of a row are a line of 128 bytes, whose pieces of 16 bytes change places by the row's number, which
// is wgmma's swizzle of 128 bytes. Accumulators lie as those of mma.sync, so what is done with them is the same.
//
// Floor: 2 · rows · n · k operations. A block of k32 costs 16 KiB of weights and 8 KiB of inputs for 2 Mi operations, 512 clocks of the tensor
// cores: 48 bytes a clock, where the second-level cache gives each multiprocessor some 24 to 30. So half of the tensor cores' rate or a little
// more is what this can reach; beyond, multiprocessors would have to share what they fetch (clusters, multicast).
#pragma once

#include "cuda/fragments.h"
#include "cuda/launch.h"

namespace moebius::cuda {

constexpr int kWideWarps = 8, kWideRows = 128, kWideK = 64;
constexpr int kWideBlocks = kWideRows / 8;  // of rows, in the accumulators
constexpr int kWideThreadRows = kWideRows * kWideK / 8 / (kWideWarps * 32);  // of each stage a thread fetches a piece of so many rows: i / 8, i / 8 + 32, …
constexpr int kWideStages = 5;
constexpr size_t kWideStageBytes = kWideRows * kWideK * sizeof(bf16);
constexpr size_t kWideShared = kWideStages * kWideStageBytes + kSwizzleBytes;  // to begin at a multiple

// Whether the device has wgmma and the module was made for it (and it is not turned off).
inline bool has_wide() {
#ifdef MOEBIUS_EMULATED
  return true;
#elif defined(MOEBIUS_SM90A)
  static const bool off = is_turned_off("MOEBIUS_CUDA_WGMMA");
  int device = 0, major = 0;
  return !off && cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#else
  return false;
#endif
}

// The rows of which a thread fetches pieces: row_of(i) for each of the block's.
template <class RowOf>
__device__ __forceinline__ void wide_rows(const bf16* (&rows)[kWideThreadRows], const RowOf& row_of) {
#pragma unroll
  for (int j = 0; j < kWideThreadRows; ++j) rows[j] = row_of(static_cast<int>(threadIdx.x) / 8 + j * (kWideWarps * 4));
}

// A warp's weights by blocks of k32, of one matrix or of several one after the other: stream_of(i).
template <class StreamOf>
struct WideStream {
  StreamOf stream_of;
  int left, blocks_of_one, within = 0, matrix = 0;
  const uint4* at;
  int pair_stride;  // in 16-byte units

  __device__ WideStream(const StreamOf& of, int count, int64_t k) : stream_of(of), left(count * static_cast<int>(k / 32)), blocks_of_one(static_cast<int>(k / 32)) {
    begin();
  }
  __device__ void begin() {
    const WeightStream stream = stream_of(matrix);
    pair_stride = stream.pair_stride;
    at = stream.base + WeightStream::lane_t() * pair_stride;
  }
  // Where the lane's outputs of its first pair of the next block are; after the last, of it again.
  __device__ __forceinline__ const uint4* next() {
    const uint4* const here = at;
    if (--left > 0) {
      at += kBlockPairs * pair_stride;
      if (++within == blocks_of_one) within = 0, ++matrix, begin();
    }
    return here;
  }
};

// A lane's weights of k64, as wgmma takes them: [k16][product][register].
struct WideWeights {
  uint32_t fragment[4][2][4];
};

// acc += weights · rows (wide_rows), by the whole block, whose warps have as many blocks of k32 each.
template <class StreamOf>
__device__ __forceinline__ void block_multiply_wide(float (&acc)[kWideBlocks][2][4], const bf16* const (&row)[kWideThreadRows], WideStream<StreamOf> weights) {
  auto* const shared = dynamic_shared<std::byte>();
  bf16* const stages = reinterpret_cast<bf16*>(shared + (kSwizzleBytes - shared_address(shared) % kSwizzleBytes) % kSwizzleBytes);
  const int thread = static_cast<int>(threadIdx.x), piece = thread % 8, first_row = thread / 8, blocks = weights.left, num = (blocks + 1) / 2;
  const auto stage_of = [&](int b) { return stages + b % kWideStages * (kWideRows * kWideK); };
  const auto fetch = [&](int b) {
    if (b < num) {
      const bool there = 2 * b + piece / 4 < blocks;  // else zeros
#pragma unroll
      for (int j = 0; j < kWideThreadRows; ++j) {
        const int r = first_row + j * (kWideWarps * 4);
        cp_async_16(stage_of(b) + r * kWideK + (piece ^ r % 8) * 8, row[j] + (there ? b * kWideK + piece * 8 : 0), there);
      }
    }
    cp_async_commit();  // also where there is nothing: groups are counted
  };
  const auto load = [&] {  // past the end, where inputs are zeros, the last again
    WideWeights w;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4* from = weights.next();
#pragma unroll
      for (int i = 0; i < kLanePairs; ++i)
#pragma unroll
        for (int product = 0; product < 2; ++product) {  // 8 bytes, of which the registers need no other place
          const uint2 two = load_half(from + 4 * i * weights.pair_stride, product);
          uint32_t* const to = w.fragment[2 * half + i / 2][product] + i % 2 * 2;
          to[0] = two.x, to[1] = two.y;
        }
    }
    return w;
  };

  for (int b = 0; b < kWideStages - 2; ++b) fetch(b);
  WideWeights w[2];
  w[0] = load();
  for (int first = 0; first < num; first += 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int b = first + i;
      if (b >= num) break;
      cp_async_wait<kWideStages - 3>();  // what this thread fetched of b is there,
      fence_async_shared();              // for wgmma too,
      __syncthreads();                   // and all others' parts; and all warps have multiplied b − 2
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint64_t inputs = swizzled_descriptor(stage_of(b) + step * 16);
        wgmma_bf16<0>(acc, w[i].fragment[step][0], inputs);
        wgmma_bf16<1>(acc, w[i].fragment[step][1], inputs);
      }
      wgmma_commit();
      fetch(b + kWideStages - 2);
      wgmma_wait<1>();
      w[1 - i] = load();
    }
  wgmma_wait<0>();
  wgmma_settle(acc);
  cp_async_wait<0>();
  __syncthreads();  // before the stages are filled again
}

}  // namespace moebius::cuda
