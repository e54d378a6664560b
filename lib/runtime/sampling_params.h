// How the next token of a request is chosen. Names and defaults are vLLM's.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace moebius {

inline constexpr int kMaxTopLogprobs = 20;

struct SamplingParams {
  int32_t max_tokens = 16;
  int32_t min_tokens = 0;             // end-of-text and stop tokens are not chosen before so many are generated
  double temperature = 1.0;           // below 1e-5: greedy
  double top_p = 1.0;                 // (0, 1]
  int32_t top_k = 0;                  // 0 or −1: off
  double min_p = 0.0;                 // [0, 1], relative to the largest probability
  double presence_penalty = 0.0;      // [−2, 2], over generated tokens
  double frequency_penalty = 0.0;     // [−2, 2], over generated tokens
  double repetition_penalty = 1.0;    // > 0, over prompt and generated tokens
  std::optional<uint64_t> seed;       // unset: hash(engine seed, request id); 0 is a value
  int32_t n = 1;                      // samples of one prompt
  bool ignore_eos = false;
  int32_t logprobs = -1;              // −1: none; k: the chosen token's and the k most likely (≤ kMaxTopLogprobs), of the raw distribution
  std::vector<int32_t> stop_token_ids;
  std::vector<int32_t> allowed_token_ids;                  // empty: all
  std::vector<std::pair<int32_t, float>> logit_bias;       // [−100, 100]

  bool greedy() const { return temperature < 1e-5; }
};

// Throws Error(kInvalidArgument) naming the key, its value and its range. vocab_size bounds the token ids.
void check(const SamplingParams& params, int32_t vocab_size);

}  // namespace moebius
