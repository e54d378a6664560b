// What a model folder or a host may say wrongly: refused with the numbers, and before anything is sized from them.
#include <sys/resource.h>

#include <cmath>
#include <fstream>
#include <thread>

#include <nlohmann/json.hpp>

#include "tests/unit/engine/harness.h"
#include "tests/unit/model/files.h"

namespace moebius::test {
namespace {

using Catch::Contains;
using nlohmann::json;

// A copy of a test model whose config.json has these changes.
class ChangedModel {
 public:
  ChangedModel(const std::string& model, const json& changes) {
    for (const auto& file : std::filesystem::directory_iterator(model)) std::filesystem::create_symlink(file.path(), folder_ / file.path().filename());
    json config = json::parse(std::ifstream(folder_ / "config.json"));
    for (const auto& [key, value] : changes.items()) config[key] = value;
    std::filesystem::remove(folder_ / "config.json");
    write_file(folder_ / "config.json", config.dump());
  }
  const std::filesystem::path& path() const { return folder_.path(); }

 private:
  TempFolder folder_;
};

int64_t peak_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

std::string refusal(const std::filesystem::path& model, const EngineConfig& config) {
  try {
    Engine engine(model, config);
    return "";
  } catch (const Error& e) {
    return e.what();
  }
}

EngineConfig tp_config() { return small_config(1, 1, Layout::kTp); }

int num_threads_now() {
  int n = 0;
  for ([[maybe_unused]] const auto& task : std::filesystem::directory_iterator("/proc/self/task")) ++n;
  return n;
}

}  // namespace

// Tables of a million slices or of four million positions would take hundreds of megabytes.
TEST_CASE("a config that lies about counts is refused before tables are made of it") {
  constexpr int64_t kSmall = 100 << 20;
  EngineConfig config = tp_config();
  const int64_t before = peak_bytes();
  CHECK_THAT(refusal(ChangedModel(kQwen, {{"num_hidden_layers", 4096}, {"num_experts", 256}}).path(), config), Contains("mlp.gate") && Contains("256"));
  CHECK_THAT(refusal(ChangedModel(kQwen, {{"num_hidden_layers", 4096}}).path(), config), Contains("model.layers.4") && Contains("missing"));
  config.dummy_weights = true;
  CHECK_THAT(refusal(ChangedModel(kQwen, {{"num_hidden_layers", 4096}, {"num_experts", 65536}}).path(), config),
             Contains("4096 layers of up to 65536 experts in 8 cuts"));
  CHECK_THAT(refusal(ChangedModel(kQwen, {{"hidden_size", 1 << 20}, {"moe_intermediate_size", 1 << 20}, {"num_hidden_layers", 1000}}).path(), config),
             Contains("1000 layers of up to 16 experts"));
  CHECK(peak_bytes() - before < kSmall);
}

TEST_CASE("a model with more heads than one projection reads is refused, one with as many runs") {
  EngineConfig config = tp_config();
  config.dummy_weights = true;
  const auto heads = [](int n) { return json{{"num_attention_heads", n}, {"num_key_value_heads", n}, {"head_dim", 2}}; };
  CHECK_THAT(refusal(ChangedModel(kQwen, heads(256)).path(), config), Contains("K and V of 256 KV heads") && Contains("at most 512"));
  const Outcome most = run_script(ChangedModel(kQwen, heads(170)).path(), config, {{{greedy_request("a", prompt_of(1, 20), 3)}}, {}});
  CHECK(most.outputs.at("a").tokens.size() == 3);
}

TEST_CASE("the rotary table holds the positions that are served, not all that the model was made for, and is counted") {
  constexpr int kPositions = kSanitized ? 512 : 4096;
  EngineConfig config = tp_config();
  config.kv_tokens = kPositions;
  const ChangedModel model(kQwen, {{"max_position_embeddings", int64_t{1} << 31}});
  const int64_t before = peak_bytes();
  Engine engine(model.path(), config);
  CHECK(peak_bytes() - before < 200 << 20);
  CHECK(engine.model().max_context == int64_t{1} << 31);
  CHECK_THROWS_WITH(engine.submit(greedy_request("a", prompt_of(1, kPositions - 96), 200)), Contains("KV pages"));
  const RequestSpec longest = greedy_request("a", prompt_of(1, kPositions - 96), 96);
  const Outcome there = Runner(engine).run({{{longest}}, {}});
  CHECK(there.outputs.at("a").tokens.size() == 96);
  config.max_context = kPositions / 4;
  CHECK(engine.memory().shared_bytes - Engine(kQwen, config).memory().shared_bytes == (kPositions - kPositions / 4) * 32 * 4);
}

TEST_CASE("memory_bytes covers the rotary table") {
  EngineConfig config = tp_config();
  config.kv_tokens = 0;
  config.memory_bytes = 64 << 20;
  Engine engine(ChangedModel(kQwen, {{"max_position_embeddings", 1 << 24}}).path(), config);
  const MemoryReport m = engine.memory();
  CHECK(m.arena_bytes + m.workspace_bytes + m.shared_bytes <= config.memory_bytes);
  CHECK(m.arena_bytes + m.workspace_bytes + m.shared_bytes > config.memory_bytes * 9 / 10);
}

TEST_CASE("keys of config.json that are not known are told once") {
  std::vector<std::string> warnings;
  EngineConfig config = tp_config();
  config.log = [&](LogLevel level, const char*, const std::string& w) {
    if (level == LogLevel::kWarning) warnings.push_back(w);
  };
  Engine engine(ChangedModel(kQwen, {{"flux_capacitor", 1.21}, {"other", "x"}}).path(), config);
  REQUIRE(warnings.size() == 1);
  CHECK_THAT(warnings[0], Contains("config.json") && Contains("2 keys") && Contains("flux_capacitor = 1.21, other = \"x\""));
}

TEST_CASE("ranks and threads are checked before a thread is started") {
  const int before = num_threads_now();
  CHECK_THAT(refusal(kQwen, small_config(9, 1, Layout::kTp)), Contains("9 ranks"));
  CHECK_THAT(refusal(kQwen, small_config(1000000, 1000, Layout::kTp)), Contains("1000000 ranks"));
  CHECK_THAT(refusal(kQwen, small_config(2, 100000, Layout::kTp)), Contains("2 ranks of 100000 threads are 200000"));
  CHECK(num_threads_now() == before);
}

TEST_CASE("settings out of range are refused with key, value and range") {
  const double nan = std::nan(""), infinity = HUGE_VAL;
  const auto refused = [](const char* key, const std::string& value, auto&& change) {
    EngineConfig config = tp_config();
    change(config);
    CHECK_THAT(refusal(kQwen, config), Contains(key) && Contains(value));
  };
  refused("chunk_tokens", "2147483647", [](EngineConfig& c) { c.chunk_tokens = INT32_MAX; });
  refused("max_batch", "2147483647", [](EngineConfig& c) { c.max_batch = INT32_MAX; });
  refused("kv_tokens", "-1", [](EngineConfig& c) { c.kv_tokens = -1; });
  refused("kv_tokens", "9223372036854775807", [](EngineConfig& c) { c.kv_tokens = INT64_MAX; });
  refused("memory_bytes", "-5", [](EngineConfig& c) { c.memory_bytes = -5; });
  refused("max_context", "-1", [](EngineConfig& c) { c.max_context = -1; });
  refused("max_context", "9223372036854775807", [](EngineConfig& c) { c.max_context = INT64_MAX; });
  refused("page_tokens", "2147483632", [](EngineConfig& c) { c.page_tokens = 2147483632; });
  refused("page_tokens", "24", [](EngineConfig& c) { c.page_tokens = 24; });
  refused("threads", "-1", [](EngineConfig& c) { c.threads = -1; });
  refused("stall_budget_ms", "nan", [&](EngineConfig& c) { c.stall_budget_ms = nan; });
  refused("wait_deadline_ms", "nan", [&](EngineConfig& c) { c.wait_deadline_ms = nan; });
  refused("wait_deadline_ms", "-1", [](EngineConfig& c) { c.wait_deadline_ms = -1; });
  for (PolicyKind kind : {PolicyKind::kManual, PolicyKind::kThreshold, PolicyKind::kMeasured}) {
    refused("threshold", "nan", [&](EngineConfig& c) { c.policy = {kind, {}, nan}; });
    refused("threshold", "-1", [&](EngineConfig& c) { c.policy = {kind, {}, -1}; });
    refused("cooldown", "nan", [&](EngineConfig& c) { c.policy = {kind, {}, 0, 0, nan}; });
    refused("policy_calibrate_ms", "nan", [&](EngineConfig& c) { c.policy_calibrate_ms = nan; });
    refused("policy_explore", "nan", [&](EngineConfig& c) { c.policy.explore = nan; });
    refused("window", "2147483647", [&](EngineConfig& c) { c.policy = {kind, {}, 0, INT32_MAX}; });
  }
  EngineConfig config = tp_config();
  config.kv_tokens = 0;
  config.memory_bytes = INT64_MAX;  // no machine reserves as much
  CHECK_THAT(refusal(kQwen, config), Contains("memory_bytes is 9223372036854775807, rank 0 works where there are"));
  config.memory_bytes = 0;
  for (double ms : {infinity, 1e300}) {  // as long as it takes
    config.ranks = 2;
    config.wait_deadline_ms = ms;
    const Outcome there = run_script(kQwen, config, {{{greedy_request("a", prompt_of(1, 20), 3)}}, {{1, 0}}});
    CHECK(there.outputs.at("a").tokens.size() == 3);
  }
}

TEST_CASE("times that are no numbers, negative or beyond every clock are refused or as long as it takes") {
  Engine engine(kQwen, tp_config());
  std::vector<Event> events(64);
  for (double ms : {std::nan(""), -1.0, -HUGE_VAL, -1e300}) {
    RequestSpec r = greedy_request("a", prompt_of(1, 8), 2);
    r.deadline_ms = ms;
    CHECK_THROWS_WITH(engine.submit(r), Contains("deadline_ms") && Contains("at least 0"));
    CHECK(engine.poll(events, ms) == 0);  // returns at once
    if (ms < 0 || std::isnan(ms)) CHECK_THROWS_WITH(engine.set_stall_budget(ms), Contains("stall_budget_ms"));
  }
  for (double ms : {HUGE_VAL, 1e300, 1e18}) {
    RequestSpec r = greedy_request("a", prompt_of(1, 8), 2);
    r.deadline_ms = ms;
    const Outcome there = Runner(engine).run({{{r}}, {}});
    CHECK(there.outputs.at("a").reason == FinishReason::kLength);
    std::thread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      engine.submit(greedy_request("b", prompt_of(1, 8), 1));
      for (int i = 0; i < 3; ++i) engine.step();
    });
    CHECK(engine.poll(events, ms) > 0);  // waits, and is woken
    later.join();
    while (engine.poll(events, 0) > 0) {}
  }
}

}  // namespace moebius::test
