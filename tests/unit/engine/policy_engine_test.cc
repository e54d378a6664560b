// Policies and wishes on a real engine: each becomes a switch, a refusal or a record, and none changes a bit.
#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include <sys/stat.h>
#include <unistd.h>

#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

// Six requests that end one after another: 6 running at first, 1 at the end.
Script decaying() {
  Script s;
  for (int i = 0; i < 6; ++i) s.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(60 + i, 12), 8 + 6 * i)});
  return s;
}

PolicyConfig rollout(double threshold) {
  PolicyConfig p;
  p.kind = PolicyKind::kThreshold;
  p.variant = ThresholdVariant::kRollout;
  p.threshold = threshold;
  p.window_steps = 1;
  p.cooldown_s = 0;
  return p;
}

std::vector<Event> events_of(const Outcome& o, EventType type) {
  std::vector<Event> out;
  for (const Event& e : o.events)
    if (e.type == type) out.push_back(e);
  return out;
}

void drain(Engine& engine, Outcome& into) {
  std::vector<Event> events(256);
  for (size_t n; (n = engine.poll(events, 0)) > 0;) into.events.insert(into.events.end(), events.begin(), events.begin() + static_cast<long>(n));
}

// Three requests of six pages: TP's 20 pages hold them, EP's two homes of 10 do not. Some 50 steps of decoding.
EngineConfig tight_config() {
  EngineConfig c = small_config(2, 1, Layout::kTp);
  c.page_tokens = 64;
  c.kv_tokens = 20 * 64;
  c.chunk_tokens = 512;
  return c;
}
std::vector<uint64_t> submit_tight(Engine& engine) {
  std::vector<uint64_t> ids;
  for (int i = 0; i < 3; ++i) ids.push_back(engine.submit(greedy_request("t" + std::to_string(i), prompt_of(80 + i, 330), 50)));
  return ids;
}

}  // namespace

TEST_CASE("a threshold policy goes to EP under load and back when it has gone, and says by which numbers") {
  const Script script = decaying();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.policy = rollout(4);
  const Outcome got = run_script(kQwen, config, script);
  CHECK(difference(expected, got) == "");
  const std::vector<Event> decisions = events_of(got, EventType::kDecision), switches = events_of(got, EventType::kSwitchFinished);
  REQUIRE(decisions.size() == 2);
  REQUIRE(switches.size() == 2);
  CHECK(decisions[0].to == Layout::kEp);
  CHECK_THAT(decisions[0].reason, Catch::Contains("rollout") && Catch::Contains("mean 6.0") && Catch::Contains("≥ 4.0") && Catch::Contains("waiting 6"));
  CHECK(switches[0].to == Layout::kEp);
  CHECK(decisions[1].to == Layout::kTp);
  CHECK_THAT(decisions[1].reason, Catch::Contains("mean 3.0") && Catch::Contains("< 4.0"));
  CHECK(switches[1].to == Layout::kTp);
}

// With the thresholds and windows that the variants have by themselves: 2 ranks, 512 prompt tokens and 128 requests a step.
TEST_CASE("each variant switches to EP under the load that it is for, and back") {
  const auto variant = GENERATE(ThresholdVariant::kDecode, ThresholdVariant::kPrefill, ThresholdVariant::kRollout);
  if (kSanitized && variant != ThresholdVariant::kPrefill) return;  // a minute
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.kv_tokens = 8192;
  config.chunk_tokens = 512;
  config.max_batch = 128;
  config.policy.kind = PolicyKind::kThreshold;
  config.policy.variant = variant;
  config.policy.cooldown_s = 0;
  Engine engine(kQwen, config);
  const bool prefill = variant == ThresholdVariant::kPrefill;
  // 64 prompts of 100 tokens that end at once, or 128 short ones that decode for a while.
  for (int i = 0; i < (prefill ? 64 : 128); ++i)
    engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, prefill ? 100 : 3), prefill ? 1 : 40));
  int32_t least_seam = engine.model().num_layers;
  for (int i = 0; i < 100; ++i) {
    engine.step();
    least_seam = std::min(least_seam, engine.stats().seam);
  }
  INFO("variant " << static_cast<int>(variant));
  CHECK(engine.stats().running == 0);
  CHECK(least_seam == 0);
  CHECK(engine.stats().switches == 2);
  CHECK(engine.stats().seam == engine.model().num_layers);
}

TEST_CASE("a policy whose threshold max_batch keeps out of reach is refused when the engine is made and when it is set") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  Engine engine(kQwen, config);
  config.policy.kind = PolicyKind::kThreshold;
  CHECK_THROWS_WITH(engine.set_policy(config.policy), Catch::Contains("128") && Catch::Contains("max_batch is 64"));
  CHECK_THROWS_WITH(Engine(kQwen, config), Catch::Contains("max_batch is 64"));
}

TEST_CASE("while the own thread is idle a policy still sees the load fall, and one that is set is taken up") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.policy = rollout(4);
  config.policy.variant = ThresholdVariant::kDecode;
  config.policy.window_steps = 8;
  Engine engine(kQwen, config);
  const auto seam_after = [&](uint64_t switches) {
    for (int i = 0; i < 2000 && engine.stats().switches < switches; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return engine.stats().switches == switches ? engine.stats().seam : -1;
  };
  for (int i = 0; i < 6; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 10), 40));  // they end together
  engine.start();
  CHECK(seam_after(2) == engine.model().num_layers);
  CHECK(engine.stats().running == 0);
  engine.set_policy({PolicyKind::kManual});
  engine.request_switch(Layout::kEp);
  CHECK(seam_after(3) == 0);
  engine.set_policy(config.policy);
  CHECK(seam_after(4) == engine.model().num_layers);
  engine.stop();
}

TEST_CASE("a switch that the host asked for and that failed is not the policy's") {
  EngineConfig config = tight_config();
  Engine engine(kQwen, config);
  submit_tight(engine);
  for (int i = 0; i < 4; ++i) engine.step();
  REQUIRE(engine.stats().running == 3);
  PolicyConfig policy = rollout(2);
  policy.window_steps = 4;
  engine.set_policy(policy);
  engine.request_switch(Layout::kEp);
  for (int i = 0; i < 4; ++i) engine.step();
  CHECK(engine.stats().refusals == 2);
  Outcome out;
  drain(engine, out);
  const std::vector<Event> decisions = events_of(out, EventType::kDecision);
  REQUIRE(decisions.size() == 1);
  CHECK_THAT(decisions[0].reason, !Catch::Contains("which failed"));
}

TEST_CASE("switches due at one step happen in order, each with its events") {
  const auto types = [](const EngineConfig& config, const std::vector<int32_t>& seams) {
    Engine engine(kQwen, config);
    engine.submit(greedy_request("a", prompt_of(1, 40), 40));
    for (int i = 0; i < 3; ++i) engine.step();
    for (int32_t s : seams) engine.hold_seam(s);
    for (int i = 0; i < 30; ++i) engine.step();
    Outcome out;
    drain(engine, out);
    std::string text;
    for (const Event& e : out.events) {
      if (e.type == EventType::kSwitchStarted) text += e.reason.empty() ? "start " : "turn ";
      if (e.type == EventType::kSwitchFinished) text += fmt::format("{} ", e.seam);
    }
    return text;
  };
  for (int ranks : {1, 2}) CHECK(types(small_config(ranks, 1, Layout::kTp), {0, 4, 0}) == "start 0 start 4 start 0 ");
  EngineConfig slow = small_config(2, 1, Layout::kTp);
  slow.stall_budget_ms = 1e-6;
  CHECK(types(slow, {0, 4}) == "start turn 4 ");  // turned where it stands: nothing had moved
  CHECK(types(slow, {0, 2}) == "start turn 2 ");
}

TEST_CASE("more than 65,536 switches at one step are refused", "[long]") {
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  for (int i = 0; i < 65536; ++i) engine.request_switch(i < 100 && i % 2 == 0 ? Layout::kEp : Layout::kTp);
  CHECK_THROWS_WITH(engine.request_switch(Layout::kTp), Catch::Contains("65536"));
  engine.step();
  CHECK(engine.stats().switches == 100);
  engine.request_switch(Layout::kTp);
}

TEST_CASE("a policy in shadow records and moves nothing") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.policy = rollout(4);
  config.policy.shadow = true;
  const Outcome got = run_script(kQwen, config, decaying());
  CHECK(got.count(EventType::kDecision) == 1);
  CHECK(got.count(EventType::kSwitchStarted) == 0);
}

TEST_CASE("a policy can be set while requests run") {
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  engine.submit(greedy_request("a", prompt_of(1, 10), 30));
  for (int i = 0; i < 5; ++i) engine.step();
  CHECK(engine.stats().switches == 0);
  engine.set_policy(rollout(1));
  engine.step();
  CHECK(engine.stats().switches == 1);
  CHECK(engine.stats().seam == 0);
  engine.set_policy({PolicyKind::kManual});
  for (int i = 0; i < 5; ++i) engine.step();
  CHECK(engine.stats().switches == 1);
  PolicyConfig bad;
  bad.threshold = -1;
  CHECK_THROWS_AS(engine.set_policy(bad), Error);
}

TEST_CASE("a refused switch is not asked for at every step, and spends no cooldown") {
  EngineConfig config = tight_config();
  config.policy = rollout(2);
  config.policy.cooldown_s = 1000;
  Engine engine(kQwen, config);
  const std::vector<uint64_t> ids = submit_tight(engine);
  engine.set_policy({PolicyKind::kManual});  // all three run first
  for (int i = 0; i < 4; ++i) engine.step();
  REQUIRE(engine.stats().running == 3);
  engine.set_policy(config.policy);
  for (int i = 0; i < 20; ++i) engine.step();
  CHECK(engine.stats().refusals == 1);
  CHECK(engine.stats().switches == 0);
  engine.cancel(ids[0]);  // 3 → 2 is more than a quarter of the threshold: asked again, and now it fits
  engine.step();
  CHECK(engine.stats().switches == 1);
  Outcome out;
  drain(engine, out);
  const std::vector<Event> decisions = events_of(out, EventType::kDecision);
  REQUIRE(decisions.size() == 2);
  CHECK_THAT(decisions[1].reason, Catch::Contains("tokens short"));
}

TEST_CASE("a seam that is held inside is no switch and starts no cooldown, nor does asking for the present layout") {
  for (int ranks : {1, 2}) {
    EngineConfig config = small_config(ranks, 1, Layout::kTp);
    config.policy = rollout(4);
    config.policy.cooldown_s = 1000;
    Engine engine(kQwen, config);
    for (int i = 0; i < 3; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 10), 60));
    for (int32_t seam : {4, 2}) {
      engine.hold_seam(seam);
      engine.step();
    }
    CHECK(engine.stats().seam == 2);
    CHECK(engine.stats().switches == 0);
    CHECK((engine.stats().bytes_moved > 0) == (ranks > 1));
    for (int i = 0; i < 3; ++i) engine.submit(greedy_request("s" + std::to_string(i), prompt_of(i, 10), 60));
    engine.step();
    CHECK(engine.stats().seam == 0);
    CHECK(engine.stats().switches == 1);
  }
}

TEST_CASE("a switch that does not fit preempts the last request whose going helps, not a later one that fits") {
  EngineConfig config = tight_config();
  config.preempt_to_fit = true;
  Engine engine(kQwen, config);
  const std::vector<uint64_t> ids = submit_tight(engine);
  engine.submit(greedy_request("short", prompt_of(90, 20), 60));
  for (int i = 0; i < 4; ++i) engine.step();
  REQUIRE(engine.stats().running == 4);
  engine.request_switch(Layout::kEp);
  engine.step();
  CHECK(engine.stats().seam == 0);
  Outcome out;
  drain(engine, out);
  const std::vector<Event> preempted = events_of(out, EventType::kPreempted);
  REQUIRE(preempted.size() == 1);
  CHECK(preempted[0].request == ids[2]);
}

TEST_CASE("a switch says what its phases moved and took; one that was rolled back counts too") {
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  for (int i = 0; i < 3; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 40), 60));
  for (int i = 0; i < 5; ++i) engine.step();
  engine.impl().switcher().hook = [](const CopyPoint& p) {
    if (!p.undoing && p.starts_rank() && p.item == 1 && p.rank == 1) fail(Code::kInternal, "a fault");
  };
  engine.request_switch(Layout::kEp);
  engine.step();
  engine.impl().switcher().hook = nullptr;
  Outcome out;
  drain(engine, out);
  const std::vector<Event> undone = events_of(out, EventType::kRolledBack);
  REQUIRE(undone.size() == 1);
  CHECK(undone[0].bytes > 0);
  CHECK(engine.stats().bytes_moved == undone[0].bytes);
  CHECK(engine.stats().switch_seconds == undone[0].seconds);
  CHECK_THAT(engine.metrics_text(), Catch::Contains(fmt::format("switch_bytes_total{{model_name=\"tiny-qwen3-moe\",engine=\"0\"}} {}\n", undone[0].bytes)));
  engine.request_switch(Layout::kEp);
  engine.step();
  drain(engine, out);
  const std::vector<Event> finished = events_of(out, EventType::kSwitchFinished);
  REQUIRE(finished.size() == 1);
  const Switcher::Part &weights = engine.impl().switcher().weights_part(), &kv = engine.impl().switcher().kv_part();
  CHECK(weights.bytes + kv.bytes == finished[0].bytes);
  CHECK_THAT(finished[0].reason, Catch::Contains(fmt::format("weights {:.3f} MiB ", static_cast<double>(weights.bytes) / (1 << 20))) &&
                                     Catch::Contains(fmt::format("KV {:.3f} MiB ", static_cast<double>(kv.bytes) / (1 << 20))));
}

TEST_CASE("a switch that was rolled back is not tried again at every step") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.policy = rollout(2);
  Engine engine(kQwen, config);
  engine.impl().switcher().hook = [](const CopyPoint& p) {
    if (!p.undoing && p.starts_rank() && p.item == 1 && p.rank == 1) fail(Code::kInternal, "a fault");
  };
  for (int i = 0; i < 3; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 10), 60 + 20 * i));
  for (int i = 0; i < 50; ++i) engine.step();
  CHECK(engine.stats().rollbacks == 1);
  engine.impl().switcher().hook = nullptr;
  for (int i = 0; i < 20; ++i) engine.step();  // one has finished: the load has moved
  CHECK(engine.stats().switches == 1);
}

// ---- the policy measured: what it decides is tested on simulated machines (runtime/measured_policy_test.cc)

namespace {

PolicyConfig measured(double explore) {
  PolicyConfig p;
  p.kind = PolicyKind::kMeasured;
  p.explore = explore;
  return p;
}

// As if steps of up to eight rows, of so many tokens each, had taken so long in this layout, and a switch to it next to nothing: what it saves
// shall pay within a script's few steps however fast the machine is.
void teach(Engine& engine, Layout layout, double seconds, double context = 20) {
  const double now = std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
  for (int i = 0; i < 400; ++i) engine.impl().costs().on_step(layout, StepLoads::decode(1 + i % 8, context * (1 + i % 8), 2), seconds, now);
  engine.impl().costs().on_switch(layout, 0, 1e-6);
}

void run(Engine& engine, int steps) {
  for (int i = 0; i < steps; ++i) engine.step();
}

void submit_four(Engine& engine, int max_tokens) {
  for (int i = 0; i < 4; ++i) engine.submit(greedy_request("m" + std::to_string(i), prompt_of(40 + i, 12), max_tokens));
}

struct TempFile {
  std::filesystem::path path = std::filesystem::temp_directory_path() / fmt::format("moebius-costs-{}", getpid());
  ~TempFile() { std::filesystem::remove(path); }
};

}  // namespace

TEST_CASE("costs of both layouts and of switches are learned from what is run, whatever the policy, and measured shows them") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.stall_budget_ms = GENERATE(0.0, 1e-6);
  Engine engine(kQwen, config);
  submit_four(engine, 150);
  run(engine, 30);
  const CostModel& costs = engine.impl().costs();
  CHECK(costs.curve(Layout::kTp).seen());
  CHECK_FALSE(costs.curve(Layout::kEp).seen());
  CHECK_THAT(engine.metrics_text(), !Catch::Contains("policy_step_seconds"));
  engine.request_switch(Layout::kEp);
  for (int i = 0; i < 60 && engine.stats().seam != 0; ++i) engine.step();
  run(engine, 10);
  CHECK(costs.curve(Layout::kEp).seen());
  CHECK(of(costs.corrections(), Layout::kEp) > 0);
  CHECK(of(costs.corrections(), Layout::kTp) == 0);
  engine.set_policy(measured(0));
  run(engine, 2);
  const std::string text = engine.metrics_text();
  for (const char* line : {"moebius_policy_step_seconds{model_name=\"tiny-qwen3-moe\",engine=\"0\",mode=\"tp\"} ",
                           "moebius_policy_step_seconds{model_name=\"tiny-qwen3-moe\",engine=\"0\",mode=\"ep\"} ", "moebius_policy_step_error{",
                           "moebius_policy_regret_seconds{", "moebius_policy_price_seconds{", "moebius_policy_budget_seconds{"})
    CHECK_THAT(text, Catch::Contains(line));
}

TEST_CASE("a move that began or ended at a seam inside teaches no price") {
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  submit_four(engine, 40);
  run(engine, 3);
  for (Layout end : {Layout::kEp, Layout::kTp}) {
    engine.hold_seam(2);
    run(engine, 2);
    engine.request_switch(end);
    run(engine, 2);
    REQUIRE(engine.stats().seam == (end == Layout::kTp ? 4 : 0));
  }
  for (Layout layout : {Layout::kTp, Layout::kEp}) CHECK(of(engine.impl().costs().corrections(), layout) == 0);
}

TEST_CASE("measured switches where the other layout's steps cost less, says by which numbers, and changes no bit") {
  const Script script = decaying();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  EngineConfig config = small_config(2, 1, Layout::kTp);
  Engine engine(kQwen, config);
  teach(engine, Layout::kEp, 1e-6);  // no machine is that fast
  engine.set_policy(measured(0));
  for (const ScriptedRequest& r : script.requests) engine.submit(r.spec);
  Outcome got;
  std::map<uint64_t, std::vector<int32_t>> tokens;
  for (int i = 0; i < 200; ++i) engine.step();
  drain(engine, got);
  for (const Event& e : got.events)
    if (e.type == EventType::kToken) tokens[e.request].push_back(e.token);
  for (size_t i = 0; i < script.requests.size(); ++i) CHECK(tokens[i + 1] == expected.outputs.at(script.requests[i].spec.id).tokens);
  const std::vector<Event> decisions = events_of(got, EventType::kDecision);
  REQUIRE(!decisions.empty());
  CHECK(decisions[0].to == Layout::kEp);
  CHECK_THAT(decisions[0].reason, Catch::Contains("measured: running ") && Catch::Contains("regret ") && Catch::Contains("of price ") && Catch::Contains("tp → ep"));
  CHECK(events_of(got, EventType::kSwitchFinished).at(0).to == Layout::kEp);
}

TEST_CASE("measured stays where steps cost less") {
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  teach(engine, Layout::kEp, 1000);  // seconds
  engine.set_policy(measured(0.01));
  submit_four(engine, 150);
  run(engine, 150);
  CHECK(engine.stats().switches == 0);
}

TEST_CASE("a switch that measured asks for and that does not fit is not asked for at every step") {
  EngineConfig config = tight_config();
  Engine engine(kQwen, config);
  submit_tight(engine);
  run(engine, 4);
  REQUIRE(engine.stats().running == 3);
  teach(engine, Layout::kEp, 1e-6, 340);
  engine.set_policy(measured(0));
  run(engine, 40);
  CHECK(engine.stats().refusals == 1);
  CHECK(engine.stats().switches == 0);
}

TEST_CASE("learned costs are kept in a file for the next engine of the same kind; another's, a broken one and none teach nothing") {
  const TempFile file;
  std::string warnings;
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.policy_file = file.path.string();
  config.log = [&](LogLevel level, const char*, const std::string& message) {
    if (level == LogLevel::kWarning) warnings += message + "\n";
  };
  const auto knows_tp = [&](const EngineConfig& c, int steps) {
    warnings.clear();
    Engine engine(kQwen, c);
    const bool knows = engine.impl().costs().curve(Layout::kTp).seen();
    if (steps > 0) submit_four(engine, steps);
    run(engine, steps);
    return knows;
  };
  CHECK_FALSE(knows_tp(config, 20));  // there is no file yet
  CHECK(warnings == "");
  CHECK(std::filesystem::exists(file.path));
  CHECK(knows_tp(config, 0));
  CHECK(warnings == "");
  EngineConfig other = config;
  other.ranks = 4;
  other.policy_file = file.path.string();
  std::ifstream in(file.path);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  CHECK_FALSE(knows_tp(other, 0));
  CHECK(knows_tp(config, 0));  // the file is as it was
  CHECK_FALSE(knows_tp(other, 5));
  CHECK_THAT(warnings, Catch::Contains("not used, and left as it is") && Catch::Contains("4 ranks of 1 threads") && Catch::Contains("2 ranks of 1 threads"));
  const std::string broken[] = {"",
                                "{",
                                "[1]",
                                "null",
                                text.substr(0, text.size() / 2),
                                "{\"moebius_costs\":4}",
                                "{\"moebius_costs\":3}",
                                [&] { std::string t = text; return t.replace(t.find("\"tp\":["), 6, "\"tp\":[1,"); }(),
                                [&] { std::string t = text; return t.replace(t.find("\"tp\":["), 6, "\"tp\":[-"); }(),
                                [&] { std::string t = text; return t.replace(t.find("corrections\":["), 14, "corrections\":[-1,"); }(),
                                std::string(2 << 20, ' ')};
  for (const std::string& b : broken) {
    std::ofstream(file.path, std::ios::trunc) << b;
    INFO(b.substr(0, 60));
    CHECK_FALSE(knows_tp(config, 0));
    CHECK_THAT(warnings, Catch::Contains("no learned costs") && Catch::Contains(file.path.string()));
    CHECK(std::filesystem::file_size(file.path) == b.size());
  }
  std::filesystem::remove(file.path);
  REQUIRE(mkfifo(file.path.c_str(), 0600) == 0);
  CHECK_FALSE(knows_tp(config, 5));
  CHECK_THAT(warnings, Catch::Contains("not a regular one"));
  config.policy_file = "/nowhere/costs";
  CHECK_FALSE(knows_tp(config, 5));
  CHECK_THAT(warnings, Catch::Contains("/nowhere/costs") && Catch::Contains("cannot be written"));
  for (const auto& entry : std::filesystem::directory_iterator(file.path.parent_path()))
    if (entry.path().string().rfind(file.path.string() + ".", 0) == 0) FAIL("a part is left: " << entry.path());
}

TEST_CASE("calibration teaches both curves and both prices, and leaves no other trace; a file that has them makes it needless") {
  const Layout start = GENERATE(Layout::kTp, Layout::kEp);
  const TempFile file;
  const auto script = [](Engine& engine) {
    std::string out;
    submit_four(engine, 20);
    run(engine, 40);
    Outcome events;
    drain(engine, events);
    for (const Event& e : events.events) out += fmt::format("{} {} {} {} {}, ", static_cast<int>(e.type), e.step, e.request, e.token, e.seam);
    return out;
  };
  const auto counters = [](const Engine& engine) {  // of the metrics: what counts no time
    std::string out;
    std::istringstream lines(engine.metrics_text());
    for (std::string line; std::getline(lines, line);)
      if (line[0] != '#' && line.find("seconds") == std::string::npos) out += line + "\n";
    return out;
  };
  EngineConfig config = small_config(2, 1, start);
  Engine plain(kQwen, config);
  config.policy_calibrate_ms = 300;
  config.policy_file = file.path.string();
  std::string log;
  config.log = [&](LogLevel, const char* category, const std::string& message) { log += std::string(category) + ": " + message + "\n"; };
  {
    Engine engine(kQwen, config);
    for (Layout l : {Layout::kTp, Layout::kEp}) {
      CHECK(engine.impl().costs().curve(l).seen());
      CHECK(of(engine.impl().costs().corrections(), l) > 0);
    }
    CHECK_THAT(log, !Catch::Contains("switch:"));
    CHECK(counters(engine) == counters(plain));
    CHECK(script(engine) == script(plain));
    CHECK(counters(engine) == counters(plain));
    CHECK(engine.stats().seam == (start == Layout::kTp ? engine.model().num_layers : 0));
  }
  config.policy_calibrate_ms = 1e9;
  Engine again(kQwen, config);
  CHECK(again.impl().costs().curve(Layout::kTp).seen());
}

}  // namespace moebius::test
