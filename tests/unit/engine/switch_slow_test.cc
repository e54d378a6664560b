// A rank that is slow inside a copy: waited for within the deadline; beyond it given up, and then it writes nothing more.
#include <atomic>
#include <cstddef>
#include <thread>

#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

using namespace std::chrono_literals;

// Lives as long as the hook that uses it: a thread that was given up may outlive the test.
struct Slow {
  std::atomic<bool> asleep{false}, release{false}, awake{false};
};

}  // namespace

TEST_CASE("a rank that sleeps inside a copy within the deadline is waited for, and nothing is rolled back") {
  Script script = busy_script();
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (double budget : {0.0, 1e-6}) {
      if (kSweep > 1 && (budget > 0) != (start == Layout::kTp)) continue;
      EngineConfig config = small_config(2, 1, start);
      config.stall_budget_ms = budget;
      config.wait_deadline_ms = 5000;
      Engine engine(kQwen, config);
      const auto slept = std::make_shared<std::atomic<int>>(0);
      engine.impl().switcher().hook = [slept](const CopyPoint& p) {
        if (p.when == CopyPoint::kBetween && p.item == 2 && p.rank == 1 && slept->exchange(1) == 0) std::this_thread::sleep_for(60ms);
      };
      script.switches = {{4, start == Layout::kTp ? 0 : -1}};
      const Outcome got = Runner(engine).run(script);
      INFO("from " << name_of(start) << " budget " << budget);
      CHECK(*slept == 1);
      CHECK(got.count(EventType::kRolledBack) == 0);
      CHECK(got.count(EventType::kSwitchFinished) == 1);
      CHECK(difference(expected, got) == "");
    }
}

TEST_CASE("a rank that sleeps inside a copy beyond the deadline is given up in time, and writes nothing when it wakes") {
  const double kDeadline = 400 * kSlower;  // ms: the steps before the switch must not need it
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (double budget : {0.0, 1e-6}) {
      if (kSweep > 1 && (budget > 0) != (start == Layout::kTp)) continue;
      EngineConfig config = small_config(2, 1, start);
      config.stall_budget_ms = budget;
      config.wait_deadline_ms = kDeadline;
      Engine engine(kQwen, config);
      const auto slow = std::make_shared<Slow>();
      engine.impl().switcher().hook = [slow](const CopyPoint& p) {
        if (p.when != CopyPoint::kBetween || p.rank != 1 || slow->asleep.exchange(true)) return;
        while (!slow->release) std::this_thread::sleep_for(2ms);
        slow->awake = true;
      };
      for (int i = 0; i < 4; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 40), 200));
      for (int i = 0; i < 3; ++i) engine.step();
      engine.request_switch(other(start));
      INFO("from " << name_of(start) << " budget " << budget);
      const auto begin = std::chrono::steady_clock::now();
      CHECK_THROWS_AS(engine.step(), Error);
      const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
      CHECK(slow->asleep);
      CHECK(ms < 2 * kDeadline + 1000);  // one to finish, one to acknowledge; the rest is a busy machine's
      std::vector<Event> events(256);
      events.resize(engine.poll(events, 0));
      CHECK(std::count_if(events.begin(), events.end(),
                          [](const Event& e) { return e.type == EventType::kFinished && e.finish_reason == FinishReason::kError; }) == 4);
      const auto before = arena_of(engine, 1);
      slow->release = true;
      while (!slow->awake) std::this_thread::sleep_for(1ms);
      std::this_thread::sleep_for(30ms);
      CHECK((arena_of(engine, 1) == before));  // not printed: megabytes
    }
}

}  // namespace moebius::test
