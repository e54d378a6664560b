#include "lib/runtime/sampling_params.h"

#include <cmath>

#include "lib/base/error.h"

namespace moebius {
namespace {

void in_range(const char* key, double value, double least, double most, const char* range) {
  if (!(value >= least && value <= most)) fail(Code::kInvalidArgument, "{} is {}, must be in {}", key, value, range);
}

void known_token(const char* key, int32_t token, int32_t vocab) {
  if (token < 0 || token >= vocab) fail(Code::kInvalidArgument, "{} holds token {}, the vocabulary has {}", key, token, vocab);
}

}  // namespace

void check(const SamplingParams& p, int32_t vocab) {
  constexpr double kAny = 1e30;
  in_range("max_tokens", p.max_tokens, 1, 1 << 30, "[1, 2^30]");
  in_range("min_tokens", p.min_tokens, 0, p.max_tokens, "[0, max_tokens]");
  in_range("temperature", p.temperature, 0, kAny, "[0, ∞)");
  if (!(p.top_p > 0 && p.top_p <= 1)) fail(Code::kInvalidArgument, "top_p is {}, must be in (0, 1]", p.top_p);
  in_range("top_k", p.top_k, -1, 1 << 30, "[−1, 2^30]");
  in_range("min_p", p.min_p, 0, 1, "[0, 1]");
  in_range("presence_penalty", p.presence_penalty, -2, 2, "[−2, 2]");
  in_range("frequency_penalty", p.frequency_penalty, -2, 2, "[−2, 2]");
  in_range("repetition_penalty", p.repetition_penalty, 1 / kAny, kAny, "[10^−30, 10^30]");
  in_range("n", p.n, 1, 1024, "[1, 1024]");
  in_range("logprobs", p.logprobs, -1, kMaxTopLogprobs, "[0, 20]");
  for (int32_t t : p.stop_token_ids) known_token("stop_token_ids", t, vocab);
  for (int32_t t : p.allowed_token_ids) known_token("allowed_token_ids", t, vocab);
  for (const auto& [t, bias] : p.logit_bias) {
    known_token("logit_bias", t, vocab);
    in_range("logit_bias", bias, -100, 100, "[−100, 100]");
  }
}

}  // namespace moebius
