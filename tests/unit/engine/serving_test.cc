// Continuous batching: arrivals, cancels, priorities, preemption, prefix cache, samples, deadlines, the engine's own thread.
#include <atomic>
#include <limits>
#include <thread>

#include "tests/unit/engine/harness.h"
#include "tests/unit/engine/model_copy.h"

namespace moebius::test {
namespace {

Script crowd(int n, int max_tokens) {
  Script s;
  for (int i = 0; i < n; ++i)
    s.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(300 + i, 4 + (i * 7) % 40), max_tokens + i % 5), i / 4});
  return s;
}

}  // namespace

TEST_CASE("when KV runs out requests are preempted and recomputed, and none is lost or changed") {
  const Script script = crowd(10, 40);
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (int ranks : {1, 2})
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      EngineConfig config = small_config(ranks, 1, layout);
      config.kv_tokens = 320;
      Script switching = script;
      if (ranks == 2) switching.switches = {{20, layout == Layout::kTp ? 0 : -1}, {60, layout == Layout::kTp ? -1 : 0}};
      config.stall_budget_ms = 1e-6;
      config.preempt_to_fit = true;
      const Outcome got = run_script(kQwen, config, switching);
      INFO("ranks " << ranks << " " << name_of(layout));
      CHECK(got.count(EventType::kPreempted) > 0);
      CHECK(difference(expected, got) == "");
    }
}

TEST_CASE("while the seam is inside, a home short of pages takes none from requests of another home") {
  // Two requests a home, by turns. r2 opens its 7th page, home 0's 11th of 10, while all four run; r3 has pages, but on home 1.
  constexpr int kPrompt[] = {45, 46, 84, 46}, kMax[] = {60, 34, 50, 34};
  Script script;
  for (int i = 0; i < 4; ++i)
    script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(300 + i, kPrompt[i]), kMax[i]), 0});
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  script.switches = {{6, 2}};
  EngineConfig config = small_config(2, 1, Layout::kEp);
  config.kv_tokens = 320;
  const Outcome got = run_script(kQwen, config, script);
  CHECK(difference(expected, got) == "");
  const auto first = std::find_if(got.events.begin(), got.events.end(), [](const Event& e) { return e.type == EventType::kPreempted; });
  REQUIRE(first != got.events.end());
  CHECK(first->request == 3);
}

TEST_CASE("a preempted request's logits come once for each position, with the bits they have without preemption") {
  Script script = crowd(10, 40);
  for (ScriptedRequest& r : script.requests) r.spec.keep_logits = true;
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  REQUIRE(expected.count(EventType::kPreempted) == 0);
  for (const ScriptedRequest& r : script.requests) {
    const Output& o = expected.outputs.at(r.spec.id);
    REQUIRE(o.logits.size() == (r.spec.prompt_ids.size() + o.tokens.size() - 1) * 512);
  }
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    EngineConfig config = small_config(2, 1, layout);
    config.kv_tokens = 320;
    const Outcome got = run_script(kQwen, config, script);
    CHECK(got.count(EventType::kPreempted) > 0);
    CHECK(difference(expected, got) == "");
  }
}

TEST_CASE("a cancel at any step, queued, in prefill, in decode or in the middle of a switch, leaves the others alone") {
  Script script = crowd(6, 12);
  script.requests.push_back({greedy_request("victim", prompt_of(999, 150), 20), 2});
  const Outcome expected = without(run_script(kQwen, small_config(1, 1, Layout::kTp), script), {"victim"});
  for (int64_t cancel = 2; cancel < 16; ++cancel)
    for (double budget : {0.0, 1e-6}) {
      script.requests.back().cancel_step = cancel;
      script.switches = {{4, 0}, {10, -1}};
      EngineConfig config = small_config(2, 1, Layout::kTp);
      config.chunk_tokens = 32;
      config.stall_budget_ms = budget;
      const Outcome got = run_script(kQwen, config, script);
      INFO("cancel at " << cancel);
      REQUIRE(got.outputs.count("victim") == 1);
      CHECK(got.outputs.at("victim").reason == FinishReason::kAbort);
      CHECK(difference(expected, without(got, {"victim"})) == "");
    }
}

TEST_CASE("a page freed in the middle of a switch and used again holds its new owner's KV") {
  // Small pools: pages of the cancelled request go to the ones that arrive while the seam is inside.
  Script script;
  for (int i = 0; i < 4; ++i) script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(40 + i, 60), 20), 0});
  for (int i = 4; i < 8; ++i) script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(40 + i, 60), 20), 8});
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (int64_t cancel = 4; cancel < 14; ++cancel)
    for (Layout start : {Layout::kTp, Layout::kEp}) {
      Script s = script;
      s.requests[1].cancel_step = cancel;
      s.requests[2].cancel_step = cancel + 1;
      s.switches = {{3, start == Layout::kTp ? 0 : -1}};
      EngineConfig config = small_config(2, 1, start);
      config.kv_tokens = 480;
      config.stall_budget_ms = 1e-6;
      config.preempt_to_fit = true;
      const Outcome got = run_script(kQwen, config, s);
      INFO("cancel " << cancel << " from " << name_of(start));
      CHECK(difference(without(expected, {"r1", "r2"}), without(got, {"r1", "r2"})) == "");
    }
}

TEST_CASE("prefix hits change no bit, across switches, whichever home has the pages") {
  const std::vector<int32_t> common = prompt_of(7, 80);
  Script script;
  for (int i = 0; i < 8; ++i) {
    std::vector<int32_t> prompt = common;
    const std::vector<int32_t> tail = prompt_of(500 + i, 5 + i);
    prompt.insert(prompt.end(), tail.begin(), tail.end());
    script.requests.push_back({greedy_request("r" + std::to_string(i), prompt, 10), i * 4});
  }
  EngineConfig plain = small_config(1, 1, Layout::kTp);
  plain.prefix_cache = false;
  const Outcome expected = run_script(kQwen, plain, script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (double budget : {0.0, 1e-6}) {
      Script switching = script;
      switching.switches = {{6, start == Layout::kTp ? 0 : -1}, {17, start == Layout::kTp ? -1 : 0}, {23, start == Layout::kTp ? 0 : -1}};
      EngineConfig config = small_config(3, 1, start);
      config.stall_budget_ms = budget;
      Engine engine(kQwen, config);
      const Outcome got = Runner(engine).run(switching);
      CHECK(engine.stats().prefix_hits > 0);
      CHECK(difference(expected, got) == "");
    }
}

TEST_CASE("blocks are found by keys that start at the engine's own random one") {
  Engine engine(kQwen, small_config(1, 1, Layout::kTp));
  const std::vector<int32_t> prompt = prompt_of(3, 40);
  engine.submit(greedy_request("a", prompt, 3));
  while (engine.step().worked) {}
  const KvManager& kv = engine.impl().kv();
  const std::span<const int32_t> block(prompt.data(), static_cast<size_t>(kv.page_tokens()));
  CHECK(kv.contains(extend_key(kv.first_key(), block), -1));
  CHECK_FALSE(kv.contains(extend_key({}, block), -1));
}

TEST_CASE("only tokens that are looked up count as queries of the prefix cache") {
  const auto queries = [](bool prefix_cache, bool keep_logits) {
    EngineConfig config = small_config(2, 1, Layout::kEp);
    config.prefix_cache = prefix_cache;
    Engine engine(kQwen, config);
    engine.submit(greedy_request("a", prompt_of(3, 40), 3, keep_logits));
    while (engine.step().worked) {}
    return engine.stats().prefix_queries;
  };
  CHECK(queries(true, false) == 40);
  CHECK(queries(true, true) == 0);
  CHECK(queries(false, false) == 0);
}

TEST_CASE("log-probabilities after a prefix hit have the bits they have without one") {
  const auto logprobs = [](const EngineConfig& config, int times) {
    Engine engine(kQwen, config);
    std::vector<Event> tokens, events(256);
    for (int i = 0; i < times; ++i) {
      RequestSpec spec = greedy_request("", prompt_of(7, 90), 8);
      spec.sampling.logprobs = 20;
      engine.submit(spec);
      tokens.clear();  // of the last time
      while (engine.step().worked)
        for (size_t n; (n = engine.poll(events, 0)) > 0;)
          for (size_t k = 0; k < n; ++k)
            if (events[k].type == EventType::kToken) tokens.push_back(events[k]);
      if (i > 0) REQUIRE(engine.stats().prefix_hits > 0);
    }
    return tokens;
  };
  EngineConfig plain = small_config(1, 1, Layout::kTp);
  plain.prefix_cache = false;
  const std::vector<Event> expected = logprobs(plain, 1);
  REQUIRE(expected.size() == 8);
  for (int ranks : {1, 3})
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      const std::vector<Event> got = logprobs(small_config(ranks, 1, layout), 2);
      REQUIRE(got.size() == expected.size());
      for (size_t i = 0; i < got.size(); ++i) {
        CHECK(got[i].token == expected[i].token);
        CHECK(std::memcmp(&got[i].logprob, &expected[i].logprob, sizeof(float)) == 0);
        CHECK(got[i].num_top == 20);
        CHECK(std::memcmp(&got[i].top, &expected[i].top, sizeof got[i].top) == 0);
      }
    }
}

TEST_CASE("cached pages survive a round trip of switches") {
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  const auto run_one = [&](const std::string& id) {
    Script s;
    s.requests.push_back({greedy_request(id, prompt_of(7, 90), 5)});
    return Runner(engine, true).run(s).outputs.at(id).tokens;
  };
  const auto first = run_one("a");
  engine.request_switch(Layout::kEp);
  CHECK(engine.step().worked);  // though no request runs
  engine.request_switch(Layout::kTp);
  engine.step();
  CHECK_FALSE(engine.step().worked);
  const uint64_t hits = engine.stats().prefix_hits;
  CHECK(run_one("b") == first);
  CHECK(engine.stats().prefix_hits - hits == 80);  // five whole pages of the 89 tokens that may be reused
}

TEST_CASE("samples of one prompt share its pages and differ by seed") {
  const Script script = samples_of_a_prompt(64, 12, 4);
  Engine engine(kQwen, small_config(1, 1, Layout::kTp));
  const Outcome got = Runner(engine).run(script);
  REQUIRE(got.outputs.size() == 4);
  CHECK(got.outputs.at("n.0").tokens != got.outputs.at("n.1").tokens);
  CHECK(engine.stats().prefix_hits >= 3 * 48);
  const Outcome again = run_script(kQwen, small_config(2, 1, Layout::kEp), script);
  CHECK(difference(got, again) == "");
}

TEST_CASE("in EP the samples of a prompt divide over the homes, and each home computes it once") {
  const Script script = samples_of_a_prompt(150, 12, 4);  // three chunks; 9 of its pages can be shared
  Engine tp(kQwen, small_config(1, 1, Layout::kTp));
  const Outcome expected = Runner(tp).run(script);
  CHECK(tp.stats().prefix_hits == 3 * 144);
  for (auto [ranks, hits] : {std::pair{1, uint64_t{3}}, {2, 2}, {3, 1}, {4, 0}}) {
    Engine ep(kQwen, small_config(ranks, 1, Layout::kEp));
    const Outcome got = Runner(ep).run(script);
    INFO("ranks " << ranks);
    CHECK(ep.stats().prefix_hits == hits * 144);
    CHECK(difference(expected, got) == "");
  }
  EngineConfig plain = small_config(2, 1, Layout::kEp);
  plain.prefix_cache = false;
  Engine ep(kQwen, plain);
  CHECK(difference(expected, Runner(ep).run(script)) == "");
  CHECK(ep.stats().prefix_hits == 0);
}

TEST_CASE("samples share pages that hold no more than one of them would take by itself") {
  // 10 pages a home: a prompt of 7 pages and one of its own for each of 3 samples.
  const Script script = samples_of_a_prompt(113, 10, 3);
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    EngineConfig config = small_config(1, 1, layout);
    config.kv_tokens = 160;
    Engine engine(kQwen, config);
    int32_t most = 0;
    engine.submit(script.requests[0].spec);
    while (engine.step().worked) most = std::max(most, engine.stats().running);
    CHECK(most == 3);
    CHECK(engine.stats().preemptions == 0);
  }
}

TEST_CASE("in EP a request goes to the home that has its prefix when no other has fewer requests") {
  // Two prefixes, a home each at first; longer requests of the second make its home the one with more tokens.
  const auto prompt = [](int prefix, int tail, int length) {
    std::vector<int32_t> p = prompt_of(static_cast<uint32_t>(700 + prefix), 64);
    const std::vector<int32_t> end = prompt_of(static_cast<uint32_t>(800 + tail), length);
    p.insert(p.end(), end.begin(), end.end());
    return p;
  };
  Script script;
  script.requests.push_back({greedy_request("a", prompt(0, 0, 5), 40), 0});
  script.requests.push_back({greedy_request("b", prompt(1, 1, 70), 40), 2});
  for (int i = 2; i < 6; ++i)  // every other one finds as many requests on both homes, but more tokens on its prefix's
    script.requests.push_back({greedy_request("r" + std::to_string(i), prompt(1 - i % 2, i, 9 + i), 40), 4 + 3 * i});
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  Engine engine(kQwen, small_config(2, 1, Layout::kEp));
  CHECK(difference(expected, Runner(engine).run(script)) == "");
  CHECK(engine.stats().prefix_hits == 4 * 64);
}

TEST_CASE("an explicit seed gives the same samples whatever the request is called and when it comes; without one the id decides") {
  const auto tokens = [](Engine& engine, const std::string& id, std::optional<uint64_t> seed, int n) {
    RequestSpec spec = greedy_request(id, prompt_of(3, 10), 12);
    spec.sampling.temperature = 1.5;
    spec.sampling.seed = seed;
    spec.sampling.n = n;
    const uint64_t number = engine.submit(spec);
    std::vector<std::vector<int32_t>> out(static_cast<size_t>(n));
    std::vector<Event> events(256);
    while (engine.step().worked)
      for (size_t count; (count = engine.poll(events, 0)) > 0;)
        for (size_t i = 0; i < count; ++i)
          if (events[i].type == EventType::kToken && events[i].request == number) out[static_cast<size_t>(events[i].sample)].push_back(events[i].token);
    return out;
  };
  Engine engine(kQwen, small_config(1, 1, Layout::kTp));
  const auto first = tokens(engine, "", 0, 3);
  CHECK(first[0].size() == 12);
  CHECK(first[0] != first[1]);
  CHECK(tokens(engine, "", 0, 3) == first);  // its default id is its number, which is another one now
  CHECK(tokens(engine, "named", 0, 3) == first);
  CHECK(tokens(engine, "named", 0, 1)[0] == first[0]);  // n adds samples, it does not change them
  CHECK(tokens(engine, "named", 1, 3) != first);
  const auto unset = tokens(engine, "named", std::nullopt, 2);
  CHECK(tokens(engine, "named", std::nullopt, 2) == unset);
  CHECK(tokens(engine, "other", std::nullopt, 2) != unset);
}

TEST_CASE("the engine's metrics count each prompt token once, name the model's folder, and see what went wrong") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.kv_tokens = 320;
  config.max_queue = 10;
  Engine engine(kQwen + "/", config);
  Script script = crowd(10, 40);
  script.switches = {{30, 0}};
  size_t prompts = 0;
  for (const ScriptedRequest& r : script.requests) prompts += r.spec.prompt_ids.size();
  const Outcome got = Runner(engine).run(script);
  REQUIRE(got.count(EventType::kPreempted) > 0);
  CHECK(engine.stats().prompt_tokens == prompts);
  RequestSpec many = greedy_request("many", {5, 6, 7}, 3);
  many.sampling.n = 4;
  engine.submit(many);
  RequestSpec more = greedy_request("more", {5, 6, 7}, 3);
  more.sampling.n = 7;
  CHECK_THROWS_AS(engine.submit(more), Error);  // 4 + 7 > 10
  while (engine.step().worked) {}
  const std::string text = engine.metrics_text();
  const std::string l = "{model_name=\"tiny-qwen3-moe\",engine=\"0\"";
  for (const std::string& part : {"prompt_tokens_total" + l + fmt::format("}} {}", engine.stats().prompt_tokens), "admission_rejections_total" + l + "} 1",
                                  "corrupted_requests_total" + l + "} 0", "request_params_n_count" + l + "} 11", "request_params_n_sum" + l + "} 14",
                                  "mode_switches_total" + l + ",from=\"tp\",to=\"ep\"} 1", "cache_config_info" + l + ",block_size=\"16\",num_tp_blocks="})
    CHECK_THAT(text, Catch::Contains("moebius_" + part));
  const auto value = [&](const std::string& name) { return std::strtod(text.c_str() + text.find("} ", text.find("\nmoebius_" + name + "{")) + 2, nullptr); };
  CHECK(value("load_seconds") > 0);
  CHECK(value("all_reduce_bytes_total") > 0);
  CHECK(value("all_to_all_bytes_total") > 0);
  CHECK(value("expert_load_imbalance") >= 1);
  CHECK(value("expert_load_imbalance") <= 4);  // of 16 experts each row takes 4
}

TEST_CASE("the metrics count requests that no step has seen yet as waiting, and name the engine") {
  EngineConfig config = small_config(1, 1, Layout::kTp);
  config.engine_id = 7;
  Engine engine(kQwen, config);
  const auto waiting = [&] { return fmt::format("moebius_num_requests_waiting{{model_name=\"tiny-qwen3-moe\",engine=\"7\"}} {}\n", engine.stats().waiting); };
  for (int i = 0; i < 2; ++i) engine.submit(greedy_request("", prompt_of(i, 5), 4));
  CHECK(engine.stats().waiting == 2);
  CHECK_THAT(engine.metrics_text(), Catch::Contains(waiting()));
  engine.step();
  CHECK(engine.stats().waiting == 0);
  CHECK_THAT(engine.metrics_text(), Catch::Contains(waiting()));
}

TEST_CASE("lower priority values run first, then arrival") {
  EngineConfig config = small_config(1, 1, Layout::kTp);
  config.max_batch = 1;
  Script script;
  for (int i = 0; i < 3; ++i) script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(i, 5), 4)});
  script.requests[2].spec.priority = -1;
  const Outcome got = run_script(kQwen, config, script);
  std::vector<uint64_t> order;
  for (const Event& e : got.events)
    if (e.type == EventType::kFinished) order.push_back(e.request);
  CHECK(order == std::vector<uint64_t>{3, 1, 2});
}

TEST_CASE("an urgent arrival overtakes the queue, not what runs") {
  EngineConfig config = small_config(1, 1, Layout::kTp);
  config.max_batch = 1;
  Script script;
  for (int i = 0; i < 3; ++i) script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(i, 5), 6)});
  script.requests.push_back({greedy_request("urgent", prompt_of(9, 5), 6), 3});
  script.requests.back().spec.priority = -5;
  std::vector<uint64_t> order;
  for (const Event& e : run_script(kQwen, config, script).events)
    if (e.type == EventType::kFinished) order.push_back(e.request);
  CHECK(order == std::vector<uint64_t>{1, 4, 2, 3});
}

TEST_CASE("when KV runs out the lowest priority goes first, whenever it came") {
  EngineConfig config = small_config(1, 1, Layout::kTp);
  config.kv_tokens = 320;
  Script script = crowd(6, 60);
  for (ScriptedRequest& r : script.requests) r.arrival_step = 0;
  script.requests[1].spec.priority = 7;
  const Outcome got = run_script(kQwen, config, script);
  REQUIRE(got.count(EventType::kPreempted) > 0);
  for (const Event& e : got.events)
    if (e.type == EventType::kPreempted) {
      CHECK(e.request == 2);
      break;
    }
}

TEST_CASE("the workspace counts the logits and the sampler's scratch, which grow with the vocabulary") {
  EngineConfig config = small_config(2, 3, Layout::kTp);
  config.dummy_weights = true;
  ModelCopy model(kQwen);
  Engine small(model.path(), config);
  constexpr int64_t kVocab = 50000;
  model.set("config.json", "vocab_size", kVocab);
  config.kv_tokens = 0;
  config.memory_bytes = int64_t{64} << 20;
  const MemoryReport large = Engine(model.path(), config).memory();
  // Half of 64 rows of floats, and three threads' two floats and one id.
  if (test_device() == nullptr) CHECK(large.workspace_bytes - small.memory().workspace_bytes == (kVocab - small.model().vocab_size) * (64 * 4 / 2 + 3 * 12));
  CHECK(large.arena_bytes + large.workspace_bytes + large.shared_bytes / 2 <= config.memory_bytes);
}

TEST_CASE("arena, workspace and the share of what is common stay within memory_bytes; too little says how much is missing") {
  EngineConfig config = small_config(1, 1, Layout::kTp);
  config.kv_tokens = 0;
  const int64_t scratch = test_device() != nullptr ? 24 << 20 : 0;  // what a GPU's attention has more
  for (int ranks : {1, 2, 3})
    for (int64_t bytes : {(int64_t{24} << 20) + scratch, (int64_t{64} << 20) + scratch}) {
      config.ranks = ranks;
      config.memory_bytes = bytes;
      const MemoryReport m = Engine(kQwen, config).memory();
      INFO("ranks " << ranks << " bytes " << bytes);
      CHECK(m.arena_bytes + m.workspace_bytes + m.shared_bytes / ranks <= bytes);
      CHECK(m.arena_bytes + m.workspace_bytes + m.shared_bytes / ranks > bytes - (1 << 20));  // and are used
      CHECK(m.tp_tokens > 0);
    }
  config.memory_bytes = 1 << 20;
  try {
    Engine engine(kQwen, config);
    FAIL("not refused");
  } catch (const Error& e) {
    CHECK(e.code() == Code::kDoesNotFit);
    CHECK_THAT(e.what(), Catch::Contains("1048576") || Catch::Contains("bytes short"));
    CHECK_THAT(e.what(), Catch::Contains("short"));
  }
}

TEST_CASE("a request that can never run is refused with the layout that is short and its numbers") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.kv_tokens = 256;
  const auto refusal = [&] {
    Engine engine(kQwen, config);
    try {
      engine.submit(greedy_request("a", prompt_of(1, 300), 10));
    } catch (const Error& e) {
      CHECK(e.code() == Code::kDoesNotFit);
      return std::string(e.what());
    }
    return std::string("not refused");
  };
  CHECK_THAT(refusal(), Catch::Contains("20 KV pages of 16 tokens") && Catch::Contains("layout tp holds 16"));
  config.kv_tokens = 512;
  CHECK_THAT(refusal(), Catch::Contains("20 KV pages of 16 tokens") && Catch::Contains("layout ep holds 16"));
}

TEST_CASE("draining waits for a switch that a step has only just taken up") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.stall_budget_ms = 1e-6;
  Engine engine(kQwen, config);
  bool drained = true;
  engine.impl().switcher().open_hook = [&] { drained = engine.drain(0); };
  engine.request_switch(Layout::kEp);
  engine.step();
  CHECK_FALSE(drained);
  while (engine.stats().switching) engine.step();
  CHECK(engine.drain(0));
}

TEST_CASE("a deadline ends a request with abort and its tokens so far") {
  Script script;
  script.requests.push_back({greedy_request("far", prompt_of(3, 5), 900)});
  script.requests.back().spec.deadline_ms = 1e9;
  for (const auto& [id, ms] : {std::pair{"later", 60.0}, {"late", 30.0}}) {
    script.requests.push_back({greedy_request(id, prompt_of(1, 5), 900)});
    script.requests.back().spec.deadline_ms = ms;
  }
  script.requests.push_back({greedy_request("calm", prompt_of(2, 5), 5)});
  const Outcome got = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (const char* id : {"late", "later"}) CHECK(got.outputs.at(id).reason == FinishReason::kAbort);
  for (const char* id : {"calm", "far"}) CHECK(got.outputs.at(id).reason == FinishReason::kLength);
}

TEST_CASE("bad requests are refused at submit with the numbers") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.kv_tokens = 256;
  Engine engine(kQwen, config);
  CHECK_THROWS_WITH(engine.submit(greedy_request("a", {}, 4)), Catch::Contains("empty"));
  CHECK_THROWS_WITH(engine.submit(greedy_request("a", {3, 512}, 4)), Catch::Contains("512"));
  CHECK_THROWS_WITH(engine.submit(greedy_request("a", {3, -1}, 4)), Catch::Contains("-1"));
  CHECK_THROWS_WITH(engine.submit(greedy_request("a", prompt_of(1, 1000), 500)), Catch::Contains("1500"));
  CHECK_THROWS_WITH(engine.submit(greedy_request("a", prompt_of(1, 150), 10)), Catch::Contains("ep"));  // 10 pages, a home has 8
  RequestSpec bad = greedy_request("a", {3}, 4);
  bad.sampling.top_p = 0;
  CHECK_THROWS_WITH(engine.submit(bad), Catch::Contains("top_p"));
  for (double deadline : {-1.0, std::numeric_limits<double>::quiet_NaN()}) {
    bad = greedy_request("a", {3}, 4);
    bad.deadline_ms = deadline;
    CHECK_THROWS_WITH(engine.submit(bad), Catch::Contains("deadline_ms"));
  }
  config.kv_tokens = -1;
  CHECK_THROWS_WITH(Engine(kQwen, config), Catch::Contains("kv_tokens"));
}

TEST_CASE("beyond max_queue submit is refused and nothing is lost") {
  EngineConfig config = small_config(1, 1, Layout::kTp);
  config.max_queue = 2;
  Engine engine(kQwen, config);
  engine.submit(greedy_request("a", {3}, 2));
  engine.submit(greedy_request("b", {4}, 2));
  try {
    engine.submit(greedy_request("c", {5}, 2));
    FAIL("not refused");
  } catch (const Error& e) {
    CHECK(e.code() == Code::kQueueFull);
  }
  engine.step();
  engine.submit(greedy_request("c", {5}, 2));
}

TEST_CASE("the engine's own thread serves requests submitted and cancelled from several threads") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  Engine engine(kQwen, config);
  engine.start();
  constexpr int kThreads = 3, kEach = 8;
  std::vector<std::thread> hosts;
  std::atomic<int> cancelled{0};
  for (int t = 0; t < kThreads; ++t)
    hosts.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        const uint64_t id = engine.submit(greedy_request("", prompt_of(t * 100 + i, 10), 12));
        if (i % 4 == 3 && engine.cancel(id)) ++cancelled;
        if (i % 3 == 0) engine.request_switch(i % 2 ? Layout::kTp : Layout::kEp);
        (void)engine.stats();
        (void)engine.metrics_text();
      }
    });
  for (std::thread& t : hosts) t.join();
  std::vector<Event> events(64);
  int finished = 0;
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (finished < kThreads * kEach && std::chrono::steady_clock::now() < until)
    for (size_t n = engine.poll(events, 100), i = 0; i < n; ++i) finished += events[i].type == EventType::kFinished;
  engine.stop();
  CHECK(finished == kThreads * kEach);
}

TEST_CASE("several engines live in one process") {
  Engine a(kQwen, small_config(2, 1, Layout::kTp)), b(kMixtral, small_config(1, 2, Layout::kEp));
  Script s;
  s.requests.push_back({greedy_request("x", prompt_of(1, 12), 5)});
  const Outcome first = Runner(a).run(s);
  (void)Runner(b).run(s);
  CHECK(difference(first, Runner(a).run(s)) == "");
}

}  // namespace moebius::test
