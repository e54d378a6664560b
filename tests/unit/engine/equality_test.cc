// design.md §4.1: logits and tokens are the same bits whatever the layout, seam, ranks, threads, batch, chunking and switches.
#include "lib/cpu/cpu_ops.h"
#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

const std::vector<std::string> kModels = {kQwen, kDense, kMixtral};

Script three_requests() {
  Script s;
  s.requests.push_back({greedy_request("a", prompt_of(1, 37), 9, true)});
  s.requests.push_back({greedy_request("b", prompt_of(2, 1), 12, true), 1});
  s.requests.push_back({greedy_request("c", prompt_of(3, 70), 6, true), 2});
  return s;
}

Outcome baseline(const std::string& model, const Script& script) {
  return run_script(model, small_config(1, 1, Layout::kTp), script);
}

}  // namespace

TEST_CASE("every number of ranks and threads gives the bits of one, in TP and in EP") {
  for (const std::string& model : kModels) {
    const Script script = three_requests();
    const Outcome expected = baseline(model, script);
    REQUIRE(expected.outputs.at("a").logits.size() == (37 + 9 - 1) * 512u);
    for (int ranks : {1, 2, 4, 8})
      for (int threads : {1, 2})
        for (Layout layout : {Layout::kTp, Layout::kEp}) {
          INFO(model << " ranks " << ranks << " threads " << threads << " " << name_of(layout));
          CHECK(difference(expected, run_script(model, small_config(ranks, threads, layout), script)) == "");
        }
  }
}

TEST_CASE("ranks that do not divide the model evenly give the same bits") {
  const Script script = three_requests();
  for (const std::string& model : kModels) {
    const Outcome expected = baseline(model, script);
    for (int ranks : {3, 5, 7})
      for (Layout layout : {Layout::kTp, Layout::kEp}) {
        INFO(model << " ranks " << ranks << " " << name_of(layout));
        CHECK(difference(expected, run_script(model, small_config(ranks, 1, layout), script)) == "");
      }
  }
}

TEST_CASE("every seam held still gives the same bits") {
  for (const std::string& model : kModels) {
    Script script = three_requests();
    const Outcome expected = baseline(model, script);
    const int layers = model == kDense ? 6 : 4;
    for (int seam = 0; seam <= layers; ++seam)
      for (Layout start : {Layout::kTp, Layout::kEp}) {
        script.switches = {{0, seam}};
        INFO(model << " seam " << seam << " from " << name_of(start));
        CHECK(difference(expected, run_script(model, small_config(2, 1, start), script)) == "");
      }
  }
}

TEST_CASE("any chunk size gives the same bits") {
  const Script script = three_requests();
  const Outcome expected = baseline(kQwen, script);
  for (int chunk : {1, 2, 7, 16, 33, 512})
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      EngineConfig config = small_config(2, 1, layout);
      config.chunk_tokens = chunk;
      INFO("chunk " << chunk << " " << name_of(layout));
      CHECK(difference(expected, run_script(kQwen, config, script)) == "");
    }
}

TEST_CASE("any page size gives the same bits") {
  const Script script = three_requests();
  const Outcome expected = baseline(kMixtral, script);
  for (int page : {16, 32, 64, 256, 512})
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      EngineConfig config = small_config(2, 1, layout);
      config.page_tokens = page;
      INFO("page " << page << " " << name_of(layout));
      CHECK(difference(expected, run_script(kMixtral, config, script)) == "");
    }
}

TEST_CASE("on every kernel path TP, EP, a held seam and a switch give the same bits") {
  Script script = three_requests();
  for (const Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable}) {
    if (!isa_available(isa)) continue;
    const auto outcome = [&](int ranks, Layout layout, std::vector<ScriptedSwitch> switches) {
      EngineConfig config = small_config(ranks, 1, layout);
      config.isa = isa_name(isa);
      script.switches = std::move(switches);
      return run_script(kQwen, config, script);
    };
    const Outcome expected = outcome(1, Layout::kTp, {});
    INFO(isa_name(isa));
    CHECK(difference(expected, outcome(2, Layout::kTp, {})) == "");
    CHECK(difference(expected, outcome(2, Layout::kEp, {})) == "");
    CHECK(difference(expected, outcome(3, Layout::kTp, {{0, 2}})) == "");
    CHECK(difference(expected, outcome(2, Layout::kTp, {{5, 0}})) == "");
  }
}

TEST_CASE("a request alone gives the bits it gives among 64") {
  Script alone, crowd;
  alone.requests.push_back({greedy_request("x", prompt_of(77, 41), 10, true)});
  crowd.requests = alone.requests;
  for (int i = 0; i < 63; ++i)
    crowd.requests.push_back({greedy_request("m" + std::to_string(i), prompt_of(100 + i, 1 + i % 50), 5 + i % 7), i % 5});
  const Outcome expected = baseline(kQwen, alone);
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    Outcome got = run_script(kQwen, small_config(2, 2, layout), crowd);
    Outcome only;
    only.outputs["x"] = got.outputs.at("x");
    CHECK(difference(expected, only) == "");
  }
}

TEST_CASE("sampled tokens do not depend on layout, batch mates or chunking") {
  const auto script_with = [](int mates) {
    Script s;
    RequestSpec r = greedy_request("r", prompt_of(5, 20), 20);
    r.sampling.temperature = 0.9;
    r.sampling.top_k = 40;
    r.sampling.top_p = 0.95;
    r.sampling.repetition_penalty = 1.1;
    s.requests.push_back({r, 2});
    for (int i = 0; i < mates; ++i) s.requests.push_back({greedy_request("m" + std::to_string(i), prompt_of(9 + i, 11), 8)});
    return s;
  };
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script_with(0));
  for (int mates : {0, 7})
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      const Outcome got = run_script(kQwen, small_config(2, 1, layout), script_with(mates));
      CHECK(got.outputs.at("r").tokens == expected.outputs.at("r").tokens);
    }
}

}  // namespace moebius::test
