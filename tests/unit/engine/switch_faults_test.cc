// Faults in a switch, wherever they fall: the seam goes back to where the move began, and no bit changes.
#include "tests/unit/engine/harness.h"

namespace moebius::test {

TEST_CASE("a fault at a fence that another rank has already passed is rolled back and changes no bit") {
  Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int bad_item = 0; bad_item < 4; ++bad_item) {
      Engine engine(kQwen, small_config(2, 1, start));
      std::atomic<bool> passed{false}, armed{true};
      engine.impl().switcher().hook = [&](const CopyPoint& p) {
        if (p.item != bad_item || p.undoing || p.when != CopyPoint::kAfter) return;
        if (p.rank == 0) passed = true;
        if (p.rank != 1 || !armed.exchange(false)) return;
        while (!passed) std::this_thread::yield();
        throw Error(Code::kIo, "injected");
      };
      script.switches = {{4, start == Layout::kTp ? 0 : -1}};
      INFO("from " << name_of(start) << " item " << bad_item);
      check_rolled_back(engine, script, expected, start == Layout::kTp ? 4 : 0);
    }
}

TEST_CASE("a fault of any type, of any thread, between two blocks is rolled back") {
  Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int thread = 0; thread < threads_here(2); ++thread)
      for (int kind : {0, 1, 2}) {
        Engine engine(kQwen, small_config(2, 2, start));
        std::atomic<bool> armed{true};
        engine.impl().switcher().hook = [&](const CopyPoint& p) {
          if (p.item != 2 || p.thread != thread || p.when != CopyPoint::kBetween || !armed.exchange(false)) return;
          if (kind == 0) throw Error(Code::kIo, "injected");
          if (kind == 1) throw std::bad_alloc();
          throw 7;
        };
        script.switches = {{4, start == Layout::kTp ? 0 : -1}};
        INFO("from " << name_of(start) << " thread " << thread << " kind " << kind);
        check_rolled_back(engine, script, expected, start == Layout::kTp ? 4 : 0);
      }
}

TEST_CASE("a fault when the other page tables have just been opened closes them again") {
  Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int kind : {0, 1}) {
      Engine engine(kQwen, small_config(2, 1, start));
      const Phase phase = engine.impl().kv().phase();
      bool armed = true;
      engine.impl().switcher().open_hook = [&] {
        if (!std::exchange(armed, false)) return;
        CHECK(engine.impl().kv().phase() == Phase::kBoth);
        if (kind == 0) throw Error(Code::kInternal, "injected");
        throw std::bad_alloc();
      };
      const int32_t target = start == Layout::kTp ? 0 : -1;
      script.switches = {{4, target}};
      const Outcome got = Runner(engine).run(script);
      CHECK(difference(expected, got) == "");
      CHECK(engine.impl().kv().phase() == phase);
      CHECK(got.count(EventType::kSwitchStarted) == 1);
      CHECK(got.count(EventType::kRolledBack) == 1);
      CHECK(got.count(EventType::kSwitchFinished) == 0);
      for (const Event& e : got.events)
        if (e.type == EventType::kRolledBack) CHECK(e.from == other(start));  // the layout that was not reached
      script.switches = {{4, target}};
      const Outcome after = Runner(engine).run(script);
      CHECK(after.count(EventType::kSwitchFinished) == 1);
      CHECK(difference(expected, after) == "");
    }
}

TEST_CASE("a fault after a turn goes back to the end that the switch came from") {
  for (Layout start : {Layout::kTp, Layout::kEp}) {
    Engine engine(kQwen, small_config(2, 1, start));
    for (int i = 0; i < 4; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 30), 60));
    for (int i = 0; i < 3; ++i) engine.step();
    Switcher& switcher = engine.impl().switcher();
    const int layers = switcher.num_layers(), from = start == Layout::kTp ? layers : 0;
    REQUIRE(switcher.begin(layers - from, false));
    while (switcher.seam() != 2) switcher.advance(1e-6);
    REQUIRE(switcher.begin(from, false));
    bool armed = true;
    switcher.hook = [&](const CopyPoint& p) {
      if (p.starts_rank() && p.rank == 0 && std::exchange(armed, false)) throw Error(Code::kIo, "injected");
    };
    switcher.advance(0);
    CHECK_FALSE(armed);
    CHECK(switcher.seam() == from);
    CHECK_FALSE(switcher.moving());
    CHECK(engine.impl().kv().phase() == (start == Layout::kTp ? Phase::kTp : Phase::kEp));
  }
}

TEST_CASE("a fault on the way to a held seam, or on from it, goes back to where that move began, arrivals and cancels between") {
  Script script = busy_script();
  for (int i = 0; i < 6; ++i)
    script.requests.push_back({greedy_request("late" + std::to_string(i), prompt_of(80 + i, 20), 12, true), 5 + i});
  script.requests.push_back({greedy_request("victim", prompt_of(90, 40), 60), 2});
  script.requests.push_back({greedy_request("victim of the hold", prompt_of(91, 40), 60), 6});
  const Outcome expected = without(run_script(kQwen, small_config(1, 1, Layout::kTp), script), {"victim", "victim of the hold"});
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (double budget : {0.0, 1e-6})
      for (int move : {0, 1, 2})  // to the seam, on to the other end, back to where it came from
        for (int bad_rank = 0; bad_rank < 3; bad_rank += kSweep) {
          const int from = start == Layout::kTp ? 4 : 0;
          const int target = move == 1 ? 4 - from : from;
          EngineConfig config = small_config(3, 1, start);
          config.stall_budget_ms = budget;
          Engine engine(kQwen, config);
          bool armed = move == 0;
          engine.impl().switcher().hook = [&](const CopyPoint& p) {
            if (p.starts_rank() && p.rank == bad_rank && !p.undoing && p.item != from - (from == 4) && std::exchange(armed, false))
              throw Error(Code::kIo, "injected");
          };
          Script s = script;
          s.requests[s.requests.size() - 2].cancel_step = 9;
          s.requests.back().cancel_step = 13;
          s.switches = {{4, 2}, {14, target}};
          int32_t seam_before = -1;
          Runner runner(engine);
          runner.before_step = [&](int64_t step) {
            if (step != 14) return;
            REQUIRE_FALSE(engine.stats().switching);
            seam_before = engine.stats().seam;
            if (move > 0) armed = true;
          };
          const Outcome got = runner.run(s);
          INFO("from " << name_of(start) << " budget " << budget << " move " << move << " rank " << bad_rank);
          CHECK_FALSE(armed);
          CHECK(got.count(EventType::kRolledBack) == 1);
          CHECK(seam_before == (move == 0 ? from : 2));
          CHECK(engine.stats().seam == (move == 0 ? target : 2));
          CHECK(difference(expected, without(got, {"victim", "victim of the hold"})) == "");
        }
}

TEST_CASE("a fault at the fence after copying ahead forgets all that was copied ahead, and changes no bit") {
  Script script = busy_script();
  for (ScriptedRequest& r : script.requests) r.spec.sampling.max_tokens += 30;
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int bad_item : {1, 2}) {
      script.switches = {{6, start == Layout::kTp ? 0 : -1}};
      int fence = 0;  // which region of the item it is: told by a run without a fault
      for (bool bad : {false, true}) {
        EngineConfig config = small_config(3, 1, start);
        config.stall_budget_ms = 1e-6;
        Engine engine(kQwen, config);
        engine.impl().switcher().set_piece_bytes(32 * kSmallPieces);
        const KvManager& kv = engine.impl().kv();
        int regions = 0;
        int64_t ahead = 0;
        engine.impl().switcher().hook = [&](const CopyPoint& p) {
          if (!p.starts_rank() || p.rank != 2 || p.item != bad_item || p.undoing || ++regions != fence) return;
          for (int32_t b : kv.live_blocks()) ahead += kv.block(b).copied_item == bad_item;
          throw Error(Code::kIo, "injected");
        };
        const Outcome got = Runner(engine).run(script);
        INFO("from " << name_of(start) << " item " << bad_item << " region " << fence << (bad ? ", a fault" : ""));
        if (bad) {
          CHECK(ahead > 0);
          CHECK(got.count(EventType::kRolledBack) == 1);
          CHECK(engine.stats().seam == (start == Layout::kTp ? 4 : 0));
        } else {
          fence = regions;
          REQUIRE(fence > 3);
          REQUIRE(got.count(EventType::kSwitchFinished) == 1);
        }
        CHECK(difference(expected, got) == "");
      }
    }
}

TEST_CASE("a second fault on the way back ends every request once with an error, after none but right tokens") {
  const Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (double budget : {0.0, 1e-6})
      for (int back_item = 0; back_item < 3; back_item += kSweep)  // items in the order of the switch; the fault is in the last
        for (int bad_rank : {0, 2}) {
          const auto nth = [&](int item) { return start == Layout::kTp ? 3 - item : item; };
          EngineConfig config = small_config(3, 1, start);
          config.stall_budget_ms = budget;
          Engine engine(kQwen, config);
          engine.impl().switcher().hook = [&](const CopyPoint& p) {
            if (p.starts_rank() && p.rank == 1 && !p.undoing && p.item == nth(3)) throw Error(Code::kIo, "first");
            if (p.when == CopyPoint::kBetween && p.rank == bad_rank && p.undoing && p.item == nth(back_item))
              throw Error(Code::kIo, "second");
          };
          std::map<uint64_t, std::string> ids;
          std::map<std::string, std::vector<int32_t>> tokens;
          std::map<std::string, int> ends;
          std::vector<Layout> refused;
          std::vector<Event> events(256);
          for (const ScriptedRequest& r : script.requests) {
            RequestSpec spec = r.spec;
            spec.keep_logits = false;
            ids[engine.submit(spec)] = spec.id;
          }
          INFO("from " << name_of(start) << " budget " << budget << " back item " << back_item << " rank " << bad_rank);
          for (int i = 0; i < 3; ++i) engine.step();
          engine.request_switch(other(start));
          std::string failure;
          for (int i = 0; i < 100 && failure.empty(); ++i) try {
              engine.step();
            } catch (const Error& e) {
              failure = e.what();
            }
          CHECK_THAT(failure, Catch::Contains("second"));
          CHECK_THROWS_WITH(engine.step(), Catch::Contains("second"));
          CHECK_THROWS_WITH(engine.submit(script.requests[0].spec), Catch::Contains("second"));
          for (size_t n; (n = engine.poll(events, 0)) > 0;)
            for (size_t i = 0; i < n; ++i) {
              if (events[i].type == EventType::kToken) tokens[ids.at(events[i].request)].push_back(events[i].token);
              if (events[i].type == EventType::kSwitchRefused) refused.push_back(events[i].to);
              if (events[i].type != EventType::kFinished) continue;
              const std::string& id = ids.at(events[i].request);
              CHECK(events[i].finish_reason ==
                    (tokens[id] == expected.outputs.at(id).tokens ? FinishReason::kLength : FinishReason::kError));
              ++ends[id];
            }
          CHECK(refused == std::vector{other(start)});  // as it was asked for
          for (const auto& [id, want] : expected.outputs) {
            CHECK(ends[id] == 1);
            CHECK(std::equal(tokens[id].begin(), tokens[id].end(), want.tokens.begin(),
                             want.tokens.begin() + static_cast<long>(std::min(tokens[id].size(), want.tokens.size()))));
          }
        }
}

}  // namespace moebius::test
