// Arithmetic of single threads and warps. Products and sums are written as they are to be done: the build contracts nothing (-fmad=false).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lib/tensor/dtype.h"

namespace moebius::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// e^x as lib/cpu/math.h has it: Cody–Waite reduction, then a polynomial of degree 6; 0 below −104, infinity above 89, NaN stays NaN.
__device__ __forceinline__ float exp_of(float x) {
  if (!(x >= -104.0f)) return x != x ? x : 0.0f;
  x = x > 89.0f ? 89.0f : x;
  const float n = rintf(x * 1.44269504f);
  float r = __fmaf_rn(n, -0.693145752f, x);
  r = __fmaf_rn(n, -1.42860677e-6f, r);
  float p = 1.0f / 720;
  p = __fmaf_rn(p, r, 1.0f / 120);
  p = __fmaf_rn(p, r, 1.0f / 24);
  p = __fmaf_rn(p, r, 1.0f / 6);
  p = __fmaf_rn(p, r, 0.5f);
  p = __fmaf_rn(p, r, 1.0f);
  p = __fmaf_rn(p, r, 1.0f);
  // 2^n in two factors: n may be as low as −150 or as high as 128.
  const int whole = static_cast<int>(n), half = whole / 2;
  const auto power = [](int e) { return __uint_as_float(static_cast<unsigned>(e + 127) << 23); };
  return p * power(half) * power(whole - half);
}

// x · sigmoid(x)
__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, 1.0f + exp_of(-x)); }

// All lanes get the sum, by a fixed tree.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(kAllLanes, v, bits);
  return v;
}

// Each lane gets the sum of its own and the lower lanes' values, in a fixed order.
template <class T>
__device__ __forceinline__ T warp_running_sum(T v) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const T lower = __shfl_up_sync(kAllLanes, v, static_cast<unsigned>(by));
    if (lane >= by) v += lower;
  }
  return v;
}

// begin[i] = the counts before i, begin[num] and the result all of them. By the whole warp.
template <class Count>
__device__ __forceinline__ int warp_lay_end_to_end(int* begin, int num, const Count& count_of) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int before = 0;
  for (int first = 0; first < num; first += 32) {
    const int i = first + lane, mine = i < num ? count_of(i) : 0, sum = warp_running_sum(mine);
    if (i < num) begin[i] = before + sum - mine;
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) begin[num] = before;
  return before;
}

// The last of `num` things laid end to end that begins at or before `at`, so the one that holds it: empty ones lie before their next.
template <class Index, class Begin>
__device__ __forceinline__ Index holder_of(Index num, const Begin& begin_of, Index at) {
  Index low = 0;
  for (Index high = num; high - low > 1;) {
    const Index middle = (low + high) / 2;
    if (begin_of(middle) <= at) low = middle;
    else high = middle;
  }
  return low;
}

// The larger of two where neither is NaN, else the one that is none.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) v = larger(v, __shfl_xor_sync(kAllLanes, v, bits));
  return v;
}

}  // namespace moebius::cuda
