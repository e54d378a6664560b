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
      const Outcome got = Runner(engine).run(script);
      CHECK(got.count(EventType::kRolledBack) == 1);
      CHECK(engine.stats().seam == (start == Layout::kTp ? 4 : 0));
      CHECK(difference(expected, got) == "");
    }
}

TEST_CASE("a fault of any type, of any thread, between two blocks is rolled back") {
  Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int thread : {0, 1})
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
        const Outcome got = Runner(engine).run(script);
        CHECK(got.count(EventType::kRolledBack) == 1);
        CHECK(engine.stats().seam == (start == Layout::kTp ? 4 : 0));
        CHECK(difference(expected, got) == "");
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

}  // namespace moebius::test
