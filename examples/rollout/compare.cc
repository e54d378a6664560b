#include "examples/rollout/compare.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "examples/common/statistics.h"

namespace moebius_examples {
namespace {

double mean(const std::vector<double>& x) {
  return x.empty() ? 0 : std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

// The least k for which fewer than k of n fair coins show heads with a probability above 2.5 %: the interval goes from the k-th least to
// the k-th largest value, or is all of them.
size_t order(size_t n) {
  double p = std::pow(0.5, static_cast<double>(n)), below = 0;
  for (size_t k = 0; k < n; ++k) {
    below += p;
    if (below > 0.025) return std::max<size_t>(k, 1);
    p *= static_cast<double>(n - k) / static_cast<double>(k + 1);
  }
  return 1;
}

// Seconds until a run had so many tokens, between its steps on a straight line.
double time_of(const Run& run, double tokens) {
  StepSample before;
  for (const StepSample& s : run.steps) {
    if (static_cast<double>(s.tokens) >= tokens && s.tokens > before.tokens)
      return before.at_s +
             (s.at_s - before.at_s) * (tokens - static_cast<double>(before.tokens)) / static_cast<double>(s.tokens - before.tokens);
    before = s;
  }
  return before.at_s;
}

// [kPrices] each: what a stretch took, and what a switch away before it would take.
struct Costs {
  std::array<double, kPrices> step_s{}, price_s{};
};
Costs costs_of(const std::vector<const Run*>& runs) {
  Costs costs;
  for (size_t k = 0; k < kPrices; ++k) {
    std::vector<double> step, price;
    for (const Run* run : runs) {
      const double stretch = static_cast<double>(run->tokens) / kPrices, begin = stretch * static_cast<double>(k);
      step.push_back((k + 1 == kPrices ? run->seconds : time_of(*run, begin + stretch)) - (k == 0 ? 0 : time_of(*run, begin)));
      const auto asked =
          std::find_if(run->prices.begin(), run->prices.end(), [&](const auto& p) { return static_cast<double>(p.first) >= begin; });
      if (asked != run->prices.end()) price.push_back(asked->second);
    }
    costs.step_s[k] = median(step);
    costs.price_s[k] = price.empty() ? INFINITY : median(price);
  }
  return costs;
}

}  // namespace

Median median_with_interval(std::vector<double> x) {
  if (x.empty()) return {};
  std::sort(x.begin(), x.end());
  const size_t n = x.size(), k = order(n);
  return {median(x), x[k - 1], x[n - k]};
}

Figures figures_of(const Run& run, const Targets& targets) {
  Figures f;
  f.seconds = run.seconds;
  f.tokens_per_second = static_cast<double>(run.tokens) / run.seconds;
  std::vector<double> first;
  int met = 0;
  for (const Answer& a : run.answers) {
    first.push_back(a.first_s - a.asked_s);
    const double per_token = a.tokens > 1 ? (a.last_s - a.first_s) / static_cast<double>(a.tokens - 1) : 0;
    met += first.back() <= targets.first_s && per_token <= targets.gap_s;
  }
  f.goodput = met / run.seconds;
  f.first_mean_s = mean(first), f.first_p50_s = percentile(first, 0.5), f.first_p99_s = percentile(first, 0.99);
  f.gap_mean_s = mean(run.gaps), f.gap_p50_s = percentile(run.gaps, 0.5), f.gap_p99_s = percentile(run.gaps, 0.99);
  f.gap_max_s = percentile(run.gaps, 1);
  for (const Moment& m : run.moments) {
    f.switches += m.moved;
    if (m.moved) f.switch_s += m.seconds;
  }
  return f;
}

std::optional<double> hindsight_seconds(const std::vector<const Run*>& tp, const std::vector<const Run*>& ep, moebius_layout start) {
  if (tp.empty() || ep.empty()) return std::nullopt;
  const Costs in_tp = costs_of(tp), in_ep = costs_of(ep);
  double best_tp = start == MOEBIUS_LAYOUT_TP ? 0 : INFINITY, best_ep = start == MOEBIUS_LAYOUT_EP ? 0 : INFINITY;
  for (size_t k = 0; k < kPrices; ++k) {
    const double to_tp = std::min(best_tp, best_ep + in_ep.price_s[k]), to_ep = std::min(best_ep, best_tp + in_tp.price_s[k]);
    best_tp = to_tp + in_tp.step_s[k];
    best_ep = to_ep + in_ep.step_s[k];
  }
  return std::min(best_tp, best_ep);
}

}  // namespace moebius_examples
