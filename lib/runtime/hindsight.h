// The best schedule in hindsight: a dynamic program over both ends. What the rule of regret.h is measured against.
#pragma once

#include <algorithm>
#include <cstddef>

#include "lib/runtime/regret.h"

namespace moebius {

class Hindsight {
 public:
  // price: of a move before the first step.
  Hindsight(Layout start, const Costs& price) : best_{price} { best_[static_cast<size_t>(start)] = 0; }
  // A step, and what moves after it cost.
  void add(const Costs& step, const Costs& price) {
    for (size_t x : {0u, 1u}) best_[x] += step[x];
    best_ = {std::min(best_[0], best_[1] + price[0]), std::min(best_[1], best_[0] + price[1])};
  }
  double cost() const { return std::min(best_[0], best_[1]); }

 private:
  Costs best_;  // [Layout] of the cheapest schedule so far that ends there
};

}  // namespace moebius
