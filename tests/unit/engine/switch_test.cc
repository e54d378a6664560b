// Switches under live load: not one changed bit, nothing dropped, every byte back where it was.
#include <xmmintrin.h>

#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

// KV of every live block, cached ones too, by block, layer and head, wherever the layout keeps it; replicas must be equal.
std::map<int32_t, std::vector<std::byte>> kv_bytes(Engine& engine, Layout layout) {
  const ModelStore& store = engine.impl().store();
  const KvManager& kv = engine.impl().kv();
  const int64_t slice = store.arena().kv_slice_bytes();
  std::vector<std::vector<std::byte>> arenas;
  for (int r = 0; r < kv.num_homes(); ++r) arenas.push_back(arena_of(engine, r));
  std::map<int32_t, std::vector<std::byte>> out;
  for (int32_t b : kv.live_blocks())
    for (int l = 0; l < engine.model().num_layers; ++l)
      for (int h = 0; h < store.forward(0).num_kv_heads; ++h) {
        const std::byte* first = nullptr;
        for (int r = 0; r < kv.num_homes(); ++r) {
          const auto& heads = store.arena().local_kv_heads(r, layout);
          const auto found = std::find(heads.begin(), heads.end(), h);
          if (found == heads.end() || (layout == Layout::kEp && kv.block(b).home != r)) continue;
          const int32_t page = layout == Layout::kTp ? kv.block(b).tp_page : kv.block(b).ep_page;
          const std::byte* at = arenas[static_cast<size_t>(r)].data() + store.arena().kv_offset(r, layout, l) +
                                (page * static_cast<int64_t>(heads.size()) + (found - heads.begin())) * slice;
          if (first == nullptr)
            out[b].insert(out[b].end(), first = at, at + slice);
          else if (std::memcmp(first, at, slice) != 0)
            FAIL("block " << b << " layer " << l << " head " << h << ": rank " << r << " differs");
        }
        REQUIRE(first != nullptr);
      }
  return out;
}

}  // namespace

TEST_CASE("a switch at every step, in both directions, at once and incremental, changes no bit") {
  for (const std::string& model : {kQwen, kDense}) {
    Script script = busy_script();
    const Outcome expected = run_script(model, small_config(1, 1, Layout::kTp), script);
    for (Layout start : {Layout::kTp, Layout::kEp})
      for (auto [budget, pieces] : {std::pair{0.0, int64_t{0}}, {1e-6, 0}, {1e-6, 16 * kSmallPieces}, {0.05, 16 * kSmallPieces}})
        for (int64_t step = 0; step < 16; step += kSweep) {
          script.switches = {{step, start == Layout::kTp ? 0 : -1}};
          EngineConfig config = small_config(2, 1, start);
          config.stall_budget_ms = budget;
          INFO(model << " from " << name_of(start) << " at step " << step << " budget " << budget << " pieces " << pieces);
          const Outcome got = run_script(model, config, script, pieces);
          CHECK(difference(expected, got) == "");
          CHECK(got.count(EventType::kSwitchStarted) == 1);
        }
  }
}

TEST_CASE("a switch at every step of a run that preempts, with a cancel right after, changes no bit") {
  Script script;
  for (int i = 0; i < 6; ++i)
    script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(20 + i, 24 + i), 22, true), i / 3});
  script.requests.push_back({greedy_request("victim", prompt_of(90, 30), 30), 1});
  for (auto [model, ranks, threads, stride] : {std::tuple{kQwen, 2, 1, 1}, {kMixtral, 4, 2, 9}}) {
    const Outcome expected = without(run_script(model, small_config(1, 1, Layout::kTp), script), {"victim"});
    for (Layout start : {Layout::kTp, Layout::kEp})
      for (auto [budget, pieces] : {std::pair{0.0, int64_t{0}}, {1e-6, 16 * kSmallPieces}}) {
        int between = 0;  // preemptions while the seam was inside
        for (int64_t step = 0; step < 18; step += stride * kSweep) {
          script.requests.back().cancel_step = step + 2;
          script.switches = {{step, start == Layout::kTp ? 0 : -1}};
          EngineConfig config = small_config(ranks, threads, start);
          config.kv_tokens = ranks == 4 ? 256 : 192;
          config.preempt_to_fit = true;
          config.stall_budget_ms = budget;
          INFO(model << " from " << name_of(start) << " at step " << step << " budget " << budget);
          const Outcome got = run_script(model, config, script, pieces);
          CHECK(got.count(EventType::kPreempted) > 0);
          CHECK(got.count(EventType::kSwitchFinished) == 1);
          CHECK(got.outputs.at("victim").reason == FinishReason::kAbort);
          CHECK(difference(expected, without(got, {"victim"})) == "");
          bool moving = false;
          for (const Event& e : got.events) {
            if (e.type == EventType::kSwitchStarted) moving = true;
            if (e.type == EventType::kSwitchFinished) moving = false;
            between += moving && e.type == EventType::kPreempted;
          }
        }
        INFO(model << " from " << name_of(start) << " budget " << budget);
        CHECK((between > 0 || budget == 0));
      }
  }
}

TEST_CASE("switching back and forth without pause, on any number of ranks, changes no bit") {
  Script script = busy_script();
  const Outcome expected = run_script(kMixtral, small_config(1, 1, Layout::kTp), script);
  for (int64_t step = 0; step < 18; ++step) script.switches.push_back({step, step % 2 == 0 ? 0 : -1});
  for (int ranks : {2, 3, 4, 8})
    for (auto [budget, pieces] : {std::pair{0.0, int64_t{0}}, {1e-6, 0}, {1e-6, kSmallPieces}}) {
      EngineConfig config = small_config(ranks, 1, Layout::kTp);
      config.stall_budget_ms = budget;
      INFO("ranks " << ranks << " budget " << budget << " pieces " << pieces);
      CHECK(difference(expected, run_script(kMixtral, config, script, pieces)) == "");
    }
}

TEST_CASE("a turn-round after copying ahead changes no bit") {
  // With the smallest budget each step copies one piece: turns fall between copying ahead and the fence.
  Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (int64_t pieces : {int64_t{0}, kSmallPieces, 16 * kSmallPieces})
    for (int64_t first = 0; first < 4; ++first)
      for (int64_t turn = 1; turn < 6; turn += kSweep) {
        script.switches = {{first, 0}, {first + turn, -1}, {first + turn + 2, 0}, {first + turn + 5, -1}};
        EngineConfig config = small_config(2, 2, Layout::kTp);
        config.stall_budget_ms = 1e-6;
        INFO("pieces " << pieces << " first " << first << " turn " << turn);
        CHECK(difference(expected, run_script(kQwen, config, script, pieces)) == "");
      }
}

TEST_CASE("weights and KV, of cached blocks too, are the same bytes after a round trip from either end, at once or copied ahead") {
  int64_t turn = 0;
  for (const std::string& model : {kQwen, kDense, kMixtral})
    for (int ranks : {2, 3, 8})
      for (Layout start : {Layout::kTp, Layout::kEp})
        for (double budget : {0.0, 1e-6}) {
          if (turn++ % kSweep != 0) continue;
          Engine engine(model, small_config(ranks, 1, start));
          for (int i = 0; i < 9; ++i)
            engine.submit(greedy_request("r" + std::to_string(i), prompt_of(60 + i, 5 + 9 * i), i % 3 == 2 ? 2 : 60));
          for (int i = 0; i < 12; ++i) engine.step();
          const KvManager& kv = engine.impl().kv();
          Switcher& switcher = engine.impl().switcher();
          switcher.set_piece_bytes(16 * kSmallPieces);
          const auto end_of = [&](Layout layout) { return layout == Layout::kTp ? switcher.num_layers() : 0; };
          INFO(model << " ranks " << ranks << " from " << name_of(start) << " budget " << budget);
          REQUIRE(engine.stats().running == 6);
          REQUIRE(static_cast<int64_t>(kv.live_blocks().size()) > kv.blocks_in_use());  // some are cached
          switcher.begin(end_of(start), false);                                         // a switch to the present layout moves nothing
          const auto weights = weight_bytes(engine);
          const auto blocks = kv_bytes(engine, start);
          int64_t ahead = 0;  // blocks seen copied ahead
          const auto go = [&](Layout to) {
            REQUIRE(switcher.begin(end_of(to), false));
            while (switcher.moving()) {
              switcher.advance(budget);
              for (int32_t b : kv.live_blocks()) ahead += kv.block(b).copied_item >= 0;
            }
            REQUIRE(switcher.seam() == end_of(to));
          };
          go(other(start));
          CHECK((blocks == kv_bytes(engine, other(start))));  // the same KV, by head, in the other layout
          go(start);
          CHECK((weights == weight_bytes(engine)));
          CHECK((blocks == kv_bytes(engine, start)));
          CHECK((ahead > 0) == (budget > 0));
        }
}

TEST_CASE("a fault at any item, rank, direction and moment of a copy is rolled back and no token changes") {
  Script script = busy_script();
  for (auto [model, layers] : {std::pair{kQwen, 4}, {kDense, 6}}) {  // of the dense model's layers some have no experts
    const Outcome expected = run_script(model, small_config(1, 1, Layout::kTp), script);
    int64_t turn = 0;
    for (Layout start : {Layout::kTp, Layout::kEp})
      for (auto when : {CopyPoint::kBefore, CopyPoint::kBetween, CopyPoint::kAfter})
        for (int bad_item = 0; bad_item < layers; ++bad_item)
          for (int bad_rank = 0; bad_rank < 3; ++bad_rank)
            for (auto [budget, pieces] : {std::pair{0.0, int64_t{1} << 20}, {1e-6, 1 << 20}, {1e-6, 16 * kSmallPieces}}) {
              if (turn++ % kSweep != 0) continue;
              EngineConfig config = small_config(3, 1, start);
              config.stall_budget_ms = budget;
              Engine engine(model, config);
              engine.impl().switcher().set_piece_bytes(pieces);
              int faults = 0;
              engine.impl().switcher().hook = [&](const CopyPoint& p) {
                if (p.when == when && p.item == bad_item && p.rank == bad_rank && !p.undoing && faults == 0) {
                  ++faults;
                  throw Error(Code::kIo, "injected");
                }
              };
              script.switches = {{4, start == Layout::kTp ? 0 : -1}};
              INFO(model << " from " << name_of(start) << " item " << bad_item << " rank " << bad_rank << " when " << int{when}
                         << " budget " << budget << " pieces " << pieces);
              check_rolled_back(engine, script, expected, start == Layout::kTp ? layers : 0);
              CHECK(faults == 1);
            }
  }
}

TEST_CASE("a switch after a rolled-back one succeeds") {
  Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  EngineConfig config = small_config(2, 1, Layout::kTp);
  Engine engine(kQwen, config);
  bool armed = true;
  engine.impl().switcher().hook = [&](const CopyPoint& p) {
    if (p.starts_rank() && p.item == 1 && p.rank == 1 && std::exchange(armed, false)) throw Error(Code::kIo, "injected");
  };
  script.switches = {{3, 0}, {5, 0}, {9, -1}};
  const Outcome got = Runner(engine).run(script);
  CHECK(got.count(EventType::kRolledBack) == 1);
  CHECK(got.count(EventType::kSwitchFinished) == 2);
  CHECK(difference(expected, got) == "");
}

TEST_CASE("a rank that is only slow is waited for, and wakes into a world that has gone back") {
  Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.wait_deadline_ms = 300 * kSlower;
  Engine engine(kQwen, config);
  std::atomic<bool> slow{true};
  engine.impl().switcher().hook = [&](const CopyPoint& p) {
    // Past the fence's deadline, within the one for acknowledging.
    if (p.starts_rank() && p.item == 2 && p.rank == 1 && slow.exchange(false)) std::this_thread::sleep_for(std::chrono::milliseconds(400 * kSlower));
  };
  script.switches = {{4, 0}};
  const Outcome got = Runner(engine).run(script);
  CHECK(got.count(EventType::kRolledBack) == 1);
  CHECK(difference(expected, got) == "");
}

TEST_CASE("a rank that never answers ends every request with a status, and later calls say so") {
  EngineConfig config = small_config(2, 1, Layout::kTp);
  config.wait_deadline_ms = 100 * kSlower;
  Engine engine(kQwen, config);
  static std::atomic<bool> release{false};  // outlives the detached thread's last look at it
  engine.impl().switcher().hook = [](const CopyPoint& p) {
    if (p.starts_rank() && p.rank == 1)
      while (!release) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  const uint64_t a = engine.submit(greedy_request("a", prompt_of(1, 9), 20));
  for (int i = 0; i < 3; ++i) engine.step();
  engine.request_switch(Layout::kEp);
  CHECK_THROWS_AS(engine.step(), Error);
  CHECK_THROWS_AS(engine.step(), Error);
  CHECK_THROWS_AS(engine.submit(greedy_request("b", prompt_of(1, 9), 20)), Error);
  std::vector<Event> events(64);
  int finals = 0;
  for (size_t n = engine.poll(events, 0), i = 0; i < n; ++i)
    if (events[i].type == EventType::kFinished && events[i].request == a) finals += events[i].finish_reason == FinishReason::kError;
  CHECK(finals == 1);
  release = true;
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
}

TEST_CASE("when the way back fails too, every request gets its final status") {
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  engine.impl().switcher().hook = [&](const CopyPoint& p) {
    if ((p.item == 1 && p.rank == 0 && p.to == Layout::kEp) || p.to == Layout::kTp) throw Error(Code::kIo, "injected");
  };
  engine.submit(greedy_request("a", prompt_of(1, 9), 20));
  engine.submit(greedy_request("b", prompt_of(2, 9), 20));
  engine.step();
  engine.request_switch(Layout::kEp);
  CHECK_THROWS_AS(engine.step(), Error);
  std::vector<Event> events(64);
  int finals = 0;
  for (size_t n = engine.poll(events, 0), i = 0; i < n; ++i) finals += events[i].type == EventType::kFinished;
  CHECK(finals == 2);
}

TEST_CASE("a rank that fails in a step ends every request with a status instead of hanging") {
  EngineConfig config = small_config(2, 2, Layout::kTp);
  Engine engine(kQwen, config);
  engine.submit(greedy_request("a", prompt_of(1, 9), 20));
  engine.step();
  engine.impl().step_hook = [](int rank, int thread) {
    if (rank == 1 && thread == threads_here(2) - 1) throw Error(Code::kIo, "injected");
  };
  CHECK_THROWS_WITH(engine.step(), Catch::Contains("injected"));
  CHECK_THROWS_AS(engine.step(), Error);
}

TEST_CASE("a host thread with flush-to-zero and another rounding mode changes no bit, and keeps its mode") {
  const Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(2, 2, Layout::kTp), script);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040 | 0x6000);  // flush to zero, denormals are zero, round toward zero
  const unsigned odd = _mm_getcsr();
  Script switching = script;
  switching.switches = {{3, 0}, {7, -1}};
  const Outcome got = run_script(kQwen, small_config(2, 2, Layout::kTp), switching);
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  CHECK(after == odd);
  CHECK(difference(expected, got) == "");
}

TEST_CASE("a switch that cannot fit is refused before anything changes, with the shortage") {
  // The EP pools of 8 homes hold less of one long request than TP does.
  EngineConfig config = small_config(8, 1, Layout::kTp);
  config.kv_tokens = 8 * 64;
  Engine engine(kQwen, config);
  for (int i = 0; i < 9; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 30), 30));
  for (int i = 0; i < 8; ++i) engine.step();
  const EngineStats before = engine.stats();
  REQUIRE(before.running == 9);
  const SwitchEstimate estimate = engine.estimate_switch(Layout::kEp);
  CHECK_FALSE(estimate.fits);
  engine.request_switch(Layout::kEp);
  engine.step();
  std::vector<Event> events(512);
  bool refused = false;
  for (size_t n = engine.poll(events, 0), i = 0; i < n; ++i)
    if (events[i].type == EventType::kSwitchRefused) {
      refused = true;
      CHECK_THAT(events[i].reason, Catch::Contains("tokens short"));
    }
  CHECK(refused);
  CHECK(engine.stats().seam == before.seam);
  CHECK(engine.stats().running == 9);
  CHECK(engine.stats().refusals == 1);
}

TEST_CASE("a switch to EP fits at half full memory, one request longer than half a home, whatever the order of arrival") {
  // Four homes of 8 pages. Nine short requests before it, one page each, would leave the long one 6 pages on a home; it takes 7.
  for (int place : {0, 4, 9}) {
    EngineConfig config = small_config(4, 1, Layout::kTp);
    config.kv_tokens = 4 * 128;
    config.chunk_tokens = 512;
    Engine engine(kQwen, config);
    const auto submit = [&](int i, int prompt) { engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, prompt), 9)); };
    for (int i = 0; i < 10; ++i) submit(i, i == place ? 105 : 10);
    engine.step();
    REQUIRE(engine.stats().running == 10);
    REQUIRE(engine.impl().kv().blocks_in_use() == 16);
    INFO("the long one is number " << place);
    CHECK(engine.estimate_switch(Layout::kEp).fits);
  }
}

TEST_CASE("a switch to TP fits when equal prefixes of several homes take one page each") {
  // Four samples of 7 pages, 6 of them shared: two homes of 8 pages are full, and the next tokens want 4 pages more. In TP it is
  // 6 + 4 + 4 of 16.
  Script script = samples_of_a_prompt(111, 16, 4);
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  EngineConfig config = small_config(2, 1, Layout::kEp);
  config.kv_tokens = 256;
  bool needed = false;
  for (int64_t step = 2; step < 8; ++step) {
    Engine engine(kQwen, config);
    engine.submit(script.requests[0].spec);
    for (int64_t i = 0; i < step; ++i) engine.step();
    const KvManager& kv = engine.impl().kv();
    int64_t most = kv.blocks_in_use();
    for (const Sequence* s : engine.impl().scheduler().running()) most += s->tokens.size() + 1 > s->blocks.size() * 16;
    needed = needed || most > kv.tp_capacity();
    CHECK(engine.estimate_switch(Layout::kTp).fits);
    script.switches = {{step, -1}};
    const Outcome got = run_script(kQwen, config, script);
    CHECK(got.count(EventType::kSwitchRefused) == 0);
    CHECK(difference(expected, got) == "");
  }
  CHECK(needed);
}

TEST_CASE("samples of a prompt share their pages again after every switch to TP") {
  const Script script = samples_of_a_prompt(97, 16, 4);  // 6 of 7 pages are full
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  Engine engine(kQwen, small_config(2, 1, Layout::kTp));
  std::vector<int32_t> tokens[4];
  engine.submit(script.requests[0].spec);
  for (int i = 0; i < 6; ++i) engine.step();  // all four decode
  const int64_t in_tp = engine.impl().kv().blocks_in_use();
  REQUIRE(in_tp < 4 * 7);
  for (int turn = 0; turn < 4; ++turn) {
    engine.request_switch(Layout::kEp);
    engine.step();
    CHECK(engine.impl().kv().tp_pages_needed() == in_tp);
    engine.request_switch(Layout::kTp);
    engine.step();
    CHECK(engine.impl().kv().blocks_in_use() == in_tp);
  }
  while (engine.stats().running > 0) engine.step();
  std::vector<Event> events(256);
  const size_t n = engine.poll(events, 0);
  for (size_t i = 0; i < n; ++i)
    if (events[i].type == EventType::kToken) tokens[events[i].sample].push_back(events[i].token);
  for (int i = 0; i < 4; ++i) CHECK(tokens[i] == expected.outputs.at(record_of(script.requests[0].spec, i)).tokens);
}

TEST_CASE("a switch may make room by preempting, and no token changes") {
  Script script;
  for (int i = 0; i < 9; ++i) script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(i, 30), 30)});
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  EngineConfig config = small_config(8, 1, Layout::kTp);
  config.kv_tokens = 8 * 64;
  config.preempt_to_fit = true;
  script.switches = {{8, 0}};
  const Outcome got = run_script(kQwen, config, script);
  CHECK(got.count(EventType::kPreempted) > 0);
  CHECK(got.count(EventType::kSwitchFinished) == 1);
  CHECK(difference(expected, got) == "");
}

}  // namespace moebius::test
