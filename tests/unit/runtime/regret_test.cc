// The rule against the best schedule in hindsight, which a dynamic program finds.
#include "lib/runtime/regret.h"

#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "lib/runtime/hindsight.h"
#include "tests/catch.h"

namespace moebius {
namespace {

constexpr double kIncome = 0.02;  // of each step's time

// Sees where the path is, which an adversary uses.
using Load = std::function<Costs(int step, const Path& path, std::mt19937_64& random)>;
enum class Advice { kNone, kRandom, kWorst };

struct Totals {
  double path = 0, hindsight = 0, income = 0, widest = 0;
  int moves = 0;
};

// Prices above the given ones, by a factor that the path and a number from 0 to 1 decide.
using Rise = std::function<double(const Path& path, double uniform)>;

Totals run(const Load& load, const Costs& price, int steps, uint64_t seed, Advice advice, const Rise& rise = nullptr) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform(0, 1);
  Path path(Layout::kTp);
  Hindsight hindsight(Layout::kTp, price);
  Totals t;
  for (int i = 0; i < steps; ++i) {
    const Costs step = load(i, path, random);
    const double here = of(step, path.here()), scale = rise ? rise(path, uniform(random)) : 1;
    const Costs now = {price[0] * scale, price[1] * scale};
    const double income = advice == Advice::kNone ? 0 : kIncome * here;
    t.path += here;
    t.income += income;
    t.widest = std::max(t.widest, std::abs(step[0] - step[1]));
    hindsight.add(step, price);
    path.add(step, now, income, 4 * round_trip(now));
    const Layout before = path.here();
    if (path.rule_moves(now)) path.follow_rule(now);
    else if (path.must_return(now)) path.go_back(now);
    else if (path.affords(now, 0) &&
             (advice == Advice::kWorst || (advice == Advice::kRandom && uniform(random) < 0.1)))
      path.leave(now);
    if (path.here() != before) t.path += of(now, path.here()), ++t.moves;
  }
  t.hindsight = hindsight.cost();
  return t;
}

// docs/policy.md
double bound(const Totals& t, const Costs& price) {
  const double trip = round_trip(price);
  return (3 + 2 * t.widest / trip) * t.hindsight + 2.5 * trip + t.widest + t.income + t.widest;
}

struct Named {
  const char* name;
  Load load;
};

// Costs of a step up to 1; prices as a case has them.
std::vector<Named> loads(const Costs& price, double widest) {
  const int flip = std::max(1, static_cast<int>(round_trip(price) / widest));
  return {
      {"random", [=](int, const Path&, auto& r) {
         std::uniform_real_distribution<double> u(0, widest);
         return Costs{u(r), u(r)};
       }},
      {"random walk", [=, at = 0.5](int, const Path&, auto& r) mutable {
         at = std::clamp(at + std::uniform_real_distribution<double>(-0.05, 0.05)(r), 0.0, 1.0);
         return Costs{at * widest, (1 - at) * widest};
       }},
      {"step", [=](int i, const Path&, auto&) { return i < 500 ? Costs{0.1, 0.1 + widest} : Costs{0.1 + widest, 0.1}; }},
      {"square wave that flips when regret is full", [=](int i, const Path&, auto&) {
         return i / flip % 2 == 0 ? Costs{widest, 0} : Costs{0, widest};
       }},
      {"square wave of random period", [=, left = 0, bad = 0](int, const Path&, auto& r) mutable {
         if (left-- <= 0) left = std::uniform_int_distribution<int>(1, 3 * flip)(r), bad ^= 1;
         return bad ? Costs{widest, 0} : Costs{0, widest};
       }},
      {"adversary that flips after each move", [=](int, const Path& path, auto&) {
         return path.here() == Layout::kTp ? Costs{widest, 0} : Costs{0, widest};
       }},
      {"adversary that turns round just before a move", [=, until = 0.0](int, const Path& path, auto& r) mutable {
         const double full = path.rule().regret() / round_trip(price);
         if (full <= 0) until = std::uniform_real_distribution<double>(0.5, 1.2)(r);
         const bool against = full < until;
         if (!against) until = 0;
         return (path.rule().at() == Layout::kTp) == against ? Costs{widest, 0} : Costs{0, widest};
       }},
      {"a rollout that shrinks: EP wins at first, TP at last", [=](int i, const Path&, auto&) {
         const double rows = 1000.0 / (1 + i % 1000);
         return Costs{0.2 * widest + 0.002 * widest * rows, 0.3 * widest + 0.0005 * widest * rows};
       }},
  };
}

uint64_t seed() {
  const char* given = std::getenv("MOEBIUS_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
}

}  // namespace

TEST_CASE("the rule, and whoever deviates from it within the budget, stay within the bound of the best schedule in hindsight") {
  double worst = 0;
  for (uint64_t s = seed(); s < seed() + (kSanitized ? 20 : 300); ++s) {
    std::mt19937_64 random(s);
    std::uniform_real_distribution<double> u(0, 1);
    const double trip = std::exp(4 * u(random)), share = u(random) < 0.2 ? 0.01 : u(random);
    const Costs price = {trip * share, trip * (1 - share)};
    const double widest = trip / std::exp(1 + 5 * u(random));
    for (const Named& n : loads(price, widest))
      for (Advice advice : {Advice::kNone, Advice::kRandom, Advice::kWorst}) {
        const Totals t = run(n.load, price, 3000, s, advice);
        INFO("seed " << s << ", " << n.name << ", advice " << static_cast<int>(advice) << ", prices " << price[0] << " and " << price[1] << ", moves "
                     << t.moves << ", best " << t.hindsight);
        REQUIRE(t.path <= bound(t, price) * (1 + 1e-9));
        if (advice == Advice::kNone && t.hindsight > 20 * trip && widest < trip / 50) worst = std::max(worst, t.path / t.hindsight);
      }
  }
  INFO("worst ratio " << worst);
  CHECK(worst > 2.9);  // the adversaries deserve the name
  CHECK(worst < 3.1);
}

TEST_CASE("prices that vary by a factor, at random or to the rule's disadvantage, cost that factor at most") {
  for (double most : {1.2, 2.0})
    for (const Costs& price : {Costs{3, 3}, Costs{1, 9}}) {
      const double trip = round_trip(price);
      const Rise rises[] = {[=](const Path&, double u) { return 1 + (most - 1) * u; },
                            [=](const Path& path, double u) { return path.rule().regret() < u * most * trip ? most : 1; },
                            [=](const Path& path, double) { return path.rule().regret() < (most - 0.05) * trip ? most : 1; },
                            [=](const Path& path, double) { return path.here() == Layout::kTp ? most : 1; }};
      for (const Rise& rise : rises)
        for (uint64_t s = seed(); s < seed() + (kSanitized ? 3 : 30); ++s)
          for (const Named& n : loads(price, 0.2)) {
            const Totals t = run(n.load, price, 3000, s, Advice::kNone, rise);
            INFO("seed " << s << ", " << n.name << ", factor " << most << ", rise " << &rise - rises << ", best " << t.hindsight);
            REQUIRE(t.path <= most * bound(t, price) * (1 + 1e-9));
          }
    }
}

TEST_CASE("learned costs that are wrong by a factor lose that factor at most") {
  constexpr double kError = 0.2;  // of either cost and of the prices
  for (uint64_t s = seed(); s < seed() + (kSanitized ? 10 : 100); ++s) {
    std::mt19937_64 random(s);
    std::uniform_real_distribution<double> u(-kError, kError);
    const Costs price = {2, 4}, believed_price = {price[0] * (1 + u(random)), price[1] * (1 + u(random))};
    for (const Named& n : loads(price, 0.2)) {
      Path path(Layout::kTp);
      Hindsight hindsight(Layout::kTp, price);
      double cost = 0;
      for (int i = 0; i < 3000; ++i) {
        const Costs step = n.load(i, path, random), believed = {step[0] * (1 + u(random)), step[1] * (1 + u(random))};
        cost += of(step, path.here());
        hindsight.add(step, price);
        path.add(believed, believed_price, 0, 0);
        if (path.rule_moves(believed_price) && path.follow_rule(believed_price)) cost += of(price, path.here());
      }
      INFO("seed " << s << ", " << n.name);
      const Totals t{0, hindsight.cost(), 0, 0.2 * (1 + kError)};
      CHECK(cost <= bound(t, {price[0] * (1 - kError), price[1] * (1 - kError)}) * (1 + kError) / (1 - kError));
    }
  }
}

TEST_CASE("where one layout always wins the rule never moves, and deviations spend no more than the budget") {
  const auto tp_wins = [](int, const Path&, auto&) { return Costs{0.01, 0.015}; };
  CHECK(run(tp_wins, {0.05, 0.07}, 100000, 1, Advice::kNone).moves == 0);
  const Totals t = run(tp_wins, {0.05, 0.07}, 100000, 1, Advice::kWorst);
  CHECK(t.moves > 0);
  CHECK(t.path <= 0.01 * 100000 + t.income + 0.005 + 1e-9);
}

TEST_CASE("a deviation that was right costs less than the rule and fills the budget") {
  const Costs price = {0.5, 0.5}, step = {0.03, 0.02};
  Path path(Layout::kTp);
  while (!path.affords(price, 0)) path.earn(0.1, 2);
  const double before = path.budget();
  path.leave(price);
  CHECK(path.budget() == Approx(before - 0.5));
  int steps = 0;
  while (!path.rule_moves(price)) path.add(step, price, 0, 2), ++steps;
  CHECK(steps == 100);
  CHECK_FALSE(path.follow_rule(price));
  CHECK_FALSE(path.away());
  CHECK(path.budget() == Approx(before + 100 * 0.01));
}

}  // namespace moebius
