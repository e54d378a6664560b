// Serves one load under one choice of layout and keeps what happened, step by step.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "examples/rollout/load.h"
#include "moebius/moebius.hpp"

namespace moebius_examples {

// Who decides on the layout: one of the two for good, or a policy.
struct Choice {
  std::string name;
  moebius_layout start = MOEBIUS_LAYOUT_TP;
  moebius_cpp::Config policy;
  bool fixed = true;
  bool goes_on = false;  // the engine is as its last run left it, and the policy with it
};

struct StepSample {  // after a step; times in seconds from the beginning
  double at_s = 0;
  int32_t running = 0, waiting = 0, seam = 0;
  int64_t tokens = 0;  // generated until then
  double gap_s = 0;    // the longest that a request had waited for its next token, of those that got one
};

struct Answer {
  double asked_s = 0, first_s = 0, last_s = 0;  // 0: not yet
  int64_t tokens = 0;
};

struct Moment {  // a switch's end, or what a policy said
  double at_s = 0;
  moebius_layout to = MOEBIUS_LAYOUT_TP;
  bool moved = false, refused = false, rolled_back = false;
  double seconds = 0;
  std::string text;
};

struct Run {
  std::string choice;
  double seconds = 0;  // to the last token
  int64_t tokens = 0;
  int num_layers = 0;
  moebius_layout end = MOEBIUS_LAYOUT_TP;  // in which it ended
  std::vector<StepSample> steps;
  std::vector<Answer> answers;
  std::vector<double> gaps;  // between a request's tokens
  std::vector<Moment> moments;
  std::vector<std::pair<int64_t, double>> prices;  // tokens until then, seconds that a switch to the other layout would have taken
};

// How often the price of a switch is asked for in a run.
inline constexpr int kPrices = 64;

// `salt` makes prompts of their own: what an earlier run left in the prefix cache is of no use.
Run serve(moebius_cpp::Engine& engine, const Load& load, const Choice& choice, int32_t salt);

}  // namespace moebius_examples
