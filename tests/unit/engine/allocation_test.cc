// A program of its own, because it replaces operator new (which a sanitizer build must not).
#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/unit/engine/harness.h"

// Counts allocations of the whole program while `counting` is on.
static std::atomic<bool> counting{false};
static std::atomic<int64_t> allocations{0};
void* operator new(size_t bytes) {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(bytes ? bytes : 1)) return p;
  throw std::bad_alloc();
}
void* operator new[](size_t bytes) { return operator new(bytes); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }

namespace moebius::test {
namespace {

// Allocations of f, in all threads.
template <class F>
int64_t allocations_of(F&& f) {
  counting = true;
  f();
  counting = false;
  return allocations.exchange(0);
}

RequestSpec request(int i, int prompt, int max_tokens) {
  RequestSpec r = greedy_request("r" + std::to_string(i), prompt_of(static_cast<uint32_t>(i), prompt), max_tokens);
  if (i % 2) r.sampling.temperature = 1, r.sampling.top_p = 0.9, r.sampling.top_k = 50, r.sampling.repetition_penalty = 1.2;
  if (i % 3 == 0) r.sampling.logprobs = 5;
  return r;
}

// Eight requests that decode; two share a prompt, so that a block has several users.
void submit_crowd(Engine& engine) {
  for (int i = 0; i < 7; ++i) engine.submit(request(i, 20 + 9 * i, 200));
  engine.submit(request(6, 20 + 9 * 6, 200));
  for (int i = 0; i < 20; ++i) engine.step();
}

int32_t end_of(Engine& engine, Layout layout) { return layout == Layout::kTp ? engine.model().num_layers : 0; }

}  // namespace

TEST_CASE("the step loop allocates nothing in a steady decode, greedy and sampled, in either layout") {
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    Engine engine(kQwen, small_config(2, 2, layout));
    submit_crowd(engine);
    CHECK(allocations_of([&] {
            for (int i = 0; i < 50; ++i) engine.step();
          }) == 0);
  }
}

TEST_CASE("arrivals, prefill in chunks, prefix hits, cancels and ends allocate nothing inside a step, at any seam") {
  for (int seam : {4, 0, 2}) {
    Engine engine(kQwen, small_config(2, 2, Layout::kTp));
    submit_crowd(engine);
    engine.hold_seam(seam);
    engine.step();
    REQUIRE(engine.stats().seam == seam);
    for (int i = 20; i < 24; ++i) engine.submit(request(i, 150, 6));
    RequestSpec samples = request(25, 150, 6);
    samples.sampling.n = 4;
    engine.submit(samples);
    const uint64_t victim = engine.submit(request(24, 90, 200));
    INFO("seam " << seam);
    CHECK(allocations_of([&] {
            for (int i = 0; i < 18; ++i) engine.step();
          }) == 0);
    engine.cancel(victim);
    CHECK(allocations_of([&] {
            for (int i = 0; i < 22; ++i) engine.step();
          }) == 0);
    CHECK(engine.stats().running == 8);
    CHECK(engine.stats().waiting == 0);
    CHECK(engine.stats().prefix_hits > 0);
  }
}

TEST_CASE("a preemption and a refused switch allocate nothing inside a step") {
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    EngineConfig config = small_config(2, 1, layout);
    config.kv_tokens = 320;
    Engine engine(kQwen, config);
    for (int i = 0; i < 10; ++i) engine.submit(request(i, 10 + 3 * i, 60));
    CHECK(allocations_of([&] {
            for (int i = 0; i < 60; ++i) engine.step();
          }) == 0);
    CHECK(engine.stats().preemptions > 0);
    if (layout == Layout::kEp) continue;
    Engine tight(kQwen, [] {
      EngineConfig c = small_config(8, 1, Layout::kTp);
      c.kv_tokens = 8 * 64;
      return c;
    }());
    for (int i = 0; i < 9; ++i) tight.submit(request(i, 30, 30));
    for (int i = 0; i < 8; ++i) tight.step();
    tight.request_switch(Layout::kEp);
    CHECK(allocations_of([&] { tight.step(); }) == 0);
    CHECK(tight.stats().refusals == 1);
  }
}

TEST_CASE("a switch at once allocates nothing, whoever asks for it") {
  for (Layout start : {Layout::kTp, Layout::kEp}) {
    Engine engine(kQwen, small_config(2, 2, start));
    submit_crowd(engine);
    for (Layout to : {other(start), start}) {
      engine.request_switch(to);
      CHECK(allocations_of([&] { engine.step(); }) == 0);
      REQUIRE(engine.stats().seam == end_of(engine, to));
    }
    PolicyConfig policy;
    policy.kind = PolicyKind::kThreshold;
    policy.variant = ThresholdVariant::kRollout;
    policy.threshold = start == Layout::kTp ? 1 : 1000;
    policy.window_steps = 1;
    policy.cooldown_s = 0;
    engine.set_policy(policy);
    CHECK(allocations_of([&] { engine.step(); }) == 0);
    CHECK(engine.stats().switches == 3);
    policy.kind = PolicyKind::kMeasured;  // to the layout that it was taught to be faster
    const Layout faster = other(engine.stats().seam == 0 ? Layout::kEp : Layout::kTp);
    const double now = std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
    for (int i = 0; i < 400; ++i) engine.impl().costs().on_step(faster, StepLoads::decode(1 + i % 8, 250.0 * (i / 8 % 8), 2), 1e-6, now);
    engine.set_policy(policy);
    CHECK(allocations_of([&] {
            for (int i = 0; i < 150 && engine.stats().switches == 3; ++i) engine.step();
          }) == 0);
    CHECK(engine.stats().switches == 4);
  }
}

TEST_CASE("an incremental switch allocates nothing: copying ahead, fences, serving inside, turns, arrival") {
  for (Layout start : {Layout::kTp, Layout::kEp}) {
    EngineConfig config = small_config(2, 2, start);
    config.stall_budget_ms = 1e-6;
    Engine engine(kQwen, config);
    engine.impl().switcher().set_piece_bytes(8 * kSmallPieces);
    submit_crowd(engine);
    engine.request_switch(other(start));
    int steps = 0;
    const auto until = [&](auto done) {
      return allocations_of([&] {
        do engine.step();
        while (++steps < 2000 && !done());
      });
    };
    CHECK(until([&] { return engine.stats().seam == 2; }) == 0);
    engine.submit(request(30, 100, 5));
    engine.request_switch(start);
    CHECK(until([&] { return !engine.stats().switching; }) == 0);
    engine.request_switch(other(start));
    CHECK(until([&] { return !engine.stats().switching; }) == 0);
    CHECK(engine.stats().seam == end_of(engine, other(start)));
    CHECK(steps < 2000);
  }
}

}  // namespace moebius::test
