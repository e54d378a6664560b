// Chooses the next token of a sequence from one row of logits.
//
// Order of operations (vLLM's): allowed_token_ids and logit_bias, the min_tokens mask, penalties, temperature, min_p, top_k,
// top_p, then the inverse of the cumulative distribution at one uniform number. Log-probabilities are of the raw row.
// Works on one thread; scratch is preallocated, so a step allocates nothing.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "lib/device/ops.h"
#include "lib/runtime/event.h"
#include "lib/runtime/sampling_params.h"

namespace moebius {

// Seed of a sample: hash(engine seed, request id, sample), or hash(the request's own seed, sample) with an empty id; never the
// order of arrival.
uint64_t request_seed(uint64_t engine_seed, std::string_view request_id, int sample);

// What a sequence's sampling remembers: how often each token was generated, and which the prompt holds.
class SamplerState {
 public:
  // Reserves for all tokens the sequence may ever have.
  void start(const SamplingParams& params, uint64_t seed, std::span<const int32_t> prompt, int32_t vocab);
  void add_generated(int32_t token);

  struct Seen {
    int32_t token = -1;
    int32_t generated = 0;  // times
  };
  std::span<const Seen> seen() const { return seen_; }  // sorted by token; prompt tokens too
  uint64_t seed() const { return seed_; }
  int32_t num_generated() const { return num_generated_; }

 private:
  uint64_t seed_ = 0;
  int32_t num_generated_ = 0;
  bool keeps_counts_ = false;
  std::vector<Seen> seen_;
};

// How a device chooses the sequence's next token, where nothing is asked for that only sample() does (log-probabilities, top_k, top_p, and
// what changes logits): whether the logits are kept changes nothing. The token must then be told to the state (add_generated).
std::optional<TokenChoice> device_choice(const SamplingParams& params, const SamplerState& state);

struct SamplerScratch {
  explicit SamplerScratch(int64_t vocab) : logits(static_cast<size_t>(vocab)), probabilities(static_cast<size_t>(vocab)) {
    order.reserve(static_cast<size_t>(vocab));
  }
  static int64_t bytes(int64_t vocab) { return vocab * static_cast<int64_t>(2 * sizeof(float) + sizeof(int32_t)); }
  std::vector<float> logits, probabilities;  // [vocab]
  std::vector<int32_t> order;                // candidate tokens
};

struct SampleResult {
  bool failed = false;     // nothing was chosen: the logits are no numbers, or
  bool no_choice = false;  // allowed_token_ids and min_tokens leave no token
  int32_t token = -1;
  float logprob = 0;
  int32_t num_top = 0;
  std::array<TokenLogprob, kMaxTopLogprobs> top{};
};

SampleResult sample(const float* logits, int64_t vocab, const SamplingParams& params, SamplerState& state, const Ops& ops,
                    SamplerScratch& scratch, std::span<const int32_t> eos);

}  // namespace moebius
