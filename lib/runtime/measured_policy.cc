// The policy `measured`: the regret rule on learned costs, and the two reasons for being elsewhere than the rule as long as the budget
// pays: known work that the other layout would do for less, and a layout whose costs are not known. docs/policy.md
#include <algorithm>
#include <cmath>
#include <utility>

#include "lib/runtime/policy.h"

namespace moebius {
namespace {

// With a smaller error a visit would teach nothing.
constexpr double kSure = 0.1;
// A visit: as many steps settle a curve to a few percent. One whose costs were never seen may be this many times as slow.
constexpr int kVisitSteps = 16;
constexpr double kWorstFactor = 4;

using EstimateText = FixedText<31>;
EstimateText text_of(const Estimate& e) {
  if (!e.seen()) return "unknown";
  return EstimateText::of("{:.3f} ms ±{:.0f} %", e.seconds * 1e3, std::min(999.0, e.relative * 100));
}

class MeasuredPolicy final : public Policy {
 public:
  MeasuredPolicy(const PolicyConfig& c, const PolicyLimits& limits, const CostModel& costs)
      : costs_(costs), ranks_(limits.ranks), shadow_(c.shadow), explore_(c.explore) {}

  std::optional<Decision> observe(const LoadSample& load) override {
    if (ranks_ == 1 || load.switching || load.inside) return std::nullopt;
    if (!begun_ || (!shadow_ && load.layout != path_.here())) path_.restart(load.layout);  // the host's switch
    begun_ = true;
    if (load.last_seconds > 0) account(load);
    figures_.regret_s = path_.rule().regret();
    figures_.price_s = round_trip(load.price);
    figures_.budget_s = path_.budget();
    return load.last_seconds > 0 ? decide(load) : std::nullopt;
  }

  bool watches() const override { return false; }  // idle steps cost nothing in either layout
  void on_switched(double) override { failure_.clear(); }
  // As if it had not been asked for: neither regret nor budget is spent.
  void on_failed(Layout to, std::string_view why) override {
    path_ = before_;
    failed_to_ = to;
    failure_ = Reason::of("; again after step {}, which failed: {}", asked_step_, why);
  }
  const PolicyFigures* figures() const override { return ranks_ == 1 ? nullptr : &figures_; }

 private:
  const Estimate& estimate(Layout l) const { return figures_.step[static_cast<size_t>(l)]; }

  // As the rule sees steps: its other layout is taken to cost no less where it is not known.
  Costs believed(const Estimate& tp, const Estimate& ep) const {
    Costs c{tp.seconds, ep.seconds};
    const size_t at = static_cast<size_t>(path_.rule().at()), elsewhere = 1 - at;
    if (!(elsewhere == 0 ? tp : ep).known()) c[elsewhere] = std::max(c[elsewhere], c[at]);
    return c;
  }

  void account(const LoadSample& load) {
    for (Layout l : {Layout::kTp, Layout::kEp}) figures_.step[static_cast<size_t>(l)] = costs_.step(l, load.last, load.time_s);
    const double income = explore_ * load.last_seconds;
    const double most = 2 * (round_trip(load.price) + kVisitSteps * kWorstFactor * load.last_seconds);
    if (estimate(Layout::kTp).seen() && estimate(Layout::kEp).seen())
      path_.add(believed(estimate(Layout::kTp), estimate(Layout::kEp)), load.price, income, most);
    else
      path_.earn(income, most);
  }

  std::optional<Decision> decide(const LoadSample& load) {
    const Layout from = path_.here(), there = other(from);
    const Path now = path_;
    if (path_.rule_moves(load.price)) {
      if (from == path_.rule().at() && held(there, load)) return std::nullopt;
      if (!path_.follow_rule(load.price)) return std::nullopt;
      return decision(load, now, "");
    }
    if (path_.away()) {
      if (!(path_.must_return(load.price) || worse_here()) || held(there, load)) return std::nullopt;
      path_.go_back(load.price);
      return decision(load, now, "; back");
    }
    if (held(there, load)) return std::nullopt;
    if (foreseen(load)) {
      path_.leave(load.price);
      return decision(load, now, "; what is known to come pays for it", false);
    }
    if (worth_a_visit(load)) {
      path_.leave(load.price);
      return decision(load, now, "; to learn its costs", false);
    }
    return std::nullopt;
  }

  Decision decision(const LoadSample& load, const Path& before, const char* why, bool may_preempt = true) {
    before_ = before;
    asked_load_ = load.running + load.waiting;
    asked_step_ = load.step;
    const Reason again = std::exchange(failure_, {});
    return {path_.here(), shadow_,
            Reason::of("measured: running {}, waiting {}, to prefill {}: tp {}, ep {}, regret {:.3f} of price {:.3f} ms, budget {:.3f} ms: {} → {}{}{}",
                       load.running, load.waiting, load.prefill_tokens, text_of(estimate(Layout::kTp)).view(),
                       text_of(estimate(Layout::kEp)).view(), before.rule().regret() * 1e3, round_trip(load.price) * 1e3, before.budget() * 1e3,
                       name_of(before.here()), name_of(path_.here()), why, again.view()),
            may_preempt};
  }

  bool held(Layout to, const LoadSample& load) const {
    return !failure_.empty() && to == failed_to_ && load.step < asked_step_ + kHoldSteps &&
           std::fabs(load.running + load.waiting - asked_load_) < kHoldMargin * std::max(1.0, asked_load_);
  }

  bool worse_here() const {
    const Estimate &here = estimate(path_.here()), &home = estimate(path_.rule().at());
    return path_.steps_away() >= kVisitSteps && here.seconds >= home.seconds && !might_beat(here, home);
  }
  static bool might_beat(const Estimate& a, const Estimate& b) {
    return !a.seen() || (a.relative >= kSure && a.seconds * (1 - a.relative) < b.seconds);
  }

  // The rule on the work that is known: running requests as they will end by their max_tokens, after those that wait have taken their
  // places. Of the lengths two numbers are known, so the batch is taken to shrink like (1 − t/longest)^γ, which has that sum.
  bool foreseen(const LoadSample& load) const {
    const Estimate &here = estimate(path_.here()), &there = estimate(other(path_.here()));
    if (!there.seen() || there.seconds * (1 + there.relative) >= here.seconds || !path_.affords(load.price, 0)) return false;
    if (load.running == 0 || load.remaining_tokens <= 0) return false;
    constexpr int kPieces = 8;
    const double running = load.running, longest = static_cast<double>(load.longest_remaining), sum = static_cast<double>(load.remaining_tokens);
    const double gamma = std::max(0.0, running * longest / sum - 1);
    const double context = load.last.tp.attended / std::max(1.0, load.last.tp.rows);
    RegretRule ahead = path_.rule();
    const auto reaches_price = [&](double rows, double steps) {
      const StepLoads then = StepLoads::decode(std::ceil(rows), context * rows, ranks_);
      const Costs c = believed(costs_.step(Layout::kTp, then, load.time_s), costs_.step(Layout::kEp, then, load.time_s));
      ahead.add({c[0] * steps, c[1] * steps}, load.price);
      return ahead.due(load.price);
    };
    if (reaches_price(running, load.waiting * (sum / running) / running)) return true;
    for (int i = 0; i < kPieces; ++i)
      if (reaches_price(running * std::pow(1 - (i + 0.5) / kPieces, gamma), longest / kPieces)) return true;
    return false;
  }

  // Costs here are known and those there might be lower; requests stay long enough for a visit to pay, and the budget holds its worst.
  bool worth_a_visit(const LoadSample& load) const {
    const Estimate &here = estimate(path_.here()), &there = estimate(other(path_.here()));
    if (explore_ == 0 || shadow_ || !here.known() || load.last.tp.rows == load.last.tp.prompt_rows) return false;
    if (load.longest_remaining < 2 * kVisitSteps) return false;
    if (!might_beat(there, here)) return false;
    const double worst = there.seen() ? std::min(there.seconds * (1 + there.relative), kWorstFactor * std::max(here.seconds, there.seconds))
                                      : kWorstFactor * here.seconds;
    return path_.affords(load.price, kVisitSteps * std::max(0.0, worst - here.seconds));
  }

  const CostModel& costs_;
  const int ranks_;
  const bool shadow_;
  const double explore_;
  bool begun_ = false;
  Path path_{Layout::kTp};
  PolicyFigures figures_;
  // Of the last switch asked for; failure_ is empty unless it failed.
  Path before_{Layout::kTp};
  double asked_load_ = 0;
  uint64_t asked_step_ = 0;
  Layout failed_to_ = Layout::kTp;
  Reason failure_;
};

}  // namespace

std::unique_ptr<Policy> make_measured_policy(const PolicyConfig& config, const PolicyLimits& limits, const CostModel& costs) {
  return std::make_unique<MeasuredPolicy>(config, limits, costs);
}

}  // namespace moebius
