// The whole engine on the device. Longer runs of the same kind are the engine's own tests with MOEBIUS_TEST_DEVICE (label gpu).
#include "lib/device/module_device.h"
#include "tests/cuda/engine_harness.h"
#include "tests/unit/engine/model_copy.h"

#include <cstdlib>

namespace moebius::test {
TEST_CASE("any number of ranks, either layout and every seam give the same bits", "[engine]") {
  int64_t turn = 0;
  for (const std::string& model : {kQwen, kDense, kMixtral, kQwen2, kGlm, kGranite}) {
    Script script = short_script();
    const Outcome expected = run_script(model, device_config(1, Layout::kTp), script);
    REQUIRE(expected.outputs.at("a").logits.size() == (19 + 4 - 1) * 512u);
    for (int ranks : model == kQwen ? std::vector<int>{2, 3, 4, 8} : std::vector<int>{2, 8})
      for (Layout layout : {Layout::kTp, Layout::kEp}) {
        if (turn++ % kSweep != 0) continue;
        INFO(model << " ranks " << ranks << " " << name_of(layout));
        CHECK(difference(expected, run_script(model, device_config(ranks, layout), script)) == "");
      }
    EngineConfig two_shots = device_config(model == kQwen ? 3 : 8, Layout::kTp);
    two_shots.two_shot_bytes = 0;
    CHECK(difference(expected, run_script(model, two_shots, script)) == "");
    for (int seam = 1; seam < layers_of(model); ++seam) {
      if (turn++ % kSweep != 0) continue;
      script.switches = {{0, seam}};
      INFO(model << " seam " << seam);
      CHECK(difference(expected, run_script(model, device_config(2, seam % 2 == 0 ? Layout::kTp : Layout::kEp), script)) == "");
    }
  }
}

TEST_CASE("chunks of a prompt, and pages of another size, give the same bits", "[engine]") {
  const Script script = short_script();
  const Outcome expected = run_script(kQwen, device_config(1, Layout::kTp), script);
  for (int chunk : {1, 7}) {
    EngineConfig config = device_config(2, chunk == 1 ? Layout::kTp : Layout::kEp);
    config.chunk_tokens = chunk;
    config.page_tokens = 16 * chunk;
    INFO("chunk " << chunk);
    CHECK(difference(expected, run_script(kQwen, config, script)) == "");
  }
}

TEST_CASE("queries that attention turns itself give the bits of those that were turned before, in any layout, at any seam, captured or not", "[engine]") {
  const WideHeads model;
  const auto config_of = [](int ranks, Layout layout) {
    EngineConfig c = device_config(ranks, layout);
    c.dummy_weights = true;
    return c;
  };
  Script script = short_script();
  const Outcome expected = run_script(model.path(), config_of(1, Layout::kTp), script);  // a prompt of 19 rows in one chunk: turned before
  for (int ranks : {1, 2, 4})
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      EngineConfig config = config_of(ranks, layout);
      config.capture_steps = ranks != 2;
      if (ranks != 4) config.chunk_tokens = 1;  // the prompt's rows too are chunks of one row
      INFO("ranks " << ranks << " " << name_of(layout));
      CHECK(difference(expected, run_script(model.path(), config, script)) == "");
    }
  for (int seam = 1; seam < 4; ++seam) {
    script.switches = {{0, seam}};
    INFO("seam " << seam);
    CHECK(difference(expected, run_script(model.path(), config_of(2, seam % 2 == 0 ? Layout::kTp : Layout::kEp), script)) == "");
  }
}

TEST_CASE("captured steps: used by decode steps of pure layouts, and they change no bit", "[engine]") {
  for (int ranks : {1, 2, 3})
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      INFO("ranks " << ranks << " " << name_of(layout));
      EngineConfig config = device_config(ranks, layout);
      config.capture_steps = false;
      int captured[2] = {}, steps[2] = {};
      std::vector<int32_t> tokens[2];
      for (int on : {0, 1}) {
        config.capture_steps = on != 0;
        Engine engine(kQwen, config);
        for (uint32_t i = 0; i < 3; ++i) engine.submit(greedy_request(std::to_string(i), prompt_of(30 + i, 2 + static_cast<int>(i)), 5));
        for (StepResult r = engine.step(); r.worked; r = engine.step()) {
          ++steps[on];
          captured[on] += r.captured;
          const bool seam_inside = ranks > 1 && steps[on] > 3;  // then a step runs as it is
          CHECK(r.captured == (on != 0 && r.prefill_rows == 0 && !seam_inside));
          if (steps[on] == 3) engine.hold_seam(2);
        }
        std::vector<Event> events(256);
        events.resize(engine.poll(events, 0));
        for (const Event& e : events)
          if (e.type == EventType::kToken) tokens[on].push_back(e.token);
      }
      CHECK(captured[1] > 0);
      CHECK(tokens[0] == tokens[1]);
    }
}

TEST_CASE("after an update captured steps compute with the new weights and scales, after a switch too", "[engine]") {
  ModelCopy changed(kQwen);
  changed.change_all();
  const Script script = brief_script();
  const Outcome old = run_script(kQwen, device_config(1, Layout::kTp), script);
  const Outcome expected = run_script(changed.path(), device_config(1, Layout::kTp), script);
  REQUIRE(difference(old, expected) != "");
  for (int seam : {0, 2}) {
    INFO("seam " << seam);
    Engine engine(kQwen, device_config(2, Layout::kEp));
    engine.hold_seam(seam);
    CHECK(difference(old, Runner(engine, true).run(script)) == "");
    const auto scale = [&] { return engine.impl().store().tables(1)[0][1].mlp_scale; };
    const float before = scale();
    RequestSpec kept = greedy_request("kept", prompt_of(8, 5), 3);  // the update captures steps anew, and these keep nothing
    kept.keep_routes = true;
    engine.submit(kept);
    while (engine.step().worked) {}
    if (seam == 0) engine.update_weights(changed.path());
    for (bool first : {true, false}) {  // or part by part
      if (seam == 0) break;
      ModelCopy some(kQwen);
      some.change_all();
      const auto has = [](const std::string& tensor, const char* what) { return tensor.find(what) != std::string::npos; };
      some.keep([&](const std::string& tensor) { return (has(tensor, ".layers.") && !has(tensor, "gate_proj")) == first; });
      engine.update_tensors(FolderFiles(some.path()));
    }
    REQUIRE(scale() != before);
    if (seam == 2) CHECK(difference(expected, Runner(engine, true).run(script)) == "");
    engine.hold_seam(seam == 2 ? 4 : 0);
    CHECK(difference(expected, Runner(engine, true).run(script)) == "");
    engine.submit(greedy_request("b", prompt_of(9, 1), 3));
    engine.step();
    CHECK(engine.step().captured);
  }
}

TEST_CASE("the experts of every position are those of the cpu, and such a step is not a captured one", "[engine]") {
  const auto routes_of = [](EngineConfig config, int32_t seam) {
    config.mode = "exact";
    Engine engine(kQwen, config);
    engine.hold_seam(seam);
    RequestSpec spec = greedy_request("a", prompt_of(5, 11), 4);
    spec.keep_routes = true;
    const uint64_t id = engine.submit(spec);
    for (StepResult r = engine.step(); r.worked; r = engine.step()) CHECK(!r.captured);
    std::vector<int16_t> out(engine.take_routes(id, 0, {}));
    engine.take_routes(id, 0, out);
    return out;
  };
  EngineConfig cpu = device_config(1, Layout::kTp);
  cpu.device = "cpu";
  const std::vector<int16_t> expected = routes_of(cpu, 0);
  REQUIRE(!expected.empty());
  std::vector<int16_t> first;
  for (const auto& [ranks, seam] : {std::pair{1, 4}, {2, 0}, {3, 4}, {2, 2}}) {
    const std::vector<int16_t> routes = routes_of(device_config(ranks, Layout::kTp), seam);
    INFO("ranks " << ranks << ", seam " << seam);
    if (first.empty()) first = routes;
    CHECK(routes == first);
  }
  REQUIRE(first.size() == expected.size());
  size_t equal = 0;
  for (size_t i = 0; i < first.size(); ++i) equal += first[i] == expected[i];
  CHECK(equal * 100 >= first.size() * 98);  // the router's logits differ from the cpu's in the last bits: a tie may fall the other way
}

TEST_CASE("keeping the logits changes no token", "[engine]") {
  std::vector<int32_t> tokens[2];
  for (int keep : {0, 1}) {
    Script script;
    script.requests.push_back({greedy_request("a", prompt_of(4, 6), 8, keep != 0)});
    script.requests[0].spec.sampling.temperature = 1.3;
    const Output output = run_script(kQwen, device_config(2, Layout::kEp), script).outputs.at("a");
    tokens[keep] = output.tokens;
    CHECK(output.logits.empty() == (keep == 0));
  }
  CHECK(tokens[0].size() == 8);
  CHECK(tokens[0] == tokens[1]);
}

TEST_CASE("switches at once and a little in every step, there and back, change no bit", "[engine]") {
  Script script = short_script();
  const Outcome expected = run_script(kQwen, device_config(1, Layout::kTp), script);
  for (int ranks : {2, 4})
    for (double budget : {0.0, 1e-6}) {
      EngineConfig config = device_config(ranks, Layout::kEp);
      config.stall_budget_ms = budget;
      script.switches = {{1, -1}, {3, 0}, {4, 2}};
      INFO("ranks " << ranks << " budget " << budget);
      Engine engine(kQwen, config);
      engine.impl().switcher().set_piece_bytes(4096);
      const Outcome got = Runner(engine).run(script);
      CHECK(got.count(EventType::kSwitchFinished) + got.count(EventType::kSwitchStarted) > 0);
      CHECK(difference(expected, got) == "");
    }
}

TEST_CASE("a fault at any item of any rank is rolled back, and no bit changes", "[engine]") {
  Script script = short_script();
  const Outcome expected = run_script(kQwen, device_config(1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int item = 0; item < 4; ++item) {
      Engine engine(kQwen, device_config(2, start));
      std::atomic<bool> armed{true};
      engine.impl().switcher().hook = [&](const CopyPoint& p) {
        if (p.item == item && p.rank == item % 2 && p.when == CopyPoint::kBetween && armed.exchange(false)) throw Error(Code::kIo, "injected");
      };
      script.switches = {{2, start == Layout::kTp ? 0 : -1}};
      INFO("from " << name_of(start) << " item " << item);
      check_rolled_back(engine, script, expected, start == Layout::kTp ? 4 : 0);
    }
}

TEST_CASE("an engine takes no more of a device than memory_bytes, with all its tables", "[engine]") {
  if (std::string_view(MOEBIUS_TEST_DEVICE) != "cuda-emulated") return;  // a GPU gives in units of its own, and to others
  const std::unique_ptr<Device> device = open_module_device(MOEBIUS_TEST_DEVICE, {.ranks = 2});
  const auto free = [&](int rank) { return device->free_bytes(rank) / 9 * 10; };
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    EngineConfig config = device_config(2, layout);
    config.kv_tokens = 0;
    config.memory_bytes = 24 << 20;
    const int64_t before[] = {free(0), free(1)};
    Engine engine(kQwen, config);
    for (int r : {0, 1}) {
      const int64_t taken = before[r] - free(r);
      INFO("rank " << r << " " << name_of(layout) << ": " << taken << " of " << config.memory_bytes);
      CHECK(taken <= config.memory_bytes + 8 * 4096);  // each allocation is of whole pages
      CHECK(taken > config.memory_bytes / 100 * 98);
    }
  }
}

TEST_CASE("what a device cannot do is refused before anything is loaded", "[engine]") {
  using Catch::Matchers::Contains;
  EngineConfig config = device_config(2, Layout::kTp);
  config.threads = 2;
  CHECK_THAT(refusal(config), Contains("threads is 2"));
  config.threads = 0;
  config.mode = "quick";
  CHECK_THAT(refusal(config), Contains("mode is 'quick', must be exact or fast"));
  config.mode = "fast";
  config.communicator = "smoke";
  CHECK_THAT(refusal(config), Contains("communicator is 'smoke', must be peer or nccl"));
  config.communicator = "peer";
  config.device_ids = {0};
  CHECK_THAT(refusal(config), Contains("device_ids has 1 entries, there are 2 ranks"));
  config.device_ids = {0, 99};
  CHECK_THAT(refusal(config), Contains("device 99 of rank 1"));
  config.device_ids = {0, 0};
  CHECK(refusal(config) == "accepted");
  config.memory_bytes = int64_t{1} << 60;
  CHECK_THAT(refusal(config), Contains("memory_bytes"));
  config.memory_bytes = 0;
  ModelCopy narrow(kQwen);
  narrow.set("config.json", "head_dim", 20);
  config.dummy_weights = true;
  CHECK_THAT(refusal(config, narrow.path()), Contains("head_dim is 20, on a GPU it must be a multiple of 8"));
  ModelCopy endless(kQwen);
  endless.set("config.json", "max_position_embeddings", (1 << 25) + 1);
  config.max_context = 0;
  CHECK_THAT(refusal(config, endless.path()), Contains("max_context is 33554433, on a GPU at most 33554432"));
  config.device = "no-such";
  CHECK_THAT(refusal(config), Contains("libmoebius-no-such.so was not found"));
}

}  // namespace moebius::test
