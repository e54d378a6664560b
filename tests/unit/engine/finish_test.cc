// How requests end: end-of-text and stop tokens, lengths, deadlines, logits that are no numbers.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

#include "tests/unit/engine/harness.h"
#include "tests/unit/engine/model_copy.h"

namespace moebius::test {
namespace {

constexpr uint16_t kNan = 0x7fc0, kHuge = 0x7f7f;  // bf16

Output run_one(const std::string& model, const RequestSpec& spec) {
  Script s;
  s.requests.push_back({spec});
  return run_script(model, small_config(1, 1, Layout::kTp), s).outputs.at(spec.id);
}

// A greedy request and the tokens it gives when nothing stops it, with one that comes for the first time after some others.
struct Known {
  RequestSpec spec = greedy_request("a", prompt_of(11, 20), 16);
  std::vector<int32_t> tokens = run_one(kQwen, spec).tokens;
  size_t at = 0;
  Known() {
    for (size_t i = 3; i < 12 && at == 0; ++i)
      if (std::find(tokens.begin(), tokens.begin() + static_cast<long>(i), tokens[i]) == tokens.begin() + static_cast<long>(i)) at = i;
    REQUIRE(at > 0);
  }
  int32_t token() const { return tokens[at]; }
  std::vector<int32_t> head(size_t n) const { return {tokens.begin(), tokens.begin() + static_cast<long>(n)}; }
};

std::vector<Event> step_and_poll(Engine& engine) {
  engine.step();
  std::vector<Event> events(256);
  events.resize(engine.poll(events, 0));
  return events;
}

// The abort event of a request in what these steps told; nothing else may have ended it.
bool aborted(const std::vector<Event>& events, uint64_t request) {
  return std::any_of(events.begin(), events.end(), [&](const Event& e) {
    return e.type == EventType::kFinished && e.request == request && e.finish_reason == FinishReason::kAbort && e.reason == "deadline passed";
  });
}

// A rank's thread that is stuck until the process exits, and runs on with its step when what was made after the tests began has ended.
struct LateThread {
  std::atomic<bool> release{false};
  std::weak_ptr<int> used;  // held by the thread's engine
  void come_back() {
    release = true;
    for (int i = 0; i < 5000 * kSlower && !used.expired(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    if (used.expired()) return;
    std::fputs("a rank's thread did not come back\n", stderr);
    std::_Exit(1);
  }
  ~LateThread() { come_back(); }
} late_thread;

}  // namespace

TEST_CASE("end of text stops a request, from config.json or generation_config.json, unless it is ignored") {
  const Known known;
  RequestSpec spec = known.spec;
  spec.sampling.ignore_eos = false;
  CHECK(run_one(kQwen, spec).reason == FinishReason::kLength);
  ModelCopy by_config(kQwen), by_generation(kQwen);
  by_config.set("config.json", "eos_token_id", known.token());
  by_config.remove("generation_config.json");
  by_generation.set("generation_config.json", "eos_token_id", {500, known.token()});
  for (const ModelCopy* model : {&by_config, &by_generation}) {
    const Output stopped = run_one(model->path(), spec);
    CHECK(stopped.reason == FinishReason::kStop);
    CHECK(stopped.tokens == known.head(known.at + 1));  // the end token is one of them
    const Output ignored = run_one(model->path(), known.spec);
    CHECK(ignored.reason == FinishReason::kLength);
    CHECK(ignored.tokens == known.tokens);
  }
}

TEST_CASE("a stop token ends a request and is its last token, also with ignore_eos") {
  const Known known;
  RequestSpec spec = known.spec;
  spec.sampling.stop_token_ids = {1, known.token()};
  const Output got = run_one(kQwen, spec);
  CHECK(got.reason == FinishReason::kStop);
  CHECK(got.tokens == known.head(known.at + 1));
}

TEST_CASE("min_tokens keeps stop tokens away until so many are generated, then they stop") {
  const Known known;
  RequestSpec spec = known.spec;
  spec.sampling.stop_token_ids = {known.token()};
  spec.sampling.min_tokens = static_cast<int32_t>(known.at) + 1;  // would be reached with the stop token itself
  const Output got = run_one(kQwen, spec);
  REQUIRE(got.tokens.size() > known.at + 1);
  CHECK(std::find(got.tokens.begin(), got.tokens.begin() + static_cast<long>(known.at) + 1, known.token()) ==
        got.tokens.begin() + static_cast<long>(known.at) + 1);
  spec.sampling.min_tokens = static_cast<int32_t>(known.at);  // reached just before
  const Output stopped = run_one(kQwen, spec);
  CHECK(stopped.reason == FinishReason::kStop);
  CHECK(stopped.tokens == known.head(known.at + 1));
}

TEST_CASE("a request that may choose nothing ends with an error that says so, and is not counted as corrupted") {
  Engine engine(kQwen, small_config(1, 1, Layout::kTp));
  RequestSpec spec = greedy_request("a", prompt_of(1, 5), 8);
  spec.sampling.allowed_token_ids = spec.sampling.stop_token_ids = {9};
  spec.sampling.min_tokens = 2;
  engine.submit(spec);
  const std::vector<Event> events = step_and_poll(engine);
  REQUIRE(!events.empty());
  CHECK(events.back().finish_reason == FinishReason::kError);
  CHECK_THAT(events.back().reason, Catch::Contains("min_tokens"));
  CHECK_THAT(engine.metrics_text(), Catch::Contains("corrupted_requests_total{model_name=\"tiny-qwen3-moe\",engine=\"0\"} 0\n"));
}

TEST_CASE("a deadline ends a request that waits, that is in prefill, that decodes") {
  using namespace std::chrono_literals;
  EngineConfig config = small_config(1, 1, Layout::kTp);
  config.max_batch = 1;
  config.chunk_tokens = 16;
  SECTION("waiting") {
    Engine engine(kQwen, config);
    engine.submit(greedy_request("first", prompt_of(1, 5), 50));
    engine.step();
    RequestSpec spec = greedy_request("late", prompt_of(2, 5), 5);
    spec.deadline_ms = 1;
    const uint64_t late = engine.submit(spec);
    std::this_thread::sleep_for(5ms);
    CHECK(aborted(step_and_poll(engine), late));
    CHECK(engine.stats().running == 1);
    CHECK(engine.stats().waiting == 0);
  }
  for (bool decoding : {false, true})
    DYNAMIC_SECTION((decoding ? "decoding" : "in prefill")) {
      Engine engine(kQwen, config);
      RequestSpec spec = greedy_request("late", prompt_of(2, decoding ? 5 : 900), 100);
      spec.deadline_ms = 500 * kSlower;  // long for the steps before, however busy the machine
      const uint64_t late = engine.submit(spec);
      for (int i = 0; i < 3; ++i) CHECK_FALSE(aborted(step_and_poll(engine), late));
      CHECK(engine.stats().generation_tokens == (decoding ? 3 : 0));
      std::this_thread::sleep_for(600ms * kSlower);
      CHECK(aborted(step_and_poll(engine), late));
      CHECK(engine.stats().running == 0);
      CHECK(engine.stats().kv_usage == 0);
    }
}

TEST_CASE("when a step fails every request ends with an error, nothing runs any more, and what was kept can be taken") {
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  const uint64_t kept = engine.submit(greedy_request("kept", prompt_of(1, 5), 50, true));
  RequestSpec two = greedy_request("two", prompt_of(2, 5), 50);
  two.sampling.n = 2;
  engine.submit(two);
  for (int i = 0; i < 3; ++i) engine.step();
  const uint64_t queued = engine.submit(greedy_request("queued", prompt_of(3, 5), 50));
  engine.impl().step_hook = [](int rank, int) {
    if (rank == 1) fail(Code::kInternal, "a fault");
  };
  CHECK_THROWS_WITH(engine.step(), Catch::Contains("a fault"));
  std::vector<Event> events(256);
  events.resize(engine.poll(events, 0));
  int ended = 0;
  bool queued_too = false;
  for (const Event& e : events)
    if (e.type == EventType::kFinished) {
      ++ended;
      CHECK(e.finish_reason == FinishReason::kError);
      CHECK_THAT(e.reason, Catch::Contains("a fault"));
      queued_too |= e.request == queued;
    }
  CHECK(ended == 4);
  CHECK(queued_too);
  CHECK(engine.stats().running == 0);
  CHECK(engine.stats().waiting == 0);
  CHECK_THAT(engine.metrics_text(), Catch::Contains("finished_reason=\"error\"} 4\n"));
  CHECK_THROWS_WITH(engine.step(), Catch::Contains("a fault"));
  CHECK_THROWS_WITH(engine.submit(two), Catch::Contains("a fault"));
  CHECK(engine.take_logits(kept).size() == (5 + 3 - 1) * 512u);
}

TEST_CASE("an exception of unknown type ends every request too, in the host's step and in the engine's own thread") {
  for (bool own_thread : {false, true}) {
    Engine engine(kQwen, small_config(2, 1, Layout::kTp));
    engine.impl().step_hook = [](int rank, int) {
      if (rank == 1) throw 7;
    };
    engine.submit(greedy_request("a", prompt_of(1, 5), 50));
    if (own_thread) engine.start();
    else CHECK_THROWS_AS(engine.step(), int);
    std::vector<Event> events(16);
    bool ended = false;
    for (int i = 0; i < 100 && !ended; ++i)
      for (size_t n = engine.poll(events, 100), e = 0; e < n; ++e)
        ended |= events[e].type == EventType::kFinished && events[e].finish_reason == FinishReason::kError;
    CHECK(ended);
    engine.stop();
    CHECK_THROWS_WITH(engine.step(), Catch::Contains("unknown type"));
  }
}

TEST_CASE("when the engine fails each switch that was asked for has its outcome, and none is taken afterwards") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.stall_budget_ms = 1e-6;
  Engine engine(kQwen, config);
  engine.submit(greedy_request("a", prompt_of(1, 40), 50));
  engine.step();
  engine.request_switch(Layout::kEp);
  engine.step();
  REQUIRE(engine.stats().switching);
  engine.impl().step_hook = [&](int rank, int) {
    if (rank > 0) return;
    engine.request_switch(Layout::kTp);  // after this step took up what it found
    fail(Code::kInternal, "a fault");
  };
  CHECK_THROWS_AS(engine.step(), Error);
  std::vector<Event> events(256);
  events.resize(engine.poll(events, 0));
  std::vector<Layout> refused;
  for (const Event& e : events)
    if (e.type == EventType::kSwitchRefused) {
      refused.push_back(e.to);
      CHECK_THAT(std::string(e.reason.view()), Catch::Contains("the engine has failed: a fault"));
    }
  CHECK((refused == std::vector<Layout>{Layout::kEp, Layout::kTp}));
  CHECK_FALSE(engine.stats().switching);
  CHECK_THROWS_WITH(engine.request_switch(Layout::kEp), Catch::Contains("a fault"));
  CHECK_THROWS_WITH(engine.estimate_switch(Layout::kEp), Catch::Contains("a fault"));
  CHECK_THROWS_WITH(engine.start(), Catch::Contains("a fault"));
}

TEST_CASE("logits are not taken out of a dead world's memory, only copied; a thread may still be in a step when the process exits") {
  {
    const auto used = std::make_shared<int>();
    late_thread.used = used;
    EngineConfig config = small_config(2, 1, Layout::kTp);
    config.wait_deadline_ms = 400 * kSlower;
    Engine engine(kQwen, config);
    const uint64_t kept = engine.submit(greedy_request("kept", prompt_of(1, 5), 50, true));
    for (int i = 0; i < 3; ++i) engine.step();
    engine.impl().step_hook = [used](int rank, int) {
      while (rank == 1 && !late_thread.release) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    };
    CHECK_THROWS_AS(engine.step(), Error);
    REQUIRE(engine.impl().world().dead());
    const std::vector<float> first = engine.take_logits(kept);
    CHECK(first.size() == (5 + 3 - 1) * 512u);
    CHECK((engine.take_logits(kept) == first));
  }
  if (test_device() != nullptr) late_thread.come_back();  // CUDA may not be called while the process exits
}

TEST_CASE("weights that are no numbers end the same requests with an error everywhere, and leave their batch mates' bits alone", "[long]") {
  Script script;
  for (int i = 0; i < 12; ++i) script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(700 + i, 1), 3, true), i / 6});
  const Outcome clean = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  ModelCopy embedding(kQwen), expert(kQwen), huge(kQwen);
  embedding.set_weight("model.embed_tokens.weight", script.requests[4].spec.prompt_ids[0] * 128 + 5, kNan);
  expert.set_weight("model.layers.1.mlp.experts.5.down_proj.weight", 7, kNan);
  huge.set_weight("model.layers.2.mlp.experts.3.down_proj.weight", 9, kHuge);
  for (const ModelCopy* model : {&embedding, &expert, &huge}) {
    INFO((model == &embedding ? "embedding" : model == &expert ? "expert" : "huge"));
    const Outcome expected = run_script(model->path(), small_config(1, 1, Layout::kTp), script);
    int errors = 0;
    for (const auto& [id, output] : expected.outputs) {
      errors += output.reason == FinishReason::kError;
      if (model == &embedding && id != "r4") CHECK(output.tokens == clean.outputs.at(id).tokens);
    }
    if (model == &embedding) CHECK(expected.outputs.at("r4").reason == FinishReason::kError);
    CHECK(errors > 0);
    CHECK(errors < 12);
    Engine engine(model->path(), small_config(2, 1, Layout::kEp));
    Runner(engine).run(script);
    CHECK_THAT(engine.metrics_text(), Catch::Contains(fmt::format("corrupted_requests_total{{model_name=\"{}\",engine=\"0\"}} {}\n",
                                                                  std::filesystem::path(model->path()).filename().string(), errors)));
    for (int ranks : {1, 2, 4})
      for (Layout layout : {Layout::kTp, Layout::kEp})
        for (int seam : {-2, 2}) {  // −2: left where it is
          Script held = script;
          if (seam >= 0) held.switches = {{0, seam}};
          Outcome got = run_script(model->path(), small_config(ranks, 1, layout), held), want = expected;
          for (Outcome* o : {&got, &want})
            for (auto& [id, output] : o->outputs)
              if (output.reason == FinishReason::kError) output.logits.clear();  // a NaN's own bits are nobody's promise
          INFO("ranks " << ranks << " " << name_of(layout) << " seam " << seam);
          CHECK(difference(want, got) == "");
        }
  }
}

}  // namespace moebius::test
