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

// Larger first; equal ones by token.
struct ByValue {
  const float* x;
  bool operator()(int32_t a, int32_t b) const { return x[a] != x[b] ? x[a] > x[b] : a < b; }
};

// The k largest of x in order, into `order`: one pass that keeps a heap of k.
void top_tokens(const float* x, int64_t n, int64_t k, std::vector<int32_t>& order) {
  order.clear();
  const ByValue before{x};
  for (int64_t i = 0; i < n; ++i) {
    const auto token = static_cast<int32_t>(i);
    if (static_cast<int64_t>(order.size()) < k) {
      if (x[i] > kNever) order.push_back(token), std::push_heap(order.begin(), order.end(), before);
    } else if (x[i] > x[order.front()]) {  // an equal one has a higher index and stays out
      std::pop_heap(order.begin(), order.end(), before);
      order.back() = token;
      std::push_heap(order.begin(), order.end(), before);
    }
  }
  std::sort_heap(order.begin(), order.end(), before);
}

void fill_logprobs(const float* logits, int64_t vocab, int32_t k, const Ops& ops, SamplerScratch& scratch, SampleResult& out) {
  const int64_t best = ops.arg_max(logits, vocab);
  const float most = logits[best];
  const float log_sum = std::log(ops.exp_sum(logits, vocab, most, 1.0f, nullptr));
  out.logprob = logits[out.token] - most - log_sum;
  if (k == 0) return;
  top_tokens(logits, vocab, k, scratch.order);
  out.num_top = static_cast<int32_t>(scratch.order.size());
  for (int32_t i = 0; i < out.num_top; ++i) out.top[i] = {scratch.order[i], logits[scratch.order[i]] - most - log_sum};
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

// Walks candidates in a fixed order until their cumulative weight passes u·total.
template <class TokenAt>
int32_t pick(int64_t n, double total, double u, const float* weights, TokenAt token_at) {
  const double goal = u * total;
  double sum = 0;
  int32_t last = -1;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t t = token_at(i);
    if (!(weights[t] > 0)) continue;
    last = t;
    sum += weights[t];
    if (sum > goal) return t;
  }
  return last;
}

int32_t pick_random(const float* x, int64_t vocab, int64_t best, const SamplingParams& p, double u, const Ops& ops, SamplerScratch& s) {
  float* w = s.probabilities.data();
  ops.exp_sum(x, vocab, x[best], static_cast<float>(1.0 / p.temperature), w);  // w[best] = 1
  const auto floor = static_cast<float>(p.min_p);
  const bool few = p.top_k > 0 && p.top_k < vocab;
  if (!few && p.top_p >= 1) {  // all tokens, by index
    double total = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      if (w[i] < floor) w[i] = 0;
      total += w[i];
    }
    return pick(vocab, total, u, w, [](int64_t i) { return static_cast<int32_t>(i); });
  }
  if (few) {
    top_tokens(w, vocab, p.top_k, s.order);
    while (!s.order.empty() && (w[s.order.back()] < floor || w[s.order.back()] <= 0)) s.order.pop_back();
  } else {
    s.order.clear();
  }
  double total = 0;
  if (few) {
    for (int32_t t : s.order) total += w[t];
  } else {
    for (int64_t i = 0; i < vocab; ++i)
      if (w[i] >= floor) total += w[i];
  }
  if (p.top_p >= 1) return pick(static_cast<int64_t>(s.order.size()), total, u, w, [&](int64_t i) { return s.order[i]; });

  // top_p: the shortest run of largest weights that reaches top_p of the total. Weights are at most 1, so those below a
  // falling bound are looked at only when the ones above it do not reach.
  const double goal = p.top_p * total;
  const auto cut = [&]() -> bool {
    double sum = 0;
    for (size_t i = 0; i < s.order.size(); ++i)
      if ((sum += w[s.order[i]]) >= goal) {
        s.order.resize(i + 1);
        total = sum;
        return true;
      }
    total = sum;
    return false;
  };
  if (few) {
    cut();
  } else {
    for (float bound = 0x1p-6f;; bound *= 0x1p-6f) {
      const bool final = bound < 1e-30f;
      s.order.clear();
      for (int64_t i = 0; i < vocab; ++i)
        if (w[i] >= floor && w[i] > (final ? 0.0f : bound)) s.order.push_back(static_cast<int32_t>(i));
      double sum = 0;
      for (int32_t t : s.order) sum += w[t];
      if (sum < goal && !final) continue;
      std::sort(s.order.begin(), s.order.end(), ByValue{w});
      if (cut() || final) break;
    }
  }
  return pick(static_cast<int64_t>(s.order.size()), total, u, w, [&](int64_t i) { return s.order[i]; });
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

SampleResult sample(const float* logits, int64_t vocab, const SamplingParams& p, SamplerState& state, const Ops& ops, SamplerScratch& scratch,
                    std::span<const int32_t> eos) {
  SampleResult out;
  // A NaN anywhere makes the sum NaN; +infinity cannot be sampled from either.
  const int64_t raw_best = ops.arg_max(logits, vocab);
  if (raw_best < 0 || !std::isfinite(logits[raw_best]) || std::isnan(ops.exp_sum(logits, vocab, logits[raw_best], 1.0f, nullptr))) {
    out.failed = true;
    return out;
  }
  const float* x = adjust(logits, vocab, p, state, scratch, eos);
  const int64_t best = x == logits ? raw_best : ops.arg_max(x, vocab);
  if (best < 0 || x[best] == kNever) {
    out.failed = out.no_choice = true;
    return out;
  }
  if (p.greedy()) out.token = static_cast<int32_t>(best);
  else
    out.token = pick_random(x, vocab, best, p, philox_uniform(state.seed(), static_cast<uint64_t>(state.num_generated())), ops, scratch);
  if (p.logprobs >= 0) fill_logprobs(logits, vocab, p.logprobs, ops, scratch, out);
  state.add_generated(out.token);
  return out;
}

}  // namespace moebius
