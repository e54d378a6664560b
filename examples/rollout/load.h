// What is asked of the engine and when: a rollout's burst, so many requests at a time, or requests that arrive over time. Seeded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moebius_examples {

// A log-normal length in tokens, from 1 to `most`: heavy-tailed, as answers are. sigma 0: always the median.
struct Length {
  int64_t median = 64, most = 512;
  double sigma = 1;
};

enum class Arrivals {
  kOnce,    // all at the beginning
  kRandom,  // gaps are gamma distributed with a coefficient of variation: 1 is a Poisson process, more are bursts and lulls
  kSteps,   // Poisson, at a high and a low rate in turn
};

struct LoadOptions {
  Arrivals arrivals = Arrivals::kOnce;
  int64_t prompts = 16, samples = 4;  // each prompt is asked so many times
  Length prompt{64, 512, 0}, answer;
  double rate = 10, low_rate = 1, variation = 1, period_s = 5;  // requests a second, over all samples
  uint64_t seed = 1;
};

// One sample of one prompt. The engine is not told how long it will be: it is cancelled when it has `tokens`.
struct Asked {
  double at_s = 0;
  int64_t prompt = 0, tokens = 0;
};

struct Load {
  std::vector<std::vector<int32_t>> prompts;
  std::vector<Asked> asked;  // in order of time
  int64_t most_tokens = 0;   // of an answer: the limit that the engine is told
};

Load make_load(const LoadOptions& options, int32_t vocab_size);

}  // namespace moebius_examples
