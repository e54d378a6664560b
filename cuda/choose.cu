// Floor: the row's logits once for the largest and once more for the sums, from the second-level cache where they were just written.
//
// A block a row. The vocabulary is taken in tiles of 1,024 tokens at fixed places, so sums do not depend on how it is shared among ranks.
// top_k and top_p need no sorting: a cut in the order by falling value is found digit by digit of the values' bits, by sums of weights (as
// integers, so in any order the same) or numbers of tokens; each cut reads the row four times.
#include "cuda/choose.h"

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/ptx.h"
#include "lib/layout/owners.h"

namespace moebius::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kAtOnce = 8;  // logits that a thread has on their way
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

// The bits of a value as an unsigned number in the same order.
__device__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // one zero
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ float value_of(unsigned key) { return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key); }

using Fixed = unsigned long long;
constexpr double kWeightScale = 0x1p40;  // 2^21 weights of at most 1 stay below 2^62

// Where a running sum over the tokens by falling value reaches a goal: at some token of this value, after `before`.
struct Cut {
  unsigned key;
  Fixed before;
};

// By the whole block. amount_of(token, key): what a token adds. Where all together do not reach the goal: the last that adds anything.
template <class Amount, class Reached>
__device__ Cut block_cut(int64_t vocab, const Amount& amount_of, const Reached& reached) {
  constexpr int kBins = 256;
  __shared__ Fixed bins[kBins];
  __shared__ Cut shared;
  Cut cut{0, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) bins[b] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
      unsigned key;
      const Fixed amount = amount_of(i, key);
      if (amount > 0 && (shift == 24 || key >> (shift + 8) == cut.key >> (shift + 8))) atomicAdd(&bins[key >> shift & (kBins - 1)], amount);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Fixed sum = cut.before;
      for (int b = kBins - 1; b >= 0; --b) {
        if (bins[b] == 0) continue;
        shared = {cut.key | static_cast<unsigned>(b) << shift, sum};
        sum += bins[b];
        if (reached(sum)) break;
      }
    }
    __syncthreads();
    cut = shared;
  }
  return cut;
}

__device__ Fixed block_sum(Fixed mine) {
  __shared__ Fixed sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (mine > 0) atomicAdd(&sum, mine);
  __syncthreads();
  const Fixed all = sum;
  __syncthreads();
  return all;
}

// The value of the token to choose, and how many tokens of the same value come before it.
struct Among {
  unsigned key;
  Fixed ties;
};
template <class Logit>
__device__ Among block_choose_among_largest(int64_t vocab, const Logit& logit, float most, const TokenChoice& choice) {
  const auto weight = [&](float x) { return static_cast<Fixed>(weight_of(x, most, choice) * kWeightScale); };
  const auto weight_at = [&](int64_t i, unsigned& key) {
    const float x = logit(i);
    key = key_of(x);
    return weight(x);
  };
  Fixed total = 0, mine = 0;
  if (choice.top_k > 0 && choice.top_k < vocab) {
    const auto k = static_cast<Fixed>(choice.top_k);
    const Cut cut = block_cut(vocab, [&](int64_t i, unsigned& key) { return key = key_of(logit(i)), Fixed{1}; }, [&](Fixed n) { return n >= k; });
    for (int64_t i = threadIdx.x; i < vocab; i += kThreads)
      if (const float x = logit(i); key_of(x) > cut.key) mine += weight(x);
    total = block_sum(mine) + (k - cut.before) * weight(value_of(cut.key));
  } else {
    for (int64_t i = threadIdx.x; i < vocab; i += kThreads) mine += weight(logit(i));
    total = block_sum(mine);
  }
  if (choice.top_p < 1) {
    const auto goal = static_cast<Fixed>(static_cast<double>(total) * choice.top_p);
    const Cut cut = block_cut(vocab, weight_at, [&](Fixed sum) { return sum >= goal; });
    const Fixed one = weight(value_of(cut.key));
    const Fixed needed = goal > cut.before ? goal - cut.before : 1;
    total = min(total, cut.before + (needed + one - 1) / one * one);
  }
  const auto goal = static_cast<Fixed>(static_cast<double>(total) * choice.uniform);
  const Cut cut = block_cut(vocab, weight_at, [&](Fixed sum) { return sum > goal; });
  return {cut.key, goal > cut.before ? (goal - cut.before) / weight(value_of(cut.key)) : 0};
}

__global__ void __launch_bounds__(kThreads, 1) choose_tokens_kernel(ChooseArgs args, const __grid_constant__ Shares shares) {
  follow_previous();
  __shared__ float warp_most[kWarps];
  __shared__ int warp_best[kWarps];
  __shared__ int bad;
  __shared__ double sums[kMaxTiles];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row = args.rows.begin + blockIdx.x, vocab = shares.columns[shares.num - 1].end;
  if (thread == 0) bad = 0;
  __syncthreads();

  float most = -__uint_as_float(0x7f800000u);
  int best = 0x7fffffff;
  for (int64_t first = thread; first < vocab; first += kAtOnce * kThreads) {
    float logits[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = first + j * kThreads;
      logits[j] = i < vocab ? logit_at(shares, args.stride, row, i) : -__uint_as_float(0x7f800000u);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float x = logits[j];
      if (!(fabsf(x) < __uint_as_float(0x7f800000u)) && !(x < 0)) bad = 1;  // NaN, +infinity (−infinity is a token that is never chosen)
      if (x > most) most = x, best = static_cast<int>(first + j * kThreads);
    }
  }
  const TokenChoice choice = args.choices[row];  // not before: it would take registers from the logits
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

  // Otherwise the token is looked for in order: where the weights so far pass the goal; or the one after so many of the same value.
  const bool among = (choice.top_k > 0 && choice.top_k < vocab) || choice.top_p < 1;
  Among largest{};
  if (among) largest = block_choose_among_largest(vocab, [&](int64_t i) { return logit_at(shares, args.stride, row, i); }, most, choice);
  const auto weight_at = [&](int64_t i) -> double {
    const float x = logit_at(shares, args.stride, row, i);
    return among ? static_cast<double>(key_of(x) == largest.key) : weight_of(x, most, choice);
  };

  const int tiles = static_cast<int>((vocab + kTileTokens - 1) / kTileTokens);
  for (int tile = warp; tile < tiles; tile += kWarps) {
    double sum = 0;
    for (int j = 0; j < kTileTokens / 32; ++j) {
      const int64_t i = int64_t{tile} * kTileTokens + j * 32 + lane;
      if (i < vocab) sum += weight_at(i);
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[tile] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
  double total = 0;
  for (int t = 0; t < tiles; ++t) total += sums[t];
  const double goal = among ? static_cast<double>(largest.ties) : choice.uniform * total;
  double before = 0;
  int tile = 0;
  while (tile + 1 < tiles && before + sums[tile] <= goal) before += sums[tile++];
  // The first token of the tile at which the weights so far pass the goal; rounding may leave none, then the last with a weight.
  int token = best;
  for (int j = 0; j < kTileTokens / 32; ++j) {
    const int64_t i = int64_t{tile} * kTileTokens + j * 32 + lane;
    const double mine = i < vocab ? weight_at(i) : 0;
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
