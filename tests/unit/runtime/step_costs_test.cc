// Curves against synthetic machines whose truth is known.
#include "lib/runtime/step_costs.h"

#include <cmath>
#include <random>

#include "lib/runtime/dummies.h"
#include "tests/catch.h"

namespace moebius {
namespace {

// Memory-bound up to 32 rows, compute-bound from there on; prompts' rows, which stand on one home, cost a fifth more.
double truth(const StepLoad& load) {
  return 5e-3 + 1e-4 * std::max(0.0, load.rows - 32) + 2e-5 * load.prompt_rows + 1e-8 * load.kv_tokens + 1e-9 * load.attended;
}

// `rows` requests that decode after `context` tokens each, and a prompt's first rows.
StepLoad load_of(double rows, double context, double prompt = 0) {
  return {rows + prompt, prompt, rows * context + prompt, rows * context + prompt * (prompt + 1) / 2};
}

class Machine {
 public:
  explicit Machine(uint64_t seed) : random_(seed) {}
  // 20 % noise, and one step in twenty takes 3 to 20 times as long.
  double step(const StepLoad& load) {
    const double noise = std::max(0.2, 1 + 0.2 * normal_(random_));
    return slow * truth(load) * (uniform_(random_) < 0.05 ? 3 + 17 * uniform_(random_) : noise);
  }
  StepLoad any_load() {
    const double rows = std::floor(std::exp2(8 * uniform_(random_)));
    const double prompt = uniform_(random_) < 0.3 ? std::floor(512 * uniform_(random_)) : 0;
    return load_of(rows, std::floor(2000 * uniform_(random_)), prompt);
  }
  double slow = 1;

 private:
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
  std::uniform_real_distribution<double> uniform_{0, 1};
};

double error(const StepCurve& curve, const StepLoad& load, double now_s, double slow = 1) {
  return std::fabs(curve.predict(load, now_s).seconds / (slow * truth(load)) - 1);
}

const StepLoad kLoads[] = {load_of(1, 500), load_of(8, 1000), load_of(32, 1250), load_of(100, 1000), load_of(200, 1500, 256)};

}  // namespace

TEST_CASE("a curve comes within 15 % of the truth under 20 % noise with 5 % outliers, 5 % on average, and says how sure it is") {
  double sum = 0;
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    Machine machine(seed);
    StepCurve curve;
    double now = 100;
    CHECK_FALSE(curve.predict(kLoads[0], now).seen());
    for (int i = 0; i < 2000; ++i) {
      const StepLoad load = machine.any_load();
      curve.learn(load, machine.step(load), now += 0.01);
    }
    for (const StepLoad& load : kLoads) {
      INFO("seed " << seed << ", rows " << (load.rows - load.prompt_rows) << ", " << curve.predict(load, now).seconds << " for " << truth(load));
      CHECK(error(curve, load, now) < 0.15);
      CHECK(curve.predict(load, now).relative < 0.1);
      sum += error(curve, load, now);
    }
  }
  CHECK(sum / (40 * std::size(kLoads)) < 0.05);
}

// Rows reach experts, each read once; 32 rows reach nearly all. Taught as calibration does: batches that double, each prompt of 32 tokens.
TEST_CASE("prompts do not spoil what few rows cost") {
  const auto reaching = [](const StepLoad& load) { return 2e-3 + 20e-3 * (1 - std::pow(1 - 8.0 / 128, load.rows)) + 1e-6 * load.rows; };
  StepCurve curve;
  double now = 0;
  const auto learn = [&](const StepLoad& load) { curve.learn(load, reaching(load), now += 0.01); };
  for (int round = 0; round < 4; ++round)
    for (double size = 1, before = 0; size <= 256; before = size, size *= 2) {
      for (double left = size - before; left > 0; left -= 64) learn(load_of(before, 64, 32 * std::min(left, 64.0)));
      for (int i = 0; i < 8; ++i) learn(load_of(size, 64 + i));
    }
  for (double rows : {1, 2, 8, 32, 256}) {
    const Estimate e = curve.predict(load_of(rows, 64), now);
    INFO(rows << " rows: " << e.seconds << " ± " << e.relative << ", truth " << reaching(load_of(rows, 64)));
    CHECK(e.seconds == Approx(reaching(load_of(rows, 64))).epsilon(0.1));
  }
}

TEST_CASE("a machine that becomes twice as slow, or thirty times as fast, is followed everywhere, by steps of one load") {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    Machine machine(seed);
    StepCurve curve;
    double now = 0;
    for (int i = 0; i < 2000; ++i) {
      const StepLoad load = machine.any_load();
      curve.learn(load, machine.step(load), now += 0.01);
    }
    machine.slow = seed % 2 ? 2 : 1.0 / 30;
    for (int i = 0; i < 150; ++i) curve.learn(kLoads[1], machine.step(kLoads[1]), now += 0.01);
    INFO("seed " << seed << ": " << curve.predict(kLoads[1], now).seconds / truth(kLoads[1]) << " and " << curve.predict(kLoads[3], now).seconds / truth(kLoads[3]));
    CHECK(error(curve, kLoads[1], now, machine.slow) < 0.15);
    CHECK(error(curve, kLoads[3], now, machine.slow) < 0.3);
  }
}

TEST_CASE("uncertainty widens with age up to its limit, and with the distance from what was seen") {
  Machine machine(3);
  StepCurve curve;
  double now = 0;
  const StepLoad seen = load_of(16, 500);
  for (int i = 0; i < 200; ++i) curve.learn(seen, machine.step(seen), now += 0.01);
  const auto relative = [&](double rows, double age) { return curve.predict(load_of(rows, 500), now + age).relative; };
  CHECK(relative(16, 0) < 0.1);
  CHECK(relative(16, 600) > relative(16, 60));
  CHECK(relative(16, 1e9) == Approx(relative(16, 1e10)));
  CHECK(relative(16, 1e9) > 0.3);
  CHECK(relative(16, 1e9) < 0.4);
  CHECK(relative(64, 0) > 0.3);
  CHECK(relative(64, 0) < relative(256, 0));
  CHECK(relative(2, 0) > relative(16, 0));
  curve.learn(seen, machine.step(seen), now += 3600);  // seen again: of that step alone it is as sure as of any
  CHECK(curve.predict(seen, now).relative < 0.25);
}

TEST_CASE("a curve never falls with more work, whatever it is taught") {
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> u(0, 1);
  StepCurve curve;
  for (int i = 0; i < 500; ++i) curve.learn({std::floor(100 * u(random)), std::floor(300 * u(random)), 1e5 * u(random), 1e6 * u(random)}, 0.001 + u(random), i);
  double last = 0;
  for (double rows = 0; rows < 10000; rows += 7) {
    const double seconds = curve.predict({rows, rows / 2, rows * 3, rows * 5}, 500).seconds;
    CHECK(seconds >= last);
    last = seconds;
  }
}

TEST_CASE("a curve is restored to what it was, a little less sure; other numbers are refused") {
  Machine machine(9);
  StepCurve curve, copy;
  for (int i = 0; i < 300; ++i) {
    const StepLoad load = machine.any_load();
    curve.learn(load, machine.step(load), i);
  }
  REQUIRE(copy.restore(curve.state(), 7));
  const Estimate was = curve.predict(kLoads[2], 299), is = copy.predict(kLoads[2], 7);
  CHECK(is.seconds == was.seconds);
  CHECK(is.relative > was.relative);
  for (size_t broken : {0u, 1u, 2u, 19u, 20u}) {
    auto state = curve.state();
    state[broken] = broken == 20 ? state[broken] + 1 : -1;
    StepCurve refused;
    CHECK_FALSE(refused.restore(state, 0));
    state[broken] = std::nan("");
    CHECK_FALSE(refused.restore(state, 0));
    CHECK_FALSE(refused.seen());
  }
  StepCurve never;
  CHECK_FALSE(copy.restore(never.state(), 0));
}

TEST_CASE("a step is seen in TP as all that it holds, in EP as its rows and what the home that has most holds beyond") {
  const StepLoad homes[] = {StepLoad::of(100, 1), {}, StepLoad::of(0, 64)};
  const StepLoads loads = StepLoads::of(homes);
  CHECK((loads.tp.rows == 65 && loads.tp.prompt_rows == 64 && loads.tp.kv_tokens == 101 + 64 && loads.tp.attended == 101 + 64 * 65 / 2));
  CHECK((loads.ep.rows == 65 && loads.ep.prompt_rows == 64 && loads.ep.kv_tokens == 101 && loads.ep.attended == 64 * 65 / 2));
  CHECK((&loads.in(Layout::kTp) == &loads.tp && &loads.in(Layout::kEp) == &loads.ep));
  const StepLoads dealt = StepLoads::decode(5, 500, 4);  // one home has two
  CHECK((dealt.tp.kv_tokens == 500 && dealt.ep.rows == 5 && dealt.ep.kv_tokens == 200 && dealt.ep.attended == 200));
  CHECK(StepLoads::decode(0, 0, 4).ep.kv_tokens == 0);
}

TEST_CASE("calibration's dummies fit any context, and get longer and fewer until they begin anew") {
  for (int64_t context : {1, 2, 33, 192, 300, 512, 40960})
    for (int64_t prompt = DummyRound::kShortest;; prompt = DummyRound::next(prompt)) {
      const DummyRound round = DummyRound::of(prompt, context);
      INFO("context " << context << ", prompt " << prompt);
      CHECK((round.prompt >= 1 && round.prompt <= prompt && round.total <= context && round.most >= 1));
      CHECK((context == 1 || round.prompt < round.total));
      if (prompt == DummyRound::kLongest) break;
    }
  const DummyRound least = DummyRound::of(DummyRound::kShortest, 4096), most = DummyRound::of(DummyRound::kLongest, 4096);
  CHECK((least.prompt == 32 && least.total == 192 && least.most == 1024));
  CHECK((most.prompt == 2048 && most.total == 2208 && most.most == 16));
  CHECK(DummyRound::next(DummyRound::kLongest) == DummyRound::kShortest);
}

TEST_CASE("a switch's price comes from its bytes and is corrected by each that is seen") {
  CostModel costs;
  const double nominal = costs.price(Layout::kEp, int64_t{1} << 30);
  CHECK(nominal == Approx(1e-3 + double(1 << 30) / 5e9));
  costs.on_switch(Layout::kEp, int64_t{1} << 30, 4 * nominal);
  CHECK(costs.price(Layout::kEp, int64_t{1} << 30) == Approx(4 * nominal));
  CHECK(costs.price(Layout::kTp, int64_t{1} << 30) == Approx(4 * nominal));  // not seen: like the other
  costs.on_switch(Layout::kEp, int64_t{1} << 30, nominal);
  CHECK(costs.price(Layout::kEp, int64_t{1} << 30) == Approx(2 * nominal));
  costs.on_switch(Layout::kTp, int64_t{1} << 30, 9 * nominal);
  CHECK(costs.price(Layout::kTp, int64_t{1} << 30) == Approx(9 * nominal));
}

TEST_CASE("a switch that takes many steps costs what it took from them and what they took beyond a step in its new layout") {
  CostModel costs;
  const StepLoads load = StepLoads::decode(8, 1000, 2);
  for (int i = 0; i < 50; ++i) costs.on_step(Layout::kEp, load, 0.010, i);
  costs.on_switch_started();
  for (int i = 0; i < 20; ++i) costs.on_step_under_way(Layout::kEp, load, 0.015, 50);
  costs.on_switch(Layout::kEp, 1 << 20, 0.05);
  CHECK(costs.price(Layout::kEp, 1 << 20) == Approx(0.05 + 20 * 0.005).epsilon(0.01));
  costs.on_switch_started();
  costs.on_switch(Layout::kEp, 1 << 20, 0.15);
  CHECK(costs.price(Layout::kEp, 1 << 20) == Approx(0.15).epsilon(0.01));
}

}  // namespace moebius
