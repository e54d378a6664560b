#include "lib/runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "lib/runtime/philox.h"

namespace moebius {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

bool penalises(const SamplingParams& p) {
  return p.presence_penalty != 0 || p.frequency_penalty != 0 || p.repetition_penalty != 1;
}

// Passes over a whole vocabulary look at this many values at a time, in loops that compilers turn into vector code.
constexpr int64_t kBlock = 64;

// Larger first; equal ones by token.
struct ByValue {
  const float* x;
  bool operator()(int32_t a, int32_t b) const { return x[a] != x[b] ? x[a] > x[b] : a < b; }
};

bool any_above(const float* x, int64_t n, float bound) {
  int any = 0;
  for (int64_t i = 0; i < n; ++i) any |= x[i] > bound;
  return any != 0;
}

// found(token) for each x above bound() in order; the bound may rise on the way.
template <class Bound, class Found>
void for_each_above(const float* x, int64_t n, const Bound& bound, const Found& found) {
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    if (!any_above(x + begin, end - begin, bound())) continue;
    for (int64_t i = begin; i < end; ++i)
      if (x[i] > bound()) found(static_cast<int32_t>(i));
  }
}

// The k largest of x in order, into `order`: one pass that keeps a heap of k. An equal one with a higher index stays out.
void top_tokens(const float* x, int64_t n, int64_t k, std::vector<int32_t>& order) {
  order.clear();
  if (k == 0) return;
  const ByValue before{x};
  float least = kNever;
  for_each_above(x, n, [&] { return least; }, [&](int32_t token) {
    if (static_cast<int64_t>(order.size()) == k) {
      std::pop_heap(order.begin(), order.end(), before);
      order.pop_back();
    }
    order.push_back(token);
    std::push_heap(order.begin(), order.end(), before);
    if (static_cast<int64_t>(order.size()) == k) least = x[order.front()];
  });
  std::sort_heap(order.begin(), order.end(), before);
}

// allowed, bias, min_tokens and penalties applied to a copy; the row itself when none of them is asked for.
const float* adjust(const float* logits, int64_t vocab, const SamplingParams& p, const SamplerState& state, SamplerScratch& scratch,
                    std::span<const int32_t> eos) {
  const bool too_few = state.num_generated() < p.min_tokens;
  if (p.allowed_token_ids.empty() && p.logit_bias.empty() && !too_few && !penalises(p)) return logits;
  float* x = scratch.logits.data();
  if (p.allowed_token_ids.empty()) {
    std::memcpy(x, logits, static_cast<size_t>(vocab) * sizeof(float));
  } else {
    std::fill_n(x, vocab, kNever);
    for (int32_t t : p.allowed_token_ids) x[t] = logits[t];
  }
  for (const auto& [t, bias] : p.logit_bias) x[t] += bias;
  if (too_few) {
    for (int32_t t : eos) x[t] = kNever;
    for (int32_t t : p.stop_token_ids) x[t] = kNever;
  }
  if (penalises(p))
    for (const SamplerState::Seen& s : state.seen()) {
      float& v = x[s.token];
      const auto repetition = static_cast<float>(p.repetition_penalty);
      v = v > 0 ? v / repetition : v * repetition;
      if (s.generated > 0) v -= static_cast<float>(p.frequency_penalty) * static_cast<float>(s.generated) + static_cast<float>(p.presence_penalty);
    }
  return x;
}

double sum_of_block(const float* w, int64_t n) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(w[i + j]);
  for (; i < n; ++i) lanes[0] += static_cast<double>(w[i]);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

double sum_of(const float* w, int64_t n) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) sum += sum_of_block(w + begin, std::min(kBlock, n - begin));
  return sum;
}

// The first index at which the weights so far, added as sum_of does, pass u·sum_of(w, n).
int64_t pick(const float* w, int64_t n, double u) {
  const double goal = u * sum_of(w, n);
  double sum = 0;
  int64_t last = 0;  // where rounding leaves none that passes: the last with a weight
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    const double next = sum + sum_of_block(w + begin, end - begin);
    if (next > goal || end == n) {
      for (int64_t i = begin; i < end; ++i) {
        if (!(w[i] > 0)) continue;
        last = i;
        if ((sum += static_cast<double>(w[i])) > goal) break;
      }
      if (next > goal) return last;
    }
    sum = next;
  }
  return last;
}

// How many of the weights, largest first, reach the goal; all of them when none does.
int64_t count_reaching(const float* w, int64_t n, double goal) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i)
    if ((sum += static_cast<double>(w[i])) >= goal) return i + 1;
  return n;
}

int32_t pick_random(const float* x, int64_t vocab, int64_t best, const SamplingParams& p, double u, const Ops& ops, SamplerScratch& s) {
  float* w = s.probabilities.data();  // relative to the likeliest: w[best] = 1
  const float most = x[best], factor = static_cast<float>(1.0 / p.temperature), floor = static_cast<float>(p.min_p);
  if (p.top_k > 0 && p.top_k < vocab) {
    top_tokens(x, vocab, p.top_k, s.order);
    auto n = static_cast<int64_t>(s.order.size());
    for (int64_t i = 0; i < n; ++i) w[i] = x[s.order[i]];
    ops.exp_sum(w, n, most, factor, w);
    while (n > 1 && (w[n - 1] < floor || w[n - 1] <= 0)) --n;
    if (p.top_p < 1) n = count_reaching(w, n, p.top_p * sum_of(w, n));
    return s.order[pick(w, n, u)];
  }
  ops.exp_sum(x, vocab, most, factor, w);
  for (int64_t i = 0; floor > 0 && i < vocab; ++i) w[i] = w[i] < floor ? 0 : w[i];
  if (p.top_p >= 1) return static_cast<int32_t>(pick(w, vocab, u));

  // top_p: the shortest run of largest weights that reaches top_p of the total. Those below a falling bound are looked at only
  // when the ones above it do not reach.
  const double goal = p.top_p * sum_of(w, vocab);
  for (float bound = 0x1p-6f;; bound *= 0x1p-6f) {
    const bool final = bound < 1e-30f;
    s.order.clear();
    double sum = 0;
    for_each_above(w, vocab, [&] { return final ? 0.0f : bound; }, [&](int32_t t) {
      s.order.push_back(t);
      sum += static_cast<double>(w[t]);
    });
    if (sum >= goal || final) break;
  }
  std::sort(s.order.begin(), s.order.end(), ByValue{w});
  float* ordered = s.logits.data();  // the adjusted logits are not needed any more
  for (size_t i = 0; i < s.order.size(); ++i) ordered[i] = w[s.order[i]];
  return s.order[pick(ordered, count_reaching(ordered, static_cast<int64_t>(s.order.size()), goal), u)];
}

}  // namespace

uint64_t request_seed(uint64_t engine_seed, std::string_view request_id, int sample) {
  return XXH3_64bits_withSeed(request_id.data(), request_id.size(), engine_seed + static_cast<uint64_t>(sample) * 0x9e3779b97f4a7c15ull);
}

void SamplerState::start(const SamplingParams& params, uint64_t seed, std::span<const int32_t> prompt, int32_t vocab) {
  seed_ = seed;
  num_generated_ = 0;
  keeps_counts_ = penalises(params);
  seen_.clear();
  if (!keeps_counts_) return;
  seen_.reserve(std::min<size_t>(static_cast<size_t>(vocab), prompt.size() + static_cast<size_t>(params.max_tokens)));
  std::vector<int32_t> unique(prompt.begin(), prompt.end());
  std::sort(unique.begin(), unique.end());
  unique.erase(std::unique(unique.begin(), unique.end()), unique.end());
  for (int32_t t : unique) seen_.push_back({t, 0});
}

void SamplerState::add_generated(int32_t token) {
  ++num_generated_;
  if (!keeps_counts_) return;
  const auto it = std::lower_bound(seen_.begin(), seen_.end(), token, [](const Seen& s, int32_t t) { return s.token < t; });
  if (it != seen_.end() && it->token == token) ++it->generated;
  else seen_.insert(it, {token, 1});
}

std::optional<TokenChoice> device_choice(const SamplingParams& p, const SamplerState& state) {
  const bool adjusted = !p.allowed_token_ids.empty() || !p.logit_bias.empty() || state.num_generated() < p.min_tokens || penalises(p);
  if (adjusted || p.logprobs >= 0) return std::nullopt;
  if (p.greedy()) return TokenChoice{};
  return TokenChoice{static_cast<float>(1.0 / p.temperature), static_cast<float>(p.min_p),
                     philox_uniform(state.seed(), static_cast<uint64_t>(state.num_generated())), p.top_k, static_cast<float>(p.top_p)};
}

SampleResult sample(const float* logits, int64_t vocab, const SamplingParams& p, SamplerState& state, const Ops& ops, SamplerScratch& scratch,
                    std::span<const int32_t> eos) {
  SampleResult out;
  const int64_t raw_best = ops.arg_max(logits, vocab);
  const float most = raw_best < 0 ? kNever : logits[raw_best];
  const float sum = ops.exp_sum(logits, vocab, most, 1.0f, nullptr);
  if (!std::isfinite(most) || std::isnan(sum)) {  // a NaN anywhere makes the sum NaN; +infinity cannot be sampled from either
    out.failed = true;
    return out;
  }
  const float* x = adjust(logits, vocab, p, state, scratch, eos);
  const int64_t best = x == logits ? raw_best : ops.arg_max(x, vocab);
  if (best < 0 || x[best] == kNever) {
    out.failed = out.no_choice = true;
    return out;
  }
  if (!std::isfinite(x[best])) {  // a penalty or bias beyond what a float holds
    out.failed = true;
    return out;
  }
  if (p.greedy()) out.token = static_cast<int32_t>(best);
  else
    out.token = pick_random(x, vocab, best, p, philox_uniform(state.seed(), static_cast<uint64_t>(state.num_generated())), ops, scratch);
  if (p.logprobs >= 0) {
    const float log_sum = std::log(sum);
    out.logprob = logits[out.token] - most - log_sum;
    top_tokens(logits, vocab, p.logprobs, scratch.order);
    out.num_top = static_cast<int32_t>(scratch.order.size());
    for (int32_t i = 0; i < out.num_top; ++i) out.top[i] = {scratch.order[i], logits[scratch.order[i]] - most - log_sum};
  }
  state.add_generated(out.token);
  return out;
}

}  // namespace moebius
