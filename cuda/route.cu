// Floors. Router: its weights (experts · hidden · 2 bytes) once for each group of rows (1 or 8) from the second-level cache, and a launch: 128
// experts of hidden 2048 are 512 KiB, 0.1 µs. A decode step has a block for each 16 experts and row, so few multiprocessors are busy and what
// counts is how often a block waits for memory: 8 warps with 16 loads of 16 bytes a lane have 64 KiB under way, hidden 2048 at once. With 8 rows
// it is 16 KiB of weights and as much of inputs. Grouping: the choices are some KiB in a decode step, so one launch, or none where they are few;
// a prompt's are sorted (CUB).
#include "cuda/route.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/norm.h"
#include "cuda/ptx.h"
#include "cuda/rows.h"
#include "cuda/scratch.h"
#include "cuda/sort.h"
#include "lib/tensor/packed.h"

namespace moebius::cuda {
namespace {

constexpr int kRouterWarps = 8;
constexpr int kWarpPairs = 8, kStepPairs = kRouterWarps * kWarpPairs;  // pairs of k that a warp, a block loads at once

// Adds up over the 8 lanes of the same experts, by a tree. Of two lanes each takes half of the rows and hands over the others, as long as
// there are two; so the sums of row r end as sum[0] of lanes 4·r … 4·r + 3. To begin with left = kRows, bits = 4.
template <int left, int bits, int kRows>
__device__ __forceinline__ void add_pair_lanes(float (&sum)[kRows][4], int lane) {
  if constexpr (bits < 32) {
    constexpr int kept = left > 1 ? left / 2 : 1;
    const bool upper = (lane & bits) != 0;
#pragma unroll
    for (int r = 0; r < kept; ++r) {
      constexpr int kStep = left > 1 ? 2 : 1;
      const int low = kStep * r, high = low + kStep - 1;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float mine = upper ? sum[high][e] : sum[low][e], others = upper ? sum[low][e] : sum[high][e];
        sum[r][e] = mine + __shfl_xor_sync(kAllLanes, others, bits);
      }
    }
    add_pair_lanes<kept, 2 * bits>(sum, lane);
  }
}

// For comparing: larger for larger numbers, 1 for NaN, which comes after all numbers.
__device__ __forceinline__ unsigned order_of(float v) {
  const unsigned bits = __float_as_uint(v);
  return v != v ? 1 : (bits >> 31 != 0 ? ~bits : bits | 0x80000000u);
}

__device__ __forceinline__ float sigmoid_of(float x) { return __fdiv_rn(1.0f, 1.0f + exp_of(-x)); }

// The experts of row i of args.rows by one warp; lane l has experts l, l + 32, …. logits: of tiles of experts and then of what gates_shared.
// values: room for the scores of the chosen, in order.
template <int kPerLane>
__device__ __forceinline__ void warp_choose_experts(const RouteArgs& args, int64_t i, const float* logits, float* values) {
  const RouteRule& rule = args.rule;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float infinity = __uint_as_float(0x7f800000u);
  float score[kPerLane], most = -infinity, sum = rule.sigmoid ? 1.0f : 0.0f;
#pragma unroll
  for (int n = 0; n < kPerLane; ++n) {
    const int e = n * 32 + lane;
    score[n] = e < rule.num_experts ? logits[e] : -infinity;
    most = larger(score[n], most);
  }
  most = warp_max(most);
  unsigned key[kPerLane];  // 0 for what does not exist or has been taken
  bool lost = false;       // NaN of one expert is the row's, though nobody chooses it
#pragma unroll
  for (int n = 0; n < kPerLane; ++n) {
    const int e = n * 32 + lane;
    const bool exists = e < rule.num_experts;
    score[n] = !exists ? 0 : rule.sigmoid ? sigmoid_of(score[n]) : exp_of(score[n] - most);
    const float compared = exists && args.bias != nullptr ? score[n] + args.bias[e] : score[n];
    key[n] = !exists ? 0 : order_of(compared);
    lost |= compared != compared;
    if (!rule.sigmoid) sum += score[n];
  }
  if (!rule.sigmoid) sum = warp_sum(sum);
  if (__any_sync(kAllLanes, lost)) sum = __uint_as_float(0x7fc00000u);

  const int64_t out = (args.rows.begin + i) * rule.choices();
  float chosen = rule.sigmoid ? kLeastScores : 0;
  for (int k = 0; k < rule.top_k; ++k) {
    unsigned best = 0, id = 0;
#pragma unroll
    for (int n = 0; n < kPerLane; ++n)
      if (key[n] > best) best = key[n], id = static_cast<unsigned>(n * 32 + lane);  // the lowest of the lane's
    const unsigned top = __reduce_max_sync(kAllLanes, best);
    id = __reduce_min_sync(kAllLanes, best == top ? id : static_cast<unsigned>(kGpuMaxExperts));
    float value = 0;  // the lane's that has it
#pragma unroll
    for (int n = 0; n < kPerLane; ++n)
      if (static_cast<unsigned>(n * 32 + lane) == id) key[n] = 0, value = score[n];
    value = __shfl_sync(kAllLanes, value, static_cast<int>(id) % 32);
    chosen += value;
    if (lane == 0) {
      args.ids[out + k] = static_cast<int32_t>(id);
      values[k] = value;
    }
  }
  __syncwarp();
  for (int k = lane; k < rule.top_k; k += 32) {
    const float weight = __fdiv_rn(values[k], sum);
    args.weights[out + k] = (rule.renormalise ? __fdiv_rn(weight * sum, chosen) : weight) * rule.scale;
  }
  for (int k = lane; k < rule.num_shared; k += 32) {
    args.ids[out + rule.top_k + k] = rule.num_experts + k;
    args.weights[out + rule.top_k + k] = rule.gates_shared ? sigmoid_of(logits[div_up(rule.num_experts, kTile) * kTile]) : 1.0f;
  }
}

// local number of choice i, or num_experts when it is not one of the rank's, or of no row.
__device__ int local_of(const GroupArgs& args, int64_t i) {
  const int64_t row = args.rows.begin + i / args.choices;
  const int token = args.tokens != nullptr ? args.tokens[row] : 0;
  const int id = args.ids[args.rows.begin * args.choices + i];  // both on their way together
  const bool counts = token >= 0 && (id < args.num_routed || args.shared_rows.contains(row));
  const int local = counts ? args.local_of_expert[id] : -1;
  return local >= 0 ? local : args.num_experts;
}

__device__ void put_pair(const GroupArgs& args, int64_t to, int64_t choice) {
  const int64_t i = args.rows.begin * args.choices + choice;
  args.pair_rows[to] = static_cast<int32_t>(i / args.choices);
  args.pair_weights[to] = args.weights[i];
}

template <int kMost>
struct Groups {
  int counts[kGpuMaxExperts + 1], begins[kGpuMaxExperts + 1];
  int16_t locals[kMost];
};

// By one block, at most kMost choices: counts, a scan of the counts, then each warp takes experts and finds their choices in order by ballots.
template <int kThreads, int kMost>
__device__ void block_group(const GroupArgs& args, Groups<kMost>& groups) {
  int *const counts = groups.counts, *const begins = groups.begins;
  int16_t* const locals = groups.locals;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int num = static_cast<int>(args.rows.size()) * args.choices;
  for (int e = thread; e <= args.num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  for (int i = thread; i < num; i += kThreads) {
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
  for (int e = thread; e <= args.num_experts; e += kThreads) args.begins[e] = begins[e];
  for (int e = warp; e < args.num_experts; e += kThreads / 32) {
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

constexpr int kFewChoices = 128;  // that the router's kernel groups too: its warps are few

// Logits of kRows rows for a tile of 16 experts by one block. Lane 4·q + c takes experts 4·c … 4·c + 3 at pair q of its warp's 8, so a warp
// loads 512 bytes in one piece. A lane adds up its pairs in order, the lanes of the same experts theirs by a tree, the warps theirs in order:
// the order is the same for every number of rows. The last block of the rows chooses their experts, a warp for each row; where group has begins
// the last of these groups all rows. With kNormParts above 0 each block norms its row by itself first, and the row's first one stores it. One block a
// multiprocessor is asked for since for more the compiler saves registers, and puts off each load until it is needed.
template <int kRows, int kPerLane, int kNormParts>
__global__ void __launch_bounds__(kRouterWarps * 32, 1) route_kernel(RouteArgs args, GroupArgs group, float* logits, int64_t stride,
                                                                     unsigned* counters, NormAhead ahead) {
  constexpr int kAhead = kRows == 1 ? 16 : 4;  // loads of weights under way, each with kRows of inputs: what registers hold
  __shared__ float of_warp[kRouterWarps][kRows * kTile];
  __shared__ float values[kRows][kPerLane * 32];
  __shared__ bool last;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t tile = blockIdx.y, first = int64_t{blockIdx.x} * kRows, num = min(args.rows.size() - first, int64_t{kRows});
  const int pairs = static_cast<int>(div_up(args.hidden, 2));
  begin_next();
  if (blockIdx.x == 0 && thread == 0) prefetch_bytes(args.w + tile * pairs * 2 * kTile, int64_t{pairs} * 2 * kTile * 2);
  const uint4* w = reinterpret_cast<const uint4*>(args.w) + tile * pairs * (kTile / 4) + lane % 4;
  uint4 loaded[kAhead];
  const auto load_weights = [&](int begin) {  // past the end they and the inputs are zeros: 0 · NaN would be NaN
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int p = begin + i * kStepPairs + lane / 4;
      loaded[i] = p < pairs ? load_once(w + p * (kTile / 4)) : make_uint4(0, 0, 0, 0);
    }
  };
  load_weights(warp * kWarpPairs);
  const float2* x[kRows];
  if constexpr (kNormParts > 0) {
    __shared__ float2 normed[BlockRow<kRowThreads, kNormParts>::kLongest / 2];
    static_assert(kRows == 1 && kRouterWarps * 32 == kRowThreads);
    const int64_t row = args.rows.begin + first;
    BlockRow<kRowThreads, kNormParts> mine;
    mine.load_weight(ahead.args);
    await_previous();
    mine.load_and_add(ahead.args, ahead.partials, 0, ahead.partials.num, row);
    if (tile == 0 && ahead.partials.num > 0) mine.store(ahead.args, row);
    mine.norm(ahead.args, [&](int64_t i, float v) {
      reinterpret_cast<float*>(normed)[i] = v;
      if (tile == 0) ahead.args.x[row * args.hidden + i] = to_bf16(v);
    });
    __syncthreads();
    x[0] = normed;
  } else {
    await_previous();
#pragma unroll
    for (int r = 0; r < kRows; ++r)  // rows past the last repeat it
      x[r] = reinterpret_cast<const float2*>(args.x + (args.rows.begin + first + (r < num ? r : 0)) * args.hidden);
  }
  float sum[kRows][4] = {};
  for (int begin = warp * kWarpPairs; begin < pairs; begin += kAhead * kStepPairs) {
    if (begin != warp * kWarpPairs) load_weights(begin);
    float2 v[kAhead][kRows];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int p = begin + i * kStepPairs + lane / 4;
#pragma unroll
      for (int r = 0; r < kRows; ++r) v[i][r] = p < pairs ? x[r][p] : make_float2(0, 0);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t word[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float even = to_float(static_cast<bf16>(word[e])), odd = to_float(static_cast<bf16>(word[e] >> 16));
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r][e] = __fmaf_rn(odd, v[i][r].y, __fmaf_rn(even, v[i][r].x, sum[r][e]));
      }
    }
  }
  add_pair_lanes<kRows, 4>(sum, lane);
  if (lane < kRows * 4) {
#pragma unroll
    for (int e = 0; e < 4; ++e) of_warp[warp][lane * 4 + e] = sum[0][e];
  }
  __syncthreads();
  if (thread / kTile < num) {
    float total = of_warp[0][thread];
#pragma unroll
    for (int other = 1; other < kRouterWarps; ++other) total += of_warp[other][thread];
    logits[(first + thread / kTile) * stride + tile * kTile + thread % kTile] = total;
  }
  __syncthreads();
  if (thread == 0) last = comes_last(counters + blockIdx.x, static_cast<int>(gridDim.y));
  __syncthreads();
  if (!last) return;
  if (warp < num) warp_choose_experts<kPerLane>(args, first + warp, logits + (first + warp) * stride, values[warp]);
  if constexpr (kRows == 1) {
    if (group.begins == nullptr) return;
    __shared__ Groups<kFewChoices> groups;
    __syncthreads();
    if (thread == 0) last = comes_last(counters + kCounters - 1, static_cast<int>(gridDim.x));  // no row's: rows are fewer than kFewRows
    __syncthreads();
    if (last) block_group<kRouterWarps * 32>(group, groups);
  }
}

// ---- grouping of many choices

constexpr int kGroupThreads = 1024;
constexpr int kMaxInBlock = 4096;  // choices that one block groups

__global__ void __launch_bounds__(kGroupThreads, 1) group_small_kernel(GroupArgs args) {
  follow_previous();
  __shared__ Groups<kMaxInBlock> groups;
  block_group<kGroupThreads>(args, groups);
}

__global__ void number_choices_kernel(GroupArgs args, int32_t* keys, int32_t* choices, int64_t num) {
  follow_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= num) return;
  keys[i] = local_of(args, i);
  choices[i] = static_cast<int32_t>(i);
}

// keys and choices are sorted by key, equal ones in order.
__global__ void place_pairs_kernel(GroupArgs args, const int32_t* keys, const int32_t* choices, int64_t num) {
  follow_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i > num) return;
  const int here = i < num ? keys[i] : args.num_experts, before = i > 0 ? keys[i - 1] : -1;
  for (int e = before + 1; e <= here; ++e) args.begins[e] = static_cast<int32_t>(i);  // the experts that begin here, empty ones too
  if (here > before && i > 0 && before < args.num_experts) atomicAdd(args.experts_reached, 1);  // the last pair of `before`
  if (here < args.num_experts) put_pair(args, i, choices[i]);
}

__global__ void group_dense_kernel(GroupArgs args) {
  follow_previous();
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

template <int kRows, int kPerLane, int kNormParts = 0>
void launch_route(const RouteArgs& args, const GroupArgs& group, int64_t tiles, const Lane& lane, const NormAhead& ahead = {}) {
  const int64_t stride = tiles * kTile;
  RouteArgs some = args;
  for (some.rows.end = args.rows.begin; some.rows.end < args.rows.end;) {  // as many groups of rows as there are counters
    some.rows.begin = some.rows.end;
    some.rows.end = std::min(args.rows.end, some.rows.begin + int64_t{kCounters} * kRows);
    const dim3 grid(static_cast<unsigned>(div_up(some.rows.size(), kRows)), static_cast<unsigned>(tiles));
    launch(route_kernel<kRows, kPerLane, kNormParts>, grid, kRouterWarps * 32, 0, lane.queue, some, group, scratch_of<float>(lane), stride, counters_of(lane),
           ahead);
  }
}

constexpr int kManyRows = 8, kFewRows = 4 * kManyRows;
static_assert(kFewRows < kCounters);

template <int kPerLane>
void launch_route(const RouteArgs& args, const GroupArgs& group, const Lane& lane, const AddNormArgs* norm) {
  const int64_t tiles = div_up(args.rule.num_experts, kTile) + args.rule.gates_shared;
  if (args.rows.size() >= kFewRows) launch_route<kManyRows, kPerLane>(args, group, tiles, lane);
  else if (norm == nullptr) launch_route<1, kPerLane>(args, group, tiles, lane);
  else if (parts_ahead(*norm) == 1) launch_route<1, kPerLane, 1>(args, group, tiles, lane, NormAhead(*norm));
  else launch_route<1, kPerLane, 2>(args, group, tiles, lane, NormAhead(*norm));
}

// group: of fewer than kFewRows rows and at most kFewChoices choices, or none. norm: of as few that have parts_ahead, or null.
void launch_route(const RouteArgs& args, const GroupArgs& group, const Lane& lane, const AddNormArgs* norm = nullptr) {
  if (args.rule.num_experts <= 128) launch_route<4>(args, group, lane, norm);
  else if (args.rule.num_experts <= 256) launch_route<8>(args, group, lane, norm);
  else launch_route<kGpuMaxExperts / 32>(args, group, lane, norm);
}

}  // namespace

void route(const RouteArgs& args, const Lane& lane) { launch_route(args, {}, lane); }

void norm_route(const NormRouteArgs& args, const Lane& lane) {
  const int64_t rows = args.route.rows.size();
  const bool few = rows < kFewRows, ahead = few && parts_ahead(args.norm) > 0, groups = args.group.begins != nullptr;
  const bool groups_too = groups && few && rows > 0 && rows * args.route.rule.choices() <= kFewChoices;
  if (!ahead) add_norm(args.norm, lane);
  launch_route(args.route, groups_too ? args.group : GroupArgs{}, lane, ahead ? &args.norm : nullptr);
  if (groups && !groups_too) group_experts(args.group, lane);
}

void group_experts(const GroupArgs& args, const Lane& lane) {
  constexpr int kThreads = 256;
  const int64_t num = args.rows.size() * args.choices;
  const auto blocks = [](int64_t n) { return static_cast<unsigned>(div_up(n, kThreads)); };
  if (args.local_of_expert == nullptr) {
    launch(group_dense_kernel, blocks(std::max<int64_t>(1, args.rows.size())), kThreads, 0, lane.queue, args);
    return;
  }
  if (num <= kMaxInBlock) {
    launch(group_small_kernel, 1, kGroupThreads, 0, lane.queue, args);
    return;
  }
  SortScratch scratch(scratch_of<std::byte>(lane), num);
  launch(number_choices_kernel, blocks(num), kThreads, 0, lane.queue, args, scratch.keys, scratch.values, num);
  sort_by_key(scratch, num, args.num_experts, lane.queue);
  launch(place_pairs_kernel, blocks(num + 1), kThreads, 0, lane.queue, args, scratch.sorted_keys, scratch.sorted_values, num);
}

size_t scratch_bytes_route(const OpLimits& limits) {
  const int64_t columns = round_up(limits.num_experts, kTile) + kTile;  // the last for what gates_shared
  const int64_t logits = limits.max_rows * columns * static_cast<int64_t>(sizeof(float));
  return static_cast<size_t>(std::max(logits, SortScratch::bytes(limits.max_rows * limits.choices)));
}

}  // namespace moebius::cuda
