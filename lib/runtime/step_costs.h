// What steps and switches cost, learned from those that the engine runs: a curve for each layout, a price for each direction.
// Allocates nothing; the stepping thread owns it.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <span>

#include "lib/runtime/regret.h"

namespace moebius {

// What a step holds, of all requests or of one home's.
struct StepLoad {
  double rows = 0, prompt_rows = 0;  // the second: those of sequences that have several, so a prompt's
  double kv_tokens = 0;              // whose KV is read, once for all rows of a sequence
  double attended = 0;               // pairs of a row and a token that it attends to; of decode rows as many as kv_tokens
  static StepLoad decode(double rows, double kv_tokens) { return {rows, 0, kv_tokens, kv_tokens}; }
  // Rows of one sequence, after so many tokens.
  static StepLoad of(double computed, double rows) { return {rows, rows > 1 ? rows : 0, computed + rows, rows * (computed + (rows + 1) / 2)}; }
  StepLoad& operator+=(const StepLoad& o);
};

// The same step as each layout's curve sees it. A rank computes attention for all requests in TP and for its own in EP, where the step waits for
// the home that has most; experts get all rows in both.
struct StepLoads {
  StepLoad tp, ep;
  const StepLoad& in(Layout layout) const { return layout == Layout::kTp ? tp : ep; }
  static StepLoads of(std::span<const StepLoad> homes);
  static StepLoads decode(double rows, double kv_tokens, int homes);  // dealt to homes one by one, each as long as the other
};

struct Estimate {
  double seconds = 0;
  double relative = std::numeric_limits<double>::infinity();  // standard error over seconds; infinite: never seen
  bool seen() const { return relative < std::numeric_limits<double>::infinity(); }
  bool known() const { return relative <= 0.25; }  // else it is no base for comparing
};

// Seconds of a step: piecewise linear in rows with knots at powers of two (some ten rows reach most experts, whoever they belong to), and
// linear in the rest: what a prompt's rows cost beyond (in EP they stand on one home), KV read, pairs. Every coefficient is at least 0, since more
// work is never faster. A Kalman filter in which a step that was disturbed counts little, and whose process noise scales the whole curve (a
// machine that got slower is slower everywhere) and reopens what was not seen for long.
class StepCurve {
 public:
  static constexpr int kKnots = 14;              // rows 0, 1, 2, 4 … 4096; the last segment goes on
  static constexpr int kTerms = kKnots + 3;      // at 0 rows, what each segment adds, prompts' rows, KV tokens, pairs
  static constexpr int kState = kTerms + kTerms * kTerms + 2;

  void learn(const StepLoad& load, double seconds, double now_s);
  Estimate predict(const StepLoad& load, double now_s) const;

  // All that was learned as numbers; restoring takes them as of now_s and as a machine that may have changed since. False: not such numbers.
  std::array<double, kState> state() const;
  bool restore(const std::array<double, kState>& state, double now_s);
  bool seen() const { return unit_ > 0; }

 private:
  using Terms = std::array<double, kTerms>;
  static Terms terms_of(const StepLoad& load);
  void start(const StepLoad& load, double seconds);
  double variance(const Terms& x) const;
  void scale_is_open(double relative);
  void raise_to_least();

  double unit_ = 0;           // seconds of the first step; 0: none yet
  double noise_ = 0;          // relative variance of a step
  double last_s_ = 0;         // when it last learned
  double bias_ = 0;           // running mean of innovations, in standard deviations
  Terms mean_{}, prior_{};    // prior_: variances before anything was seen
  std::array<Terms, kTerms> covariance_{};
};

class CostModel {
 public:
  void on_step(Layout layout, const StepLoads& loads, double seconds, double now_s) { curve(layout).learn(loads.in(layout), seconds, now_s); }
  // A step while a switch to `to` is under way: what it took beyond a step there is part of the switch's price.
  void on_step_under_way(Layout to, const StepLoads& loads, double seconds, double now_s);
  void on_switch_started() { delay_s_ = 0; }
  // It has arrived: bytes written, and the time that it took from steps.
  void on_switch(Layout to, int64_t bytes, double seconds);

  Estimate step(Layout layout, const StepLoads& loads, double now_s) const { return curve(layout).predict(loads.in(layout), now_s); }
  double price(Layout to, int64_t bytes) const;

  StepCurve& curve(Layout layout) { return curves_[static_cast<size_t>(layout)]; }
  const StepCurve& curve(Layout layout) const { return curves_[static_cast<size_t>(layout)]; }
  Costs corrections() const { return correction_; }  // [to] 0: no switch seen
  void restore_corrections(const Costs& corrections) { correction_ = corrections; }

 private:
  StepCurve curves_[2];
  Costs correction_{};  // [to] a switch's price over what its bytes would take at the nominal rate
  double delay_s_ = 0;
};

}  // namespace moebius
