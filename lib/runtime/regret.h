// When to move between two layouts whose costs are given: a rule that stays within a constant of the best schedule in hindsight, and the
// budget out of which one may stand elsewhere than the rule. Arithmetic only; seconds throughout. docs/policy.md has the proofs.
#pragma once

#include <algorithm>
#include <array>

#include "lib/layout/types.h"

namespace moebius {

// [Layout]: of a step in each, or of a move to each.
using Costs = std::array<double, 2>;

inline double of(const Costs& costs, Layout layout) { return costs[static_cast<size_t>(layout)]; }
inline double round_trip(const Costs& price) { return price[0] + price[1]; }

// Regret is what the other layout would have saved since the rule came here, never below zero; the rule moves when it reaches the price
// there and back. It is the offline optimum's own bookkeeping: (best schedule that ends here) − (best that ends there) + (price there).
class RegretRule {
 public:
  explicit RegretRule(Layout at) : at_(at) {}
  void add(const Costs& step, const Costs& price) {
    regret_ = std::clamp(regret_ + of(step, at_) - of(step, other(at_)), 0.0, round_trip(price));
  }
  bool due(const Costs& price) const { return regret_ > 0 && regret_ >= round_trip(price); }
  void move() {
    at_ = other(at_);
    regret_ = 0;
  }
  Layout at() const { return at_; }
  double regret() const { return regret_; }

 private:
  Layout at_;
  double regret_ = 0;
};

// Where to be: with the rule, or elsewhere as long as the budget pays the difference. So its cost is at most the rule's, what the budget
// was given, and what one step overdraws.
class Path {
 public:
  explicit Path(Layout at) : rule_(at), here_(at) {}

  // A step ran here; the budget gets `income`, and keeps at most `most`.
  void add(const Costs& step, const Costs& price, double income, double most) {
    earn(income, most);
    if (away()) {
      budget_ -= of(step, here_) - of(step, rule_.at());
      ++steps_away_;
    }
    rule_.add(step, price);
  }
  void earn(double income, double most) { budget_ = std::max(budget_, std::min(budget_ + income, most)); }

  bool rule_moves(const Costs& price) const { return rule_.due(price); }
  // The rule moves: to where the path is already, which has been paid, or the path goes with it. True: the path moved.
  bool follow_rule(const Costs& price) {
    rule_.move();
    if (here_ == rule_.at()) {
      budget_ += of(price, here_);
      return false;
    }
    here_ = rule_.at();
    return true;
  }

  bool away() const { return here_ != rule_.at(); }
  int steps_away() const { return steps_away_; }
  // Whether the budget holds a stay elsewhere that loses `loss`, with the way there and back.
  bool affords(const Costs& price, double loss) const { return !away() && budget_ >= round_trip(price) + loss; }
  void leave(const Costs& price) {
    here_ = other(here_);
    budget_ -= of(price, here_);
    steps_away_ = 0;
  }
  // Of the way back to the rule something must be left.
  bool must_return(const Costs& price) const { return away() && budget_ <= of(price, rule_.at()); }
  void go_back(const Costs& price) {
    here_ = rule_.at();
    budget_ -= of(price, here_);
  }

  Layout here() const { return here_; }
  const RegretRule& rule() const { return rule_; }
  double budget() const { return budget_; }
  // Someone else has moved it: the rule begins anew from there, the budget stays.
  void restart(Layout at) {
    rule_ = RegretRule(at);
    here_ = at;
  }

 private:
  RegretRule rule_;
  Layout here_;
  double budget_ = 0;
  int steps_away_ = 0;
};

}  // namespace moebius
