// Floors. Router: its weights (experts · hidden · 2 bytes) once for each kRouterRows rows from the second-level cache, and a launch. Grouping:
// the choices are some KiB in a decode step, so one launch; a prompt's are sorted (CUB).
#include "cuda/route.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/sort.h"
#include "lib/tensor/packed.h"

namespace moebius::cuda {
namespace {

constexpr int kRouterWarps = 4;
constexpr int kChains = 4;  // sums of a lane side by side: one alone would wait four cycles for each step

// Logits of kRows rows for a tile of 16 experts by one warp: lane e + 16·h takes expert e and the pairs p with p mod 2 = h, those with
// p / 2 mod kChains = c in chain c. The order is the same for every number of rows.
template <int kRows>
__global__ void __launch_bounds__(kRouterWarps * 32) router_logits_kernel(RouteArgs args, float* logits, int64_t stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32, expert = lane % 16, odd = lane / 16;
  const int64_t tiles = div_up(args.num_experts, kTile), unit = static_cast<int64_t>(blockIdx.x) * kRouterWarps + threadIdx.x / 32;
  const int64_t first = unit / tiles * kRows, tile = unit % tiles, num = min(args.rows.size() - first, int64_t{kRows});
  if (num <= 0) return;
  const int64_t pairs = div_up(args.hidden, 2);
  const uint32_t* w = reinterpret_cast<const uint32_t*>(args.w) + tile * pairs * kTile + expert;
  const float2* x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)  // rows past the last repeat it
    x[r] = reinterpret_cast<const float2*>(args.x + (args.rows.begin + first + (r < num ? r : 0)) * args.hidden);
  float sum[kRows][kChains] = {};
  for (int64_t p = odd; p < pairs; p += 2 * kChains) {
    uint32_t word[kChains];
#pragma unroll
    for (int c = 0; c < kChains; ++c) word[c] = p + 2 * c < pairs ? w[(p + 2 * c) * kTile] : 0;
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      if (p + 2 * c >= pairs) continue;
      const float even = to_float(static_cast<bf16>(word[c])), high = to_float(static_cast<bf16>(word[c] >> 16));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float2 v = x[r][p + 2 * c];
        sum[r][c] = __fmaf_rn(high, v.y, __fmaf_rn(even, v.x, sum[r][c]));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float total = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
    total += __shfl_xor_sync(kAllLanes, total, 16);
    if (r < num && odd == 0 && tile * kTile + expert < args.num_experts) logits[(first + r) * stride + tile * kTile + expert] = total;
  }
}

// Softmax and the top_k of one row by one warp; lane l has experts l, l + 32, ….
template <int kPerLane>
__global__ void __launch_bounds__(kRouterWarps * 32) choose_experts_kernel(RouteArgs args, const float* logits, int64_t stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRouterWarps + threadIdx.x / 32;
  if (i >= args.rows.size()) return;
  const float infinity = __uint_as_float(0x7f800000u);
  float p[kPerLane], most = -infinity, sum = 0;
#pragma unroll
  for (int n = 0; n < kPerLane; ++n) {
    const int e = n * 32 + lane;
    p[n] = e < args.num_experts ? logits[i * stride + e] : -infinity;
    most = larger(p[n], most);
  }
  most = warp_max(most);
  // Ranks for choosing: a probability; −0.5 for NaN, which comes after all numbers; −1 for what does not exist or has been taken.
  float rank[kPerLane];
#pragma unroll
  for (int n = 0; n < kPerLane; ++n) {
    const bool exists = n * 32 + lane < args.num_experts;
    p[n] = exists ? exp_of(p[n] - most) : 0;
    rank[n] = !exists ? -1.0f : p[n] >= 0 ? p[n] : -0.5f;
    sum += p[n];
  }
  sum = warp_sum(sum);

  const int64_t out = (args.rows.begin + i) * args.top_k;
  float chosen = 0;
  for (int k = 0; k < args.top_k; ++k) {
    float best = -2, value = 0;
    int id = 0;
#pragma unroll
    for (int n = 0; n < kPerLane; ++n)
      if (rank[n] > best) best = rank[n], value = p[n], id = n * 32 + lane;  // the lowest of the lane's
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, bits), other_value = __shfl_xor_sync(kAllLanes, value, bits);
      const int other_id = __shfl_xor_sync(kAllLanes, id, bits);
      if (other > best || (other == best && other_id < id)) best = other, value = other_value, id = other_id;
    }
#pragma unroll
    for (int n = 0; n < kPerLane; ++n)
      if (n * 32 + lane == id) rank[n] = -1;
    chosen += value;
    if (lane == 0) {
      args.ids[out + k] = id;
      args.weights[out + k] = __fdiv_rn(value, sum);
    }
  }
  if (args.renormalise && lane == 0)
    for (int k = 0; k < args.top_k; ++k) args.weights[out + k] = __fdiv_rn(args.weights[out + k] * sum, chosen);
}

// ---- grouping

constexpr int kGroupThreads = 1024, kGroupWarps = kGroupThreads / 32;
constexpr int kMaxInBlock = 4096;   // choices that one block groups

// local number of choice i, or num_experts when it is not one of the rank's, or of no row.
__device__ int local_of(const GroupArgs& args, int64_t i) {
  if (args.tokens != nullptr && args.tokens[args.rows.begin + i / args.top_k] < 0) return args.num_experts;
  const int local = args.local_of_expert[args.ids[args.rows.begin * args.top_k + i]];
  return local >= 0 ? local : args.num_experts;
}

__device__ void put_pair(const GroupArgs& args, int64_t to, int64_t choice) {
  const int64_t i = args.rows.begin * args.top_k + choice;
  args.pair_rows[to] = static_cast<int32_t>(i / args.top_k);
  args.pair_weights[to] = args.weights[i];
}

// One block: counts, a scan of the counts, then each warp takes experts and finds their choices in order by ballots.
__global__ void __launch_bounds__(kGroupThreads) group_small_kernel(GroupArgs args) {
  __shared__ int counts[kGpuMaxExperts + 1];
  __shared__ int begins[kGpuMaxExperts + 1];
  __shared__ int16_t locals[kMaxInBlock];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int num = static_cast<int>(args.rows.size()) * args.top_k;
  for (int e = thread; e <= args.num_experts; e += kGroupThreads) counts[e] = 0;
  __syncthreads();
  for (int i = thread; i < num; i += kGroupThreads) {
    const int local = local_of(args, i);
    locals[i] = static_cast<int16_t>(local);
    atomicAdd(&counts[local], 1);
  }
  __syncthreads();
  if (warp == 0) {
    warp_lay_end_to_end(begins, args.num_experts, [&](int e) { return counts[e]; });
    int reached = 0;
    for (int e = lane; e < args.num_experts; e += 32) reached += counts[e] > 0;
    reached = warp_sum(reached);
    if (lane == 0) *args.experts_reached += reached;
  }
  __syncthreads();
  for (int e = thread; e <= args.num_experts; e += kGroupThreads) args.begins[e] = begins[e];
  for (int e = warp; e < args.num_experts; e += kGroupWarps) {
    if (counts[e] == 0) continue;
    int to = begins[e];
    for (int first = 0; first < num; first += 32) {
      const bool hit = first + lane < num && locals[first + lane] == e;
      const unsigned hits = __ballot_sync(kAllLanes, hit);
      if (hit) put_pair(args, to + __popc(hits & ((1u << lane) - 1)), first + lane);
      to += __popc(hits);
    }
  }
}

__global__ void number_choices_kernel(GroupArgs args, int32_t* keys, int32_t* choices, int64_t num) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= num) return;
  keys[i] = local_of(args, i);
  choices[i] = static_cast<int32_t>(i);
}

// keys and choices are sorted by key, equal ones in order.
__global__ void place_pairs_kernel(GroupArgs args, const int32_t* keys, const int32_t* choices, int64_t num) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i > num) return;
  const int here = i < num ? keys[i] : args.num_experts, before = i > 0 ? keys[i - 1] : -1;
  for (int e = before + 1; e <= here; ++e) args.begins[e] = static_cast<int32_t>(i);  // the experts that begin here, empty ones too
  if (here > before && i > 0 && before < args.num_experts) atomicAdd(args.experts_reached, 1);  // the last pair of `before`
  if (here < args.num_experts) put_pair(args, i, choices[i]);
}

__global__ void group_dense_kernel(GroupArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, num = args.rows.size();
  if (i == 0) {
    args.begins[0] = 0;
    args.begins[1] = static_cast<int32_t>(num);
    *args.experts_reached += num > 0;
  }
  if (i >= num) return;
  args.pair_rows[i] = static_cast<int32_t>(args.rows.begin + i);
  args.pair_weights[i] = 1.0f;
}

template <int kPerLane>
void choose(const RouteArgs& args, const float* logits, int64_t stride, void* queue) {
  launch(choose_experts_kernel<kPerLane>, static_cast<unsigned>(div_up(args.rows.size(), kRouterWarps)), kRouterWarps * 32, 0, queue, args, logits,
         stride);
}

}  // namespace

void route(const RouteArgs& args, const Lane& lane) {
  constexpr int kManyRows = 8;
  const int64_t rows = args.rows.size(), tiles = div_up(args.num_experts, kTile), stride = tiles * kTile;
  float* const logits = reinterpret_cast<float*>(lane.scratch);
  const auto blocks = [&](int64_t rows_of_warp) { return static_cast<unsigned>(div_up(div_up(rows, rows_of_warp) * tiles, kRouterWarps)); };
  if (rows < 4 * kManyRows) launch(router_logits_kernel<1>, blocks(1), kRouterWarps * 32, 0, lane.queue, args, logits, stride);
  else launch(router_logits_kernel<kManyRows>, blocks(kManyRows), kRouterWarps * 32, 0, lane.queue, args, logits, stride);
  if (args.num_experts <= 128) choose<4>(args, logits, stride, lane.queue);
  else if (args.num_experts <= 256) choose<8>(args, logits, stride, lane.queue);
  else choose<kGpuMaxExperts / 32>(args, logits, stride, lane.queue);
}

void group_experts(const GroupArgs& args, const Lane& lane) {
  constexpr int kThreads = 256;
  const int64_t num = args.rows.size() * args.top_k;
  const auto blocks = [](int64_t n) { return static_cast<unsigned>(div_up(n, kThreads)); };
  if (args.local_of_expert == nullptr) {
    launch(group_dense_kernel, blocks(std::max<int64_t>(1, args.rows.size())), kThreads, 0, lane.queue, args);
    return;
  }
  if (num <= kMaxInBlock) {
    launch(group_small_kernel, 1, kGroupThreads, 0, lane.queue, args);
    return;
  }
  SortScratch scratch(lane.scratch, num);
  launch(number_choices_kernel, blocks(num), kThreads, 0, lane.queue, args, scratch.keys, scratch.values, num);
  sort_by_key(scratch, num, args.num_experts, lane.queue);
  launch(place_pairs_kernel, blocks(num + 1), kThreads, 0, lane.queue, args, scratch.sorted_keys, scratch.sorted_values, num);
}

size_t scratch_bytes_route(const OpLimits& limits) {
  const int64_t logits = limits.max_rows * round_up(limits.num_experts, kTile) * static_cast<int64_t>(sizeof(float));
  return static_cast<size_t>(std::max(logits, SortScratch::bytes(limits.max_rows * limits.top_k)));
}

}  // namespace moebius::cuda
