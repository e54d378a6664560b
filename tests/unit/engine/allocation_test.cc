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

TEST_CASE("the step loop allocates nothing in a steady decode, greedy and sampled, in either layout") {
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    EngineConfig config = small_config(2, 2, layout);
    Engine engine(kQwen, config);
    for (int i = 0; i < 8; ++i) {
      RequestSpec r = greedy_request("r" + std::to_string(i), prompt_of(i, 20), 200);
      if (i % 2) r.sampling.temperature = 1, r.sampling.top_p = 0.9, r.sampling.top_k = 50, r.sampling.repetition_penalty = 1.2;
      if (i % 3 == 0) r.sampling.logprobs = 5;
      engine.submit(r);
    }
    for (int i = 0; i < 20; ++i) engine.step();
    std::vector<Event> events(4096);
    engine.poll(events, 0);
    counting = true;
    for (int i = 0; i < 50; ++i) engine.step();
    counting = false;
    CHECK(allocations.exchange(0) == 0);
  }
}

}  // namespace moebius::test
