// What runs of one load amount to: latencies, ratios with their intervals, and the best schedule in hindsight.
#pragma once

#include <optional>
#include <vector>

#include "examples/rollout/run.h"

namespace moebius_examples {

// A median, and the interval that holds the true one with 95 % probability or more (order statistics; under six values: all of them).
struct Median {
  double value = 0, low = 0, high = 0;
};
Median median_with_interval(std::vector<double> x);

struct Targets {
  double first_s = 1, gap_s = 0.1;  // to the first token; a token, on average over an answer
};

struct Figures {
  double seconds = 0, tokens_per_second = 0;
  double first_mean_s = 0, first_p50_s = 0, first_p99_s = 0;  // from asking to the first token
  double gap_mean_s = 0, gap_p50_s = 0, gap_p99_s = 0, gap_max_s = 0;
  double goodput = 0;  // answers a second that met both targets
  double switches = 0;
  double switch_s = 0;
};
Figures figures_of(const Run& run, const Targets& targets);

// Seconds that the best schedule takes that may switch after every 64th of the tokens, each stretch costing what it cost the static runs
// and each switch what they were told it would: the median of the rounds. None where a layout has no run.
std::optional<double> hindsight_seconds(const std::vector<const Run*>& tp, const std::vector<const Run*>& ep, moebius_layout start);

}  // namespace moebius_examples
