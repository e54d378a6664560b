// When to switch. A policy sees one sample of the load per step and may ask for the other layout; it explains itself in one
// line of numbers. Not thread-safe: the stepping thread owns it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "lib/layout/types.h"
#include "lib/runtime/event.h"
#include "lib/runtime/regret.h"
#include "lib/runtime/step_costs.h"

namespace moebius {

enum class PolicyKind : int32_t { kManual = 0, kThreshold = 1, kMeasured = 2 };

// The paper's three thresholds: what is counted, the limit for P ranks, over how many steps, and the pause after a switch.
enum class ThresholdVariant : int32_t {
  kDecode = 0,   // running requests: 64·P, 32 steps, 60 s
  kPrefill = 1,  // tokens to prefill, of running and waiting requests: 1024·P, 8 steps, 10 s
  kRollout = 2,  // running + waiting: 8·P, 1 step, 5 s
};

struct PolicyConfig {
  PolicyKind kind = PolicyKind::kMeasured;
  ThresholdVariant variant = ThresholdVariant::kDecode;
  double threshold = 0;     // 0: the variant's, for P ranks
  int32_t window_steps = 0; // 0: the variant's
  double cooldown_s = -1;   // negative: the variant's
  bool shadow = false;      // decide and record, but do not switch
  double explore = 0.01;    // measured: share of the time that may be spent elsewhere than the rule says; 0: never
};

struct LoadSample {
  uint64_t step = 0;
  double time_s = 0;        // a monotonic clock's
  int32_t running = 0, waiting = 0;
  int64_t prefill_tokens = 0;  // to be computed before their requests' next tokens
  Layout layout = Layout::kTp;
  bool switching = false;
  bool inside = false;      // the seam is held there by the host
  StepLoads last;           // what the last step held
  double last_seconds = 0;  // what it took; 0: none has run since the last sample, or in both layouts
  Costs price{};            // predicted, of a switch to each from the other, with the requests that there are
  int64_t remaining_tokens = 0, longest_remaining = 0;  // of running requests, by their max_tokens: in all, and of one
};

class Scheduler;
// Counts of what runs and waits; the rest is the caller's.
LoadSample sample_of(const Scheduler& scheduler);
// Adds how long running requests may stay.
void add_remaining(const Scheduler& scheduler, LoadSample& load);

struct Decision {
  Layout to = Layout::kTp;
  bool shadow = false;
  Reason record;
  bool may_preempt = true;  // not what is done to learn, or ahead of time: what it costs others is in no price
};

// What the last decision, or not deciding, rested on.
struct PolicyFigures {
  Estimate step[2];  // [Layout] of the last step
  double regret_s = 0, price_s = 0, budget_s = 0;
};

class Policy {
 public:
  virtual ~Policy() = default;
  virtual std::optional<Decision> observe(const LoadSample& load) = 0;
  // Whether an idle engine must go on giving samples, lest the load that was stand for the load that is.
  virtual bool watches() const = 0;
  virtual void on_switched(double time_s) = 0;
  // A switch to `to` that it asked for was refused or rolled back: no cooldown is spent, but the same is not asked for again at
  // once.
  virtual void on_failed(Layout to, std::string_view why) = 0;
  // Null: it rests on no costs.
  virtual const PolicyFigures* figures() const { return nullptr; }
};

// A switch that failed is asked for again when the load has moved by a quarter (of the threshold, of what it was), for then it may fit or be
// wanted no more, or after so many steps: often enough to catch room that others left, too rarely to cost anything.
inline constexpr double kHoldMargin = 0.25;
inline constexpr uint64_t kHoldSteps = 256;

// What bounds the load that a policy can see.
struct PolicyLimits {
  int ranks = 1;
  int max_batch = 64, max_queue = 65536;
};

// Throws kInvalidArgument on values out of range, and on a threshold that no load can reach. The costs are read by `observe` alone, and
// outlive the policy; null: for checking only.
std::unique_ptr<Policy> make_policy(const PolicyConfig& config, const PolicyLimits& limits, const CostModel* costs = nullptr);
std::unique_ptr<Policy> make_measured_policy(const PolicyConfig& config, const PolicyLimits& limits, const CostModel& costs);

}  // namespace moebius
