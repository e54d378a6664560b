#include "examples/plan/routing.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace moebius::plan {
namespace {

// 4,096 rows reach every expert that has a tenth of its even share; from there on counts grow with the rows.
constexpr int kPowers = 13, kLayers = 8;

}  // namespace

Routing::Routing(int experts, int top_k, int ranks, double skew, uint64_t seed) : at_power_(kPowers) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> gauss;
  std::uniform_real_distribution<double> uniform(1e-12, 1);
  std::vector<double> log_weight(static_cast<size_t>(experts));
  std::vector<std::pair<double, int>> order(log_weight.size());
  for (int layer = 0; layer < kLayers; ++layer) {
    for (double& w : log_weight) w = skew * gauss(random);
    std::vector<int64_t> hits(log_weight.size(), 0);
    for (int row = 1, power = 0; power < kPowers; ++row) {
      // The largest of weights with Gumbel noise are a draw without putting back.
      for (size_t e = 0; e < order.size(); ++e) order[e] = {log_weight[e] - std::log(-std::log(uniform(random))), static_cast<int>(e)};
      std::nth_element(order.begin(), order.begin() + (top_k - 1), order.end(), std::greater<>());
      for (int i = 0; i < top_k; ++i) ++hits[static_cast<size_t>(order[static_cast<size_t>(i)].second)];
      if (row != 1 << power) continue;
      std::vector<double> reached(static_cast<size_t>(ranks), 0), pairs(reached);
      for (int e = 0; e < experts; ++e) {
        const auto rank = static_cast<size_t>(int64_t{e} * ranks / experts);
        reached[rank] += hits[static_cast<size_t>(e)] > 0;
        pairs[rank] += static_cast<double>(hits[static_cast<size_t>(e)]);
      }
      Reached& r = at_power_[static_cast<size_t>(power++)];
      r.experts += std::accumulate(reached.begin(), reached.end(), 0.0) / kLayers;
      r.busiest += *std::max_element(reached.begin(), reached.end()) / kLayers;
      r.busiest_rows += *std::max_element(pairs.begin(), pairs.end()) / kLayers;
    }
  }
}

Reached Routing::at(double rows) const {
  if (rows <= 0) return {};
  const double x = std::log2(std::max(1.0, rows));
  const auto i = static_cast<size_t>(x);
  if (i + 1 >= at_power_.size()) {
    Reached r = at_power_.back();
    r.busiest_rows *= rows / std::exp2(kPowers - 1);
    return r;
  }
  const double share = (rows - std::exp2(i)) / std::exp2(i);  // between powers on a straight line
  const auto between = [&](double Reached::*field) { return at_power_[i].*field + share * (at_power_[i + 1].*field - at_power_[i].*field); };
  Reached r{between(&Reached::experts), between(&Reached::busiest), between(&Reached::busiest_rows)};
  if (rows < 1) r.busiest_rows *= rows;
  return r;
}

}  // namespace moebius::plan
