#include "lib/runtime/policy.h"

#include <sstream>

#include "lib/base/error.h"
#include "lib/runtime/engine.h"
#include "lib/runtime/metrics.h"
#include "tests/catch.h"

namespace moebius {
namespace {

// Feeds a policy steps of the same load, a second apart.
struct Feeder {
  explicit Feeder(PolicyConfig c, int ranks = 2) : policy(make_policy(c, ranks)) {}
  std::optional<Decision> step(int running, int waiting = 0, int prefill = 0) {
    LoadSample s;
    s.step = steps++;
    s.time_s = time_s;
    time_s += seconds_per_step;
    s.running = running;
    s.waiting = waiting;
    s.prefill_tokens = prefill;
    s.layout = layout;
    return policy->observe(s);
  }
  // Steps until a decision, at most n.
  int steps_to_decide(int n, int running, int waiting = 0, int prefill = 0) {
    for (int i = 1; i <= n; ++i)
      if (const auto d = step(running, waiting, prefill)) {
        last = *d;
        return i;
      }
    return -1;
  }
  std::unique_ptr<Policy> policy;
  Layout layout = Layout::kTp;
  uint64_t steps = 0;
  double time_s = 1000, seconds_per_step = 0.01;
  Decision last;
};

PolicyConfig threshold(ThresholdVariant v) {
  PolicyConfig c;
  c.kind = PolicyKind::kThreshold;
  c.variant = v;
  return c;
}

}  // namespace

TEST_CASE("manual never decides") {
  Feeder f(PolicyConfig{});
  CHECK(f.steps_to_decide(100, 100000, 100000, 100000) == -1);
}

TEST_CASE("the decode variant switches at 64 running requests a rank, over 32 steps") {
  Feeder f(threshold(ThresholdVariant::kDecode));
  CHECK(f.steps_to_decide(200, 127) == -1);
  Feeder g(threshold(ThresholdVariant::kDecode));
  CHECK(g.steps_to_decide(200, 128) == 32);
  CHECK(g.last.to == Layout::kEp);
  CHECK_THAT(g.last.record, Catch::Contains("128.0") && Catch::Contains("32 steps"));
}

TEST_CASE("the prefill and rollout variants count prompt tokens, and running with waiting requests") {
  Feeder prefill(threshold(ThresholdVariant::kPrefill));
  CHECK(prefill.steps_to_decide(50, 1, 0, 2048) == 8);
  Feeder rollout(threshold(ThresholdVariant::kRollout));
  CHECK(rollout.steps_to_decide(50, 8, 7) == -1);
  CHECK(rollout.steps_to_decide(1, 8, 8) == 1);
}

TEST_CASE("after a switch nothing is asked for until the cooldown has passed") {
  PolicyConfig c = threshold(ThresholdVariant::kRollout);
  c.window_steps = 4;
  Feeder f(c);
  f.seconds_per_step = 1;
  REQUIRE(f.steps_to_decide(10, 100) == 4);
  f.policy->on_switched(f.time_s);
  f.layout = Layout::kEp;
  const int steps = f.steps_to_decide(100, 0);
  CHECK(steps >= 5);  // five seconds
  CHECK(f.last.to == Layout::kTp);
}

TEST_CASE("after a failure the same switch is not asked for until the load has moved or 256 steps have passed; no cooldown is spent") {
  Feeder f(threshold(ThresholdVariant::kRollout));  // threshold 16, a window of one step
  REQUIRE(f.steps_to_decide(1, 100) == 1);
  f.policy->on_failed(Layout::kEp, "12 tokens short");
  CHECK(f.steps_to_decide(10, 100) == -1);
  CHECK(f.steps_to_decide(10, 103) == -1);
  REQUIRE(f.steps_to_decide(1, 104) == 1);  // a quarter of the threshold more, long before the cooldown's end
  CHECK_THAT(f.last.record, Catch::Contains("12 tokens short") && Catch::Contains("mean 100.0"));
  f.policy->on_failed(Layout::kEp, "12 tokens short");
  CHECK(f.steps_to_decide(1000, 104) == 256);
  f.policy->on_failed(Layout::kTp, "the other way");  // does not hold this one
  CHECK(f.steps_to_decide(1, 104) == 1);
}

TEST_CASE("in shadow a policy records each change of mind once") {
  PolicyConfig c = threshold(ThresholdVariant::kRollout);
  c.shadow = true;
  Feeder f(c);
  const auto d = f.step(100);
  REQUIRE(d);
  CHECK(d->shadow);
  for (int i = 0; i < 20; ++i) CHECK_FALSE(f.step(100));
  CHECK_FALSE(f.step(0));
  CHECK(f.step(100));
}

TEST_CASE("bad policies are refused") {
  PolicyConfig c = threshold(ThresholdVariant::kDecode);
  c.threshold = -1;
  CHECK_THROWS_AS(make_policy(c, 2), Error);
  c = threshold(static_cast<ThresholdVariant>(9));
  CHECK_THROWS_AS(make_policy(c, 2), Error);
}

TEST_CASE("metrics are well-formed Prometheus text") {
  Metrics m;
  m.on_step(17);
  m.on_first_token(0.03);
  m.on_inter_token(1e9);
  m.on_switch(Layout::kTp, Layout::kEp, 0.02, 1 << 20);
  RequestTimes times;
  times.submitted = times.first_scheduled = times.first_token = std::chrono::steady_clock::now();
  times.finished = times.submitted + std::chrono::seconds(2);
  m.on_request_finished(times, 100, 20, 30, FinishReason::kStop);
  EngineStats stats;
  stats.running = 3;
  stats.seam = 2;
  stats.num_layers = 4;
  m.set_gauges(stats);
  std::istringstream text(m.text("a \"quoted\\ model\"\n"));
  std::string line, histogram;
  double last_bucket = 0;
  int samples = 0;
  while (std::getline(text, line)) {
    if (line.rfind("# ", 0) == 0) {
      CHECK((line.rfind("# HELP moebius_", 0) == 0 || line.rfind("# TYPE moebius_", 0) == 0));
      continue;
    }
    const size_t open = line.find('{'), close = line.rfind('}');
    REQUIRE(open != std::string::npos);
    REQUIRE(close != std::string::npos);
    CHECK(line.rfind("moebius_", 0) == 0);
    CHECK_THAT(line, Catch::Contains("model_name=\"a \\\"quoted\\\\ model\\\"\\n\""));
    char* end = nullptr;
    const double value = std::strtod(line.c_str() + close + 1, &end);
    CHECK(*end == '\0');
    const std::string name = line.substr(0, open);
    if (name.size() > 7 && name.substr(name.size() - 7) == "_bucket") {  // cumulative
      if (name != histogram) last_bucket = 0;
      histogram = name;
      CHECK(value >= last_bucket);
      last_bucket = value;
    }
    ++samples;
  }
  CHECK(samples > 100);
  const std::string all = m.text("m");
  for (const char* expected : {"moebius_num_requests_running{model_name=\"m\",engine=\"0\"} 3\n", "moebius_seam_position", "finished_reason=\"stop\"} 1\n",
                               "moebius_switches_total{model_name=\"m\",engine=\"0\",from=\"tp\",to=\"ep\"} 1\n", "moebius_switch_bytes_total",
                               "moebius_inter_token_latency_seconds_bucket{model_name=\"m\",engine=\"0\",le=\"+Inf\"} 1\n", "layout=\"ep\"} 1\n"})
    CHECK_THAT(all, Catch::Contains(expected));
}

}  // namespace moebius
