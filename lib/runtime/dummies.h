// What calibration serves, here and in moebius-plan: rounds of dummy requests in batches of 1, 2, 4 …
#pragma once

#include <algorithm>
#include <cstdint>

namespace moebius {

// Short prompts for large batches, then longer ones in smaller batches for what attention costs, and again.
struct DummyRound {
  static constexpr int64_t kShortest = 32, kLonger = 8, kLongest = kShortest * kLonger * kLonger;
  static constexpr int64_t kPromptTokens = 32768;  // of a round in all, for its time
  static constexpr int64_t kAnswer = 160;          // room enough for the steps of every batch size
  static constexpr int kStepsOfSize = 8;

  int64_t prompt, total;  // tokens of a dummy; total: with its answer
  int64_t most;           // dummies at once

  static DummyRound of(int64_t prompt, int64_t max_context) {
    const int64_t total = std::min(prompt + kAnswer, max_context);
    prompt = std::max({total - kAnswer, std::min(prompt, total / 2), int64_t{1}});
    return {prompt, total, std::max<int64_t>(1, kPromptTokens / prompt)};
  }
  static int64_t next(int64_t prompt) { return prompt < kLongest ? prompt * kLonger : kShortest; }
};

}  // namespace moebius
