#include "lib/runtime/policy.h"

#include <map>
#include <sstream>

#include "lib/base/error.h"
#include "lib/runtime/engine.h"
#include "lib/runtime/metrics.h"
#include "tests/catch.h"

namespace moebius {
namespace {

// Feeds a policy steps of the same load, a second apart.
struct Feeder {
  explicit Feeder(PolicyConfig c, PolicyLimits limits = {2, 512}) : policy(make_policy(c, limits)) {}
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
  Feeder f({PolicyKind::kManual});
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

TEST_CASE("a threshold that no load can reach is refused with the limit that keeps it away") {
  CHECK_THROWS_WITH(make_policy(threshold(ThresholdVariant::kDecode), {2, 127}),
                    Catch::Contains("threshold of 128 running requests can never be reached, max_batch is 127"));
  make_policy(threshold(ThresholdVariant::kDecode), {2, 128});
  PolicyConfig rollout = threshold(ThresholdVariant::kRollout);
  rollout.threshold = 101;
  CHECK_THROWS_WITH(make_policy(rollout, {2, 60, 40}), Catch::Contains("max_batch is 60 and max_queue 40"));
  make_policy(rollout, {2, 60, 41});
}

TEST_CASE("a reason that is too long is cut between characters") {
  using Text = FixedText<8>;
  CHECK(Text("12345678").str() == "12345678");
  CHECK(Text("123456789").str() == "12345678");
  CHECK(Text("1234567→").str() == "1234567");
  CHECK(Text("123456→").str() == "123456");
  CHECK(Text::of("{}→{}", 123456, 7).str() == "123456");
  CHECK(Text::of("{}→{}", 1234, 7).str() == "1234→7");
  Text copy = Text("a→b");
  copy = Text(copy);
  CHECK(copy == "a→b");
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
  CHECK_THROWS_AS(make_policy(c, PolicyLimits{2}), Error);
  c = threshold(static_cast<ThresholdVariant>(9));
  CHECK_THROWS_AS(make_policy(c, PolicyLimits{2}), Error);
}

TEST_CASE("every metric has its name and type, and every histogram its buckets") {
  Metrics m;
  m.on_switch(Layout::kTp, Layout::kTp, 0.02);  // turned round
  m.on_corrupted();
  m.on_rejection();
  m.on_exchange(100, 7);
  m.on_expert_load(3, 1.5);
  m.on_samples_finished(2, 40);
  MetricsInfo info{"m", 16, 40, 38, true, 2.5};
  const std::string text = m.text(info);
  const std::map<std::string, std::string> expected = {
      {"num_requests_running", "gauge"}, {"num_requests_waiting", "gauge"}, {"kv_cache_usage_perc", "gauge"}, {"cache_config_info", "gauge"},
      {"load_seconds", "gauge"}, {"engine_failed", "gauge"}, {"expert_load_imbalance", "gauge"}, {"seam_position", "gauge"}, {"parallel_mode", "gauge"},
      {"num_preemptions_total", "counter"}, {"prompt_tokens_total", "counter"}, {"generation_tokens_total", "counter"},
      {"prefix_cache_queries_total", "counter"}, {"prefix_cache_hits_total", "counter"}, {"request_success_total", "counter"},
      {"corrupted_requests_total", "counter"}, {"admission_rejections_total", "counter"}, {"all_reduce_bytes_total", "counter"},
      {"all_to_all_bytes_total", "counter"}, {"mode_switches_total", "counter"}, {"switch_bytes_total", "counter"},
      {"switch_rollbacks_total", "counter"}, {"switch_refusals_total", "counter"}, {"iteration_tokens_total", "histogram"},
      {"time_to_first_token_seconds", "histogram"}, {"inter_token_latency_seconds", "histogram"}, {"e2e_request_latency_seconds", "histogram"},
      {"request_queue_time_seconds", "histogram"}, {"request_prefill_time_seconds", "histogram"}, {"request_decode_time_seconds", "histogram"},
      {"request_inference_time_seconds", "histogram"}, {"mode_switch_seconds", "histogram"}, {"request_prompt_tokens", "histogram"},
      {"request_generation_tokens", "histogram"}, {"request_max_num_generation_tokens", "histogram"},
      {"request_params_max_tokens", "histogram"}, {"request_params_n", "histogram"}};
  std::map<std::string, std::string> types, buckets;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string hash, kind, name, type;
    words >> hash >> kind >> name >> type;
    if (kind == "TYPE") types[name.substr(8)] = type;
    if (const size_t at = line.find("_bucket{"), le = line.find("le=\""); at != std::string::npos)
      buckets[line.substr(8, at - 8)] += line.substr(le + 4, line.find('"', le + 4) - le - 4) + " ";
  }
  CHECK(types == expected);
  const std::string seconds = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680 +Inf ";
  for (const char* name : {"e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
                           "request_inference_time_seconds"})
    CHECK(buckets[name] == seconds);
  const std::string decades = "1 2 5 10 20 50 100 200 500 1000 2000 5000 10000 20000 50000 100000 200000 500000 +Inf ";
  for (const char* name : {"request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens", "request_params_max_tokens"})
    CHECK(buckets[name] == decades);
  CHECK(buckets["request_params_n"] == "1 2 5 10 20 +Inf ");
  CHECK(buckets["iteration_tokens_total"] == "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 +Inf ");
  CHECK(buckets["time_to_first_token_seconds"] ==
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560 +Inf ");
  CHECK(buckets["inter_token_latency_seconds"] == "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80 +Inf ");
  const std::string l = "{model_name=\"m\",engine=\"0\"";
  for (const std::string& line :
       {"mode_switches_total" + l + ",from=\"tp\",to=\"tp\"} 1", "mode_switches_total" + l + ",from=\"ep\",to=\"tp\"} 0",
        "corrupted_requests_total" + l + "} 1", "admission_rejections_total" + l + "} 1", "all_reduce_bytes_total" + l + "} 100",
        "all_to_all_bytes_total" + l + "} 7", "expert_load_imbalance" + l + ",layer=\"3\"} 1.5", "load_seconds" + l + "} 2.5",
        "cache_config_info" + l + ",block_size=\"16\",num_tp_blocks=\"40\",num_ep_blocks=\"38\",enable_prefix_caching=\"true\"} 1",
        "request_params_n_count" + l + "} 1", "request_max_num_generation_tokens_sum" + l + "} 40"})
    CHECK_THAT(text, Catch::Contains("moebius_" + line + "\n"));
}

TEST_CASE("what a policy's decisions rest on is shown while it rests on costs; a layout never seen has no step there") {
  Metrics m;
  PolicyFigures figures;
  figures.step[0] = {0.008, 0.03};
  figures.regret_s = 0.06;
  figures.price_s = 0.09;
  figures.budget_s = 0.5;
  m.set_policy(&figures);
  const std::string text = m.text({"m"}), l = "{model_name=\"m\",engine=\"0\"";
  for (const std::string& line : {"step_seconds" + l + ",mode=\"tp\"} 0.008", "step_error" + l + ",mode=\"tp\"} 0.03", "regret_seconds" + l + "} 0.06",
                                  "price_seconds" + l + "} 0.09", "budget_seconds" + l + "} 0.5"})
    CHECK_THAT(text, Catch::Contains("moebius_policy_" + line + "\n"));
  CHECK_THAT(text, !Catch::Contains("policy_step_seconds" + l + ",mode=\"ep\"}"));
  m.set_policy(nullptr);
  CHECK_THAT(m.text({"m"}), !Catch::Contains("moebius_policy_"));
}

TEST_CASE("metrics are well-formed Prometheus text") {
  Metrics m;
  PolicyFigures figures;
  figures.step[0] = figures.step[1] = {0.01, 0.1};
  m.set_policy(&figures);
  m.on_step(17);
  m.on_first_token(0.03);
  m.on_inter_token(1e9);
  m.on_switch(Layout::kTp, Layout::kEp, 0.02);
  m.on_bytes_moved(1 << 20);
  RequestTimes times;
  times.submitted = times.first_scheduled = times.first_token = std::chrono::steady_clock::now();
  times.finished = times.submitted + std::chrono::seconds(2);
  m.on_request_finished(times, 100, 20, 30, FinishReason::kStop);
  EngineStats stats;
  stats.running = 3;
  stats.seam = 2;
  stats.num_layers = 4;
  m.set_gauges(stats);
  std::istringstream text(m.text({"a \"quoted\\ model\"\n"}));
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
  const std::string all = m.text({"m"});
  for (const char* expected : {"moebius_num_requests_running{model_name=\"m\",engine=\"0\"} 3\n", "moebius_seam_position", "finished_reason=\"stop\"} 1\n",
                               "moebius_mode_switches_total{model_name=\"m\",engine=\"0\",from=\"tp\",to=\"ep\"} 1\n", "moebius_switch_bytes_total",
                               "moebius_inter_token_latency_seconds_bucket{model_name=\"m\",engine=\"0\",le=\"+Inf\"} 1\n", "mode=\"ep\"} 1\n"})
    CHECK_THAT(all, Catch::Contains(expected));
}

}  // namespace moebius
