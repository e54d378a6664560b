// A head's norm and rotary embedding (halves rotated), and K and V into their page: by four lanes, in one order wherever it is done.
#pragma once

#include "cuda/math.h"
#include "cuda/ptx.h"
#include "lib/device/ops.h"
#include "lib/tensor/packed.h"

namespace moebius::cuda {

// f(n, s, i) for the lane's pieces of 4 dimensions i = 32·n + 8·t + s … + 3 of `half`, t the lane's number among the four.
template <int kGroups, class F>
__device__ __forceinline__ void for_pieces(int half, const F& f) {
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (int s = 0; s < 8; s += 4)
      if (const int i = n * 32 + static_cast<int>(threadIdx.x) % 4 * 8 + s; i < half) f(n, s, i);
}

template <int kBytes>
__device__ __forceinline__ void load_piece(float* to, const float* from) {
  if constexpr (kBytes == 16) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const float2 low = reinterpret_cast<const float2*>(from)[0], high = reinterpret_cast<const float2*>(from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
  }
}

// A piece as bf16, in order.
__device__ __forceinline__ uint2 bf16_piece(const float* v) { return make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])); }

// A lane's dimensions of [dim] floats, dim ≤ 64·kGroups: of the lower half and, as far behind each, of the upper.
template <int kGroups>
struct RopeHalves {
  float low[kGroups][8], high[kGroups][8];

  // row: aligned to kBytes.
  template <int kBytes = 16>
  __device__ __forceinline__ void load(const float* row, int half) {
    for_pieces<kGroups>(half, [&](int n, int s, int i) {
      load_piece<kBytes>(low[n] + s, row + i);
      load_piece<kBytes>(high[n] + s, row + half + i);
    });
  }

  // bias: [dim], aligned to 8 bytes.
  __device__ __forceinline__ void add(const float* bias, int half) {
    RopeHalves other;
    other.template load<8>(bias, half);
    for_pieces<kGroups>(half, [&](int n, int s, int) {
#pragma unroll
      for (int e = s; e < s + 4; ++e) low[n][e] += other.low[n][e], high[n][e] += other.high[n][e];
    });
  }

  __device__ __forceinline__ void fill(float v) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int e = 0; e < 8; ++e) low[n][e] = high[n][e] = v;
  }

  // By the whole warp, each four lanes with a head of their own. norm: weights [dim], aligned to 8 bytes, or null. rope: cosines and sines of the
  // position.
  __device__ __forceinline__ void norm_and_rotate(const float* norm, float eps, const float* rope, int half) {
    RopeHalves weight, angle;
    if (norm != nullptr) weight.template load<8>(norm, half);
    else weight.fill(1);
    angle.load(rope, half);
    float squares = 0;
    for_pieces<kGroups>(half, [&](int n, int s, int) {
#pragma unroll
      for (int e = s; e < s + 4; ++e) squares = __fmaf_rn(high[n][e], high[n][e], __fmaf_rn(low[n][e], low[n][e], squares));
    });
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) squares += __shfl_xor_sync(kAllLanes, squares, bits);
    const float factor = norm != nullptr ? __frsqrt_rn(squares * (1.0f / static_cast<float>(2 * half)) + eps) : 1.0f;
    for_pieces<kGroups>(half, [&](int n, int s, int) {
#pragma unroll
      for (int e = s; e < s + 4; ++e) {
        const float a = low[n][e] * factor * weight.low[n][e], b = high[n][e] * factor * weight.high[n][e];
        const float cosine = angle.low[n][e], sine = angle.high[n][e];
        low[n][e] = a * cosine - b * sine;
        high[n][e] = b * cosine + a * sine;
      }
    });
  }
};

// A V that is no number is stored as 0: tensor cores multiply what is masked by 0, and NaN would stay. Rows that see it are NaN all the
// same, by its K, which comes of the same input.
__device__ __forceinline__ float value_of(float v, float scale) {
  v *= scale;
  return fabsf(v) < __uint_as_float(0x7f800000u) ? v : 0;
}

// K, ready, and V as the projection left it, of local KV head j at `position`, by the four lanes that have them.
template <int kGroups>
__device__ __forceinline__ void store_kv(const KvView& view, const int32_t* pages, int position, int j, const RopeHalves<kGroups>& k,
                                         const RopeHalves<kGroups>& v, float value_scale, int half) {
  const KvSlice slice{view.page_tokens, 2 * half};
  const int slot = position % view.page_tokens;
  const int64_t page = pages[position / view.page_tokens];
  bf16* const kv = reinterpret_cast<bf16*>(view.base + (page * view.num_kv_heads + j) * slice.bytes());
  uint32_t* const keys = reinterpret_cast<uint32_t*>(kv + slice.k_index(slot, 0));  // a word is a pair of dimensions, kTile of them a tile's
  f16* const values = kv + slice.v_index(slot, 0);
  const auto store = [&](const float* key, const float* value, int d) {  // 4 dimensions
    const uint2 pairs = bf16_piece(key);
    keys[d / 2 * kTile] = pairs.x;
    keys[(d / 2 + 1) * kTile] = pairs.y;
    *reinterpret_cast<uint2*>(values + d) = make_uint2(pack_f16(value_of(value[0], value_scale), value_of(value[1], value_scale)),
                                                       pack_f16(value_of(value[2], value_scale), value_of(value[3], value_scale)));
  };
  for_pieces<kGroups>(half, [&](int n, int s, int i) {
    store(k.low[n] + s, v.low[n] + s, i);
    store(k.high[n] + s, v.high[n] + s, half + i);
  });
}

}  // namespace moebius::cuda
