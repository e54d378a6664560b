#include "lib/runtime/policy.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "lib/base/error.h"
#include "lib/runtime/scheduler.h"

namespace moebius {

LoadSample sample_of(const Scheduler& scheduler) {
  LoadSample load;
  load.running = static_cast<int32_t>(scheduler.running().size());
  load.waiting = static_cast<int32_t>(scheduler.waiting().size());
  load.prefill_tokens = scheduler.tokens_to_prefill();
  return load;
}

void add_remaining(const Scheduler& scheduler, LoadSample& load) {
  for (const Sequence* s : scheduler.running()) {
    const int64_t remaining = s->request->spec.sampling.max_tokens - s->generated();
    load.remaining_tokens += remaining;
    load.longest_remaining = std::max(load.longest_remaining, remaining);
  }
}

namespace {

class ManualPolicy final : public Policy {
 public:
  std::optional<Decision> observe(const LoadSample&) override { return std::nullopt; }
  bool watches() const override { return false; }
  void on_switched(double) override {}
  void on_failed(Layout, std::string_view) override {}
};

struct VariantDefaults {
  const char* name;
  double per_rank;
  int window_steps;
  double cooldown_s;
};
constexpr VariantDefaults kVariants[] = {{"decode", 64, 32, 60}, {"prefill", 1024, 8, 10}, {"rollout", 8, 1, 5}};

// EP when the mean of the window is at or above the threshold, TP when it is below. After a switch nothing is asked for until
// the cooldown has passed.
class ThresholdPolicy final : public Policy {
 public:
  ThresholdPolicy(const PolicyConfig& c, const PolicyLimits& limits) : variant_(c.variant), shadow_(c.shadow) {
    const VariantDefaults& d = kVariants[static_cast<size_t>(c.variant)];
    threshold_ = c.threshold > 0 ? c.threshold : d.per_rank * limits.ranks;
    check_reachable(limits);
    window_.resize(static_cast<size_t>(c.window_steps > 0 ? c.window_steps : d.window_steps));
    cooldown_s_ = c.cooldown_s >= 0 ? c.cooldown_s : d.cooldown_s;
  }

  std::optional<Decision> observe(const LoadSample& load) override {
    const double value = value_of(load);
    sum_ += value - window_[at_];
    window_[at_] = value;
    at_ = (at_ + 1) % window_.size();
    if (filled_ < window_.size()) ++filled_;
    if (filled_ < window_.size() || load.switching) return std::nullopt;
    if (has_switched_ && load.time_s - last_switch_s_ < cooldown_s_) return std::nullopt;
    const double mean = sum_ / static_cast<double>(window_.size());
    const Layout wanted = mean >= threshold_ ? Layout::kEp : Layout::kTp;
    if (wanted == load.layout) {
      shadowed_ = false;
      return std::nullopt;
    }
    if (shadow_ && shadowed_) return std::nullopt;  // one record for each time the mind would change
    if (held(wanted, mean, load.step)) return std::nullopt;
    shadowed_ = shadow_;
    asked_mean_ = mean;
    asked_step_ = load.step;
    const Reason again = std::exchange(failure_, {});
    return Decision{wanted, shadow_,
                    Reason::of("threshold {}: mean {:.1f} over {} steps {} {:.1f}: {} → {} (running {}, waiting {}, to prefill {}){}",
                                kVariants[static_cast<size_t>(variant_)].name, mean, window_.size(), mean >= threshold_ ? "≥" : "<",
                                threshold_, name_of(load.layout), name_of(wanted), load.running, load.waiting, load.prefill_tokens,
                                again.view())};
  }

  bool watches() const override { return true; }
  void on_switched(double time_s) override {
    has_switched_ = true;
    last_switch_s_ = time_s;
    failure_.clear();
  }
  void on_failed(Layout to, std::string_view why) override {
    failed_to_ = to;
    failure_ = Reason::of("; again after step {} at mean {:.1f}, which failed: {}", asked_step_, asked_mean_, why);
  }

 private:
  // A queue of prompts has no such bound that would be worth naming.
  void check_reachable(const PolicyLimits& limits) const {
    const double most = limits.max_batch + (variant_ == ThresholdVariant::kRollout ? static_cast<double>(limits.max_queue) : 0.0);
    if (variant_ == ThresholdVariant::kPrefill || threshold_ <= most) return;
    if (variant_ == ThresholdVariant::kDecode)
      fail(Code::kInvalidArgument, "policy threshold of {} running requests can never be reached, max_batch is {}: raise it or set policy_threshold", threshold_,
           limits.max_batch);
    fail(Code::kInvalidArgument, "policy threshold of {} requests can never be reached, max_batch is {} and max_queue {}: raise them or set policy_threshold", threshold_,
         limits.max_batch, limits.max_queue);
  }
  bool held(Layout wanted, double mean, uint64_t step) const {
    return !failure_.empty() && wanted == failed_to_ && std::fabs(mean - asked_mean_) < kHoldMargin * threshold_ &&
           step < asked_step_ + kHoldSteps;
  }
  double value_of(const LoadSample& load) const {
    switch (variant_) {
      case ThresholdVariant::kDecode: return load.running;
      case ThresholdVariant::kPrefill: return static_cast<double>(load.prefill_tokens);
      default: return load.running + load.waiting;
    }
  }

  ThresholdVariant variant_;
  bool shadow_, shadowed_ = false, has_switched_ = false;
  double threshold_ = 0, cooldown_s_ = 0, last_switch_s_ = 0, sum_ = 0;
  std::vector<double> window_;
  size_t at_ = 0, filled_ = 0;
  // Of the last switch asked for; failure_ is empty unless it failed.
  double asked_mean_ = 0;
  uint64_t asked_step_ = 0;
  Layout failed_to_ = Layout::kTp;
  Reason failure_;
};

}  // namespace

std::unique_ptr<Policy> make_policy(const PolicyConfig& config, const PolicyLimits& limits, const CostModel* costs) {
  constexpr int kMaxWindow = 1 << 20;
  if (!(config.threshold >= 0)) fail(Code::kInvalidArgument, "policy threshold is {}, must be at least 0", config.threshold);
  if (config.window_steps < 0 || config.window_steps > kMaxWindow)
    fail(Code::kInvalidArgument, "policy window is {} steps, must be from 0 to {}", config.window_steps, kMaxWindow);
  if (std::isnan(config.cooldown_s)) fail(Code::kInvalidArgument, "policy cooldown is {} s, must be a number", config.cooldown_s);
  if (!(config.explore >= 0 && config.explore <= 0.5)) fail(Code::kInvalidArgument, "policy_explore is {}, must be from 0 to 0.5", config.explore);
  static const CostModel kNothingLearned;
  switch (config.kind) {
    case PolicyKind::kManual: return std::make_unique<ManualPolicy>();
    case PolicyKind::kThreshold:
      if (config.variant < ThresholdVariant::kDecode || config.variant > ThresholdVariant::kRollout)
        fail(Code::kInvalidArgument, "threshold variant {} is not known", static_cast<int>(config.variant));
      return std::make_unique<ThresholdPolicy>(config, limits);
    case PolicyKind::kMeasured: return make_measured_policy(config, limits, costs != nullptr ? *costs : kNothingLearned);
  }
  fail(Code::kInvalidArgument, "policy kind {} is not known", static_cast<int>(config.kind));
}

}  // namespace moebius
