// The models of moebius-plan by hand, and the engine's scheduler, switcher and policy in its simulated time.
#include <cmath>

#include "examples/plan/study.h"
#include "lib/base/error.h"
#include "tests/catch.h"

namespace moebius::plan {
namespace {

using moebius_examples::Load;

Load load_of_answers(const std::vector<int64_t>& answers, int64_t prompt = 100) {
  Load load;
  for (size_t i = 0; i < answers.size(); ++i) {
    load.prompts.emplace_back(static_cast<size_t>(prompt), static_cast<int32_t>(i));
    load.asked.push_back({0, static_cast<int64_t>(i), answers[i]});
    load.most_tokens = std::max(load.most_tokens, answers[i]);
  }
  return load;
}

PolicyConfig policy(PolicyKind kind) {
  PolicyConfig p;
  p.kind = kind;
  return p;
}

}  // namespace

TEST_CASE("exchanges are rounds and bytes over the slower of the links they use") {
  Cluster c;
  c.devices = 16, c.devices_per_node = 8;
  c.inside = {100e9, 1e-6};
  c.between = {10e9, 5e-6};
  c.efficiency.link = 0.5;
  const Exchanges here(c, 8), across(c, 16), alone(c, 1);
  CHECK(here.collect(50e6) == Approx(2e-6 + 50e6 / 50e9));
  CHECK(here.all_reduce(1e3) == Approx(2e-6 + 7e3 / 50e9));              // all read all
  CHECK(here.all_reduce(80e6) == Approx(3e-6 + 2 * 70e6 / 50e9));        // by shares
  CHECK(across.collect(150e6) == Approx(10e-6 + 150e6 * 8 / 15 / 5e9));  // 8 of a rank's 15 peers are elsewhere
  CHECK((alone.all_reduce(1e9) == 0 && alone.collect(1e9) == 0));
  const Exchanges lonely(c, 9), half(c, 12);
  CHECK(lonely.collect(80e6) == Approx(10e-6 + 80e6 / 5e9));          // the ninth has no peer on its node
  CHECK(half.collect(110e6) == Approx(10e-6 + 110e6 * 8 / 11 / 5e9));  // the last four have three each
}

TEST_CASE("what rows reach: one row its experts, many rows all, the busiest rank at least its share and with skew more") {
  const Routing even(128, 8, 8, 0), skewed(128, 8, 8, 1);
  CHECK(even.at(1).experts == 8);
  CHECK(even.at(1).busiest_rows >= 1);
  CHECK(even.at(4096).experts == Approx(128));
  CHECK(even.at(4096).busiest_rows == Approx(4096).epsilon(0.05));
  CHECK(skewed.at(4096).busiest_rows > 1.2 * 4096);
  CHECK(even.at(64).experts == Approx(128 * (1 - std::pow(1 - 1.0 / 16, 64))).epsilon(0.03));
  CHECK(skewed.at(64).experts < even.at(64).experts);
  CHECK(even.at(8192).busiest_rows == Approx(2 * even.at(4096).busiest_rows));
  CHECK(even.at(3).experts > even.at(2).experts);
}

TEST_CASE("a step by hand: one rank, memory and matrix rates, launches") {
  const Model model = read_model("qwen3-30b-a3b");
  Cluster c;
  c.devices = 1;
  c.memory_bandwidth = 1e12, c.matrix_flops = 1e30;
  c.inside = c.between = {1e12, 0};
  const Routing routing(128, 8, 1, 0);
  const StepModel steps(model, c, 1, 0, routing);
  const double hidden = 2048, context = 1000;
  const double layer = model.heads.bytes + model.keys.bytes + model.router.bytes + 8 * model.expert.bytes + context * 4 * 2 * 128 * 2 + 20 * hidden;
  const StepWork one = steps.decode(1, context - 1);  // its own token is read too
  CHECK(steps.seconds(Layout::kTp, one) == Approx((48 * layer + model.lm_head.bytes) / 1e12));
  CHECK(steps.seconds(Layout::kEp, one) == Approx(steps.seconds(Layout::kTp, one)));
  c.launch_s = 1e-6;
  const StepModel launched(model, c, 1, 0, routing);
  CHECK(launched.step(Layout::kTp, one).launches == Approx((48 * 10 + 6) * 1e-6));
  // Operations instead: two for each weight that a row takes, and for each pair that it attends to.
  c.memory_bandwidth = 1e30, c.matrix_flops = 1e12, c.launch_s = 0;
  const StepModel computing(model, c, 1, 0, routing);
  const double products = 48 * (model.heads.products + model.keys.products + model.router.products + 8 * model.expert.products + context * 2 * 4096) +
                          model.lm_head.products;
  CHECK(computing.seconds(Layout::kTp, one) == Approx(2 * products / 1e12));
}

TEST_CASE("even work: homes hold all requests, the fullest one more at most") {
  const Model model = read_model("qwen3-30b-a3b");
  const Cluster c = read_cluster("8xh200");
  const Routing routing(128, 8, 8, 0);
  const StepModel steps(model, c, 8, 0, routing);
  for (double n : {1.0, 7.0, 8.0, 9.0, 1000.0}) {
    double rows = 0, most = 0;
    for (const Work& w : steps.decode(n, 50)) rows += w.rows, most = std::max(most, w.rows);
    CHECK((rows == n && most == std::ceil(n / 8)));
  }
}

TEST_CASE("TP is faster for few requests, EP for many, and the crossover lies where they are equal") {
  for (const char* name : {"qwen3-30b-a3b", "qwen3-235b-a22b"}) {
    const Prediction p(read_model(name), read_cluster("8xh200"), {}, kDefaultSkew);
    const Crossover c = crossover_of(p.steps(), 1024, 4096);
    REQUIRE((c.first == Layout::kTp && c.at.has_value()));
    const auto ratio = [&](double n) { return p.tokens_per_second(Layout::kEp, n, 1024) / p.tokens_per_second(Layout::kTp, n, 1024); };
    CHECK(ratio(1) < 1);
    CHECK(ratio(2048) > 1);
    CHECK(ratio(*c.at) == Approx(1).margin(0.05));
    for (double most : {*c.at, *c.at + 1, 1.3 * *c.at}) CHECK(crossover_of(p.steps(), 1024, most).at.value_or(0) == Approx(*c.at).epsilon(0.05));
    CHECK_FALSE(crossover_of(p.steps(), 1024, std::floor(0.9 * *c.at)).at);
  }
}

TEST_CASE("a load in simulated time: every token comes, twice the same, and hindsight is never dearer") {
  const Prediction p(read_model("qwen3-235b-a22b"), read_cluster("8xh200"), {}, kDefaultSkew);
  std::vector<int64_t> answers;
  int64_t tokens = 0;
  for (int i = 0; i < 600; ++i) answers.push_back(i % 20 == 0 ? 2500 : 20 + i % 50);
  for (int64_t a : answers) tokens += a;
  const Load load = load_of_answers(answers);
  double seconds[2] = {};
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    const SimulatedRun r = simulate(p.placement(), p.steps(), p.switches(), load, policy(PolicyKind::kManual), layout);
    CHECK((r.tokens == tokens && r.switches == 0 && r.preemptions == 0));
    CHECK(r.hindsight_s <= r.seconds * (1 + 1e-9));
    seconds[static_cast<size_t>(layout)] = r.seconds;
  }
  const SimulatedRun a = simulate(p.placement(), p.steps(), p.switches(), load, policy(PolicyKind::kMeasured), Layout::kEp);
  const SimulatedRun b = simulate(p.placement(), p.steps(), p.switches(), load, policy(PolicyKind::kMeasured), Layout::kEp);
  CHECK((a.tokens == tokens && a.seconds == b.seconds && a.switches == b.switches));
  CHECK(a.hindsight_s <= a.seconds * (1 + 1e-9));
  // Many requests, then a long tail of few.
  CHECK(a.switches >= 1);
  CHECK(a.seconds < 1.05 * std::min(seconds[0], seconds[1]));
  CHECK(!a.decisions.empty());
}

// Long contexts of few requests are what calibration has to know of the layout that is not used.
TEST_CASE("measured finds the tail of a rollout: faster than either layout, within 2 % of the best schedule in hindsight") {
  const Prediction p(read_model("qwen3-30b-a3b"), read_cluster("8xh200"), {}, kDefaultSkew);
  Workload tail;
  tail.load.arrivals = moebius_examples::Arrivals::kOnce;
  tail.load.prompts = 600;
  tail.load.samples = 1;
  tail.load.prompt = {64, 256, 0.5};
  tail.load.answer = {512, 16384, 1.5};
  const Load load = load_of(tail, 1);
  const auto seconds = [&](Layout l) { return simulate(p.placement(), p.steps(), p.switches(), load, policy(PolicyKind::kManual), l).seconds; };
  const SimulatedRun r = simulate(p.placement(), p.steps(), p.switches(), load, policy(PolicyKind::kMeasured), Layout::kTp);
  CHECK(r.seconds < 0.98 * std::min(seconds(Layout::kTp), seconds(Layout::kEp)));
  CHECK(r.seconds < 1.02 * r.hindsight_s);
}

TEST_CASE("a switch in simulated time takes what its bytes take, whatever moves") {
  const Prediction p(read_model("qwen3-30b-a3b"), read_cluster("8xa100"), {}, 0);
  PolicyConfig threshold = policy(PolicyKind::kThreshold);
  threshold.variant = ThresholdVariant::kRollout;  // below 8·P running + waiting to TP, above to EP
  const SimulatedRun r =
      simulate(p.placement(), p.steps(), p.switches(), load_of_answers(std::vector<int64_t>(100, 50), 400), threshold, Layout::kTp);
  REQUIRE(r.switches == 1);
  // No KV yet, or that of 100 requests at most.
  CHECK(r.switch_s >= p.switches().seconds(Layout::kEp, 0) * (1 - 1e-9));
  CHECK(r.switch_s <= p.switches().seconds(Layout::kEp, 100 * 512));
}

TEST_CASE("a request that no rank holds is refused before anything is simulated") {
  Settings settings;
  settings.memory_bytes = place(read_model("qwen3-30b-a3b"), read_cluster("8xa100"), {}).least_memory_bytes + (100 << 20);
  const Prediction p(read_model("qwen3-30b-a3b"), read_cluster("8xa100"), settings, 0);
  REQUIRE(p.placement().fits);
  CHECK_THROWS_WITH(simulate(p.placement(), p.steps(), p.switches(), load_of_answers({1000000}), policy(PolicyKind::kManual), Layout::kTp),
                    Catch::Contains("1000100 tokens"));
}

}  // namespace moebius::plan
