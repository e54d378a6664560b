// A load served in simulated time by the engine's own scheduler, KV pages, switcher, policies and cost curves. What is not the engine's: a
// step takes what StepModel says, a switch what SwitchModel says of the bytes that the switcher asked for, and nobody computes a token.
// A switch moves at once (no stall budget): between two steps of simulated time there is none that a budget could be measured by.
#pragma once

#include <string>
#include <vector>

#include "examples/plan/placement.h"
#include "examples/plan/step_model.h"
#include "examples/rollout/load.h"
#include "lib/runtime/policy.h"

namespace moebius::plan {

struct Moment {  // after a step
  double at_s = 0;
  int running = 0, waiting = 0;
  Layout layout = Layout::kTp;
};

struct SimulatedRun {
  double seconds = 0, hindsight_s = 0, switch_s = 0;
  double first_token_s = 0;  // mean, from asking
  double answer_s = 0;       // mean, from asking to the last token
  double token_gap_s = 0;    // mean, of answers with more than one token
  int64_t tokens = 0, steps = 0, preemptions = 0;
  int switches = 0, refusals = 0, most_running = 0;
  std::vector<Moment> moments;         // a thousand at most
  std::vector<std::string> decisions;  // the policy's own words, a hundred at most
  double tokens_per_second() const { return seconds > 0 ? static_cast<double>(tokens) / seconds : 0; }
};

// Throws kDoesNotFit for a load that no layout holds, a request of which needs more KV than there is.
SimulatedRun simulate(const Placement& placement, const StepModel& steps, const SwitchModel& switches, const moebius_examples::Load& load,
                      const PolicyConfig& policy, Layout start);

}  // namespace moebius::plan
