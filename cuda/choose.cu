// Floor: the row's logits once for the largest and once more for the sums, from the second-level cache where they were just written.
//
// A block a row. The vocabulary is taken in tiles of 1,024 tokens at fixed places, so sums do not depend on how it is shared among ranks.
#include "cuda/choose.h"

#include "cuda/launch.h"
#include "cuda/math.h"
#include "lib/layout/owners.h"

namespace moebius::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kTileTokens = 1024;
constexpr int kMaxTiles = kGpuMaxVocab / kTileTokens;

struct Shares {
  int num;
  const float* logits[kMaxRanks];
  Range columns[kMaxRanks];
};

__device__ float logit_at(const Shares& shares, int64_t stride, int64_t row, int64_t token) {
  int s = 0;
  while (token >= shares.columns[s].end) ++s;
  return shares.logits[s][row * stride + token - shares.columns[s].begin];
}

__device__ double weight_of(float x, float most, const TokenChoice& choice) {
  const float w = exp_of((x - most) * choice.factor);
  return w < choice.floor ? 0 : w;
}

__global__ void __launch_bounds__(kThreads) choose_tokens_kernel(ChooseArgs args, const __grid_constant__ Shares shares) {
  __shared__ float warp_most[kWarps];
  __shared__ int warp_best[kWarps];
  __shared__ int bad;
  __shared__ double sums[kMaxTiles];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row = args.rows.begin + blockIdx.x, vocab = shares.columns[shares.num - 1].end;
  const TokenChoice choice = args.choices[row];
  if (thread == 0) bad = 0;
  __syncthreads();

  float most = -__uint_as_float(0x7f800000u);
  int best = 0x7fffffff;
  for (int64_t i = thread; i < vocab; i += kThreads) {
    const float x = logit_at(shares, args.stride, row, i);
    if (!(fabsf(x) < __uint_as_float(0x7f800000u)) && !(x < 0)) bad = 1;  // NaN, +infinity (−infinity is a token that is never chosen)
    if (x > most) most = x, best = static_cast<int>(i);
  }
  const auto join = [&](float other, int other_best) {
    if (other > most || (other == most && other_best < best)) most = other, best = other_best;
  };
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) join(__shfl_xor_sync(kAllLanes, most, bits), __shfl_xor_sync(kAllLanes, best, bits));
  if (lane == 0) warp_most[warp] = most, warp_best[warp] = best;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) join(warp_most[w], warp_best[w]);
  if (bad != 0 || best == 0x7fffffff || choice.factor == 0) {
    if (thread == 0) args.tokens[row] = bad != 0 || best == 0x7fffffff ? -1 : best;
    return;
  }

  const int tiles = static_cast<int>((vocab + kTileTokens - 1) / kTileTokens);
  for (int tile = warp; tile < tiles; tile += kWarps) {
    double sum = 0;
    for (int j = 0; j < kTileTokens / 32; ++j) {
      const int64_t i = int64_t{tile} * kTileTokens + j * 32 + lane;
      if (i < vocab) sum += weight_of(logit_at(shares, args.stride, row, i), most, choice);
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[tile] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
  double total = 0;
  for (int t = 0; t < tiles; ++t) total += sums[t];
  const double goal = choice.uniform * total;
  double before = 0;
  int tile = 0;
  while (tile + 1 < tiles && before + sums[tile] <= goal) before += sums[tile++];
  // The first token of the tile at which the weights so far pass the goal; rounding may leave none, then the last with a weight.
  int token = best;
  for (int j = 0; j < kTileTokens / 32; ++j) {
    const int64_t i = int64_t{tile} * kTileTokens + j * 32 + lane;
    const double mine = i < vocab ? weight_of(logit_at(shares, args.stride, row, i), most, choice) : 0;
    const double sum = warp_running_sum(mine);
    const unsigned passing = __ballot_sync(kAllLanes, mine > 0 && before + sum > goal), some = __ballot_sync(kAllLanes, mine > 0);
    const int first = static_cast<int>(int64_t{tile} * kTileTokens + j * 32);
    if (passing != 0) {
      token = first + __ffs(static_cast<int>(passing)) - 1;
      break;
    }
    if (some != 0) token = first + 31 - __clz(static_cast<int>(some));
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) args.tokens[row] = token;
}

}  // namespace

void choose_tokens(const ChooseArgs& args, const Lane& lane) {
  Shares shares{};
  for (int s = 0; s < args.num_shares; ++s) {
    if (args.columns[s].empty()) continue;
    shares.logits[shares.num] = args.shares[s];
    shares.columns[shares.num++] = args.columns[s];
  }
  launch(choose_tokens_kernel, static_cast<unsigned>(args.rows.size()), kThreads, 0, lane.queue, args, shares);
}

}  // namespace moebius::cuda
