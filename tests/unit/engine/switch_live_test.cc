// What requests do while the seam is inside: pages freed and used again, cancels, holds, refusals. No bit of the others changes.
#include <atomic>
#include <set>

#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

constexpr double kTinyBudget = 1e-6;  // ms: spent by the first piece

// The layout that a switch of the engine goes to, as ScriptedSwitch and hold_seam want it.
int32_t far_end(const Engine& engine, Layout start) { return start == Layout::kTp ? 0 : engine.model().num_layers; }

// Seams at which a switch is looked at: where it starts, and inside.
std::vector<int> seams_before(Layout start) {
  if (kSweep > 1) return {2};
  return {start == Layout::kTp ? 4 : 0, 2};
}

Script long_requests(int n, int prompt, int max_tokens) {
  Script s;
  for (int i = 0; i < n; ++i) s.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(40 + i, prompt), max_tokens, i < 2)});
  return s;
}

}  // namespace

TEST_CASE("pages copied ahead, then freed and used again before the fence, arrive with their new owner's KV") {
  Script script = long_requests(6, 100, 90);
  script.requests.push_back({greedy_request("late", prompt_of(99, 100), 30, true)});
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int seam : seams_before(start)) {  // where it stands meanwhile
      EngineConfig config = small_config(2, 1, start);
      config.stall_budget_ms = kTinyBudget;
      config.prefix_cache = false;
      Engine engine(kQwen, config);
      engine.impl().switcher().set_piece_bytes(4 * kSmallPieces);
      const int next_item = start == Layout::kTp ? seam - 1 : seam;
      Script s = script;
      ScriptedRequest& late = s.requests.back();
      late.arrival_step = kLater;
      using Pages = std::tuple<int32_t, int32_t, int32_t, int32_t>;  // block, TP page, home, EP page
      std::set<Pages> freed;
      const auto copied_pages = [&](const Sequence& q, bool all) {
        std::set<Pages> pages;
        for (int32_t b : q.blocks)
          if (const Block& x = engine.impl().kv().block(b); all || x.copied_item == next_item)
            pages.insert({b, x.tp_page, x.home, x.ep_page});
        return pages;
      };
      std::string victim;
      int64_t reused = 0;
      Runner runner(engine);
      runner.before_step = [&](int64_t step) {
        if (step == 14) {
          engine.impl().switcher().begin(seam, false);
          engine.impl().switcher().advance(0);
          engine.hold_seam(far_end(engine, start));
        }
        if (!engine.stats().switching || engine.stats().seam != seam) return;
        if (freed.empty()) {  // somebody with two blocks copied ahead, of many that will be
          for (ScriptedRequest& r : s.requests)
            if (const Sequence* q = sequence_of(engine, r.spec.id); q != nullptr && freed.empty() && copied_pages(*q, false).size() >= 2) {
              freed = copied_pages(*q, false);
              victim = r.spec.id;
              r.cancel_step = late.arrival_step = step;
            }
        } else if (const Sequence* q = sequence_of(engine, "late")) {
          for (const Pages& pages : copied_pages(*q, true)) reused += static_cast<int64_t>(freed.count(pages));
        }
      };
      const Outcome got = runner.run(s);
      INFO("from " << name_of(start) << " seam " << seam << " victim " << victim);
      REQUIRE(reused > 0);
      CHECK(engine.stats().seam == far_end(engine, start));
      CHECK(got.outputs.at(victim).reason == FinishReason::kAbort);
      CHECK(difference(without(expected, {victim}), without(got, {victim})) == "");
    }
}

TEST_CASE("cancels with the seam inside, of a request that waits, one in prefill and one in decode, leave the others alone") {
  const Script calm = long_requests(5, 40, 60);
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), calm);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int threads = 1; threads <= threads_here(2); ++threads)
      for (int ranks = 2; ranks <= 3; ranks += kSweep) {
        EngineConfig config = small_config(ranks, threads, start);
        config.stall_budget_ms = kTinyBudget;
        config.chunk_tokens = 32;
        config.max_batch = 7;
        Engine engine(kQwen, config);
        engine.impl().switcher().set_piece_bytes(32 * kSmallPieces);
        Script s = calm;
        s.requests.push_back({greedy_request("decoding", prompt_of(70, 20), 200)});
        s.requests.push_back({greedy_request("in prefill", prompt_of(71, 900), 20), kLater});
        s.requests.push_back({greedy_request("waiting", prompt_of(72, 30), 20), kLater});
        ScriptedRequest& prefill = s.requests[6];
        bool cancelled = false;
        Runner runner(engine);
        runner.before_step = [&](int64_t step) {
          if (step == 12) engine.hold_seam(far_end(engine, start));
          if (prefill.arrival_step == kLater) {
            if (seam_is_inside(engine)) prefill.arrival_step = s.requests[7].arrival_step = step;
          } else if (step == prefill.arrival_step + 3) {
            REQUIRE(seam_is_inside(engine));
            const auto state_of = [&](const char* id) {
              REQUIRE(sequence_of(engine, id) != nullptr);
              return sequence_of(engine, id);
            };
            REQUIRE(state_of("decoding")->computed > 20);
            REQUIRE(state_of("in prefill")->computed > 0);
            REQUIRE(state_of("in prefill")->computed < 900);
            REQUIRE(state_of("waiting")->state == SequenceState::kWaiting);
            for (size_t i = 5; i < 8; ++i) s.requests[i].cancel_step = step;
            cancelled = true;
          }
        };
        const Outcome got = runner.run(s);
        INFO("from " << name_of(start) << " ranks " << ranks << " threads " << threads);
        REQUIRE(cancelled);
        CHECK(got.count(EventType::kSwitchFinished) == 1);
        for (const char* id : {"decoding", "in prefill", "waiting"}) CHECK(got.outputs.at(id).reason == FinishReason::kAbort);
        CHECK(difference(expected, without(got, {"decoding", "in prefill", "waiting"})) == "");
      }
}

TEST_CASE("the seam held while pieces and blocks of the next item are copied ahead changes no bit, whichever way it goes on") {
  Script script = long_requests(4, 60, 50);
  script.requests.push_back({greedy_request("late", prompt_of(99, 50), 30, true)});
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int held : seams_before(start))
      for (bool blocks_too : {false, true})
        for (bool back : {false, true}) {
          const int32_t from = start == Layout::kTp ? 4 : 0, to = 4 - from;
          EngineConfig config = small_config(2, 1, start);
          config.stall_budget_ms = kTinyBudget;
          Engine engine(kQwen, config);
          engine.impl().switcher().set_piece_bytes(32 * kSmallPieces);
          const int next_item = start == Layout::kTp ? held - 1 : held;
          int regions = 0;
          engine.impl().switcher().hook = [&](const CopyPoint& p) {
            if (p.starts_rank() && p.rank == 0 && p.item == next_item) ++regions;
          };
          const KvManager& kv = engine.impl().kv();
          Script s = script;
          ScriptedRequest& late = s.requests.back();
          late.arrival_step = kLater;
          Runner runner(engine);
          runner.before_step = [&](int64_t step) {
            if (step == 3) engine.hold_seam(to);
            if (late.arrival_step == kLater) {
              const bool copied = std::any_of(kv.live_blocks().begin(), kv.live_blocks().end(),
                                              [&](int32_t b) { return kv.block(b).copied_item == next_item; });
              if (engine.stats().seam != held || !engine.stats().switching || regions < 2 || copied != blocks_too) return;
              engine.hold_seam(held);
              late.arrival_step = step + 1;
            } else if (step == late.arrival_step + 3) {
              REQUIRE(engine.stats().seam == held);
              REQUIRE_FALSE(engine.stats().switching);
              engine.hold_seam(back ? from : to);
            }
          };
          const Outcome got = runner.run(s);
          INFO("from " << name_of(start) << " held at " << held << (blocks_too ? " with blocks" : "") << (back ? ", back" : ", on"));
          REQUIRE(late.arrival_step != kLater);
          CHECK(engine.stats().seam == (back ? from : to));
          CHECK(difference(expected, got) == "");
        }
}

// For 8 ranks in EP: 768 KiB more than the least, of which a device's tables take a part. Each home has room for 8 requests of 48 tokens, TP
// not for all 64.
static int64_t full_memory(const EngineConfig& config) {
  const MemoryReport least = Engine(kQwen, config).memory();
  return least.arena_bytes + least.workspace_bytes + div_up(least.shared_bytes, 8) + (3 << 18);
}

TEST_CASE("a refused switch throws no cached page away") {
  // A full cache, then more running requests than the other layout holds. The same without the switch is the measure.
  using Entry = std::tuple<int32_t, uint64_t, uint64_t, int32_t, bool>;
  const auto blocks_of = [](const KvManager& kv) {
    std::set<Entry> all;
    for (int32_t b : kv.live_blocks())
      all.insert({b, kv.block(b).key.low, kv.block(b).key.high, kv.block(b).users, kv.block(b).registered});
    return all;
  };
  Script first;
  for (int i = 0; i < 200; ++i) first.requests.push_back({greedy_request("c" + std::to_string(i), prompt_of(200 + i, 33), 1)});
  for (Layout start : {Layout::kTp, Layout::kEp}) {
    EngineConfig config = small_config(8, 1, start);
    config.chunk_tokens = 512;
    config.kv_tokens = 8 * 64;  // EP: a home has no room for the ninth request
    int running = 9;
    if (start == Layout::kEp) {  // filled memory: TP holds fewer tokens, because it has each KV head four times
      config.memory_bytes = full_memory(config);
      config.kv_tokens = 0;
      running = 64;
    }
    uint64_t hits[2];
    for (bool ask : {false, true}) {
      Engine engine(kQwen, config);
      const KvManager& kv = engine.impl().kv();
      INFO("from " << name_of(start) << ", TP holds " << kv.tp_capacity() << " pages, a home " << kv.ep_capacity(0));
      Runner(engine, true).run(first);
      REQUIRE(static_cast<int64_t>(kv.live_blocks().size()) > (start == Layout::kTp ? kv.tp_capacity() : 8 * kv.ep_capacity(0)) - 3 * 8);
      std::vector<uint64_t> numbers;
      for (int i = 0; i < running; ++i) numbers.push_back(engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 30), 30)));
      for (int i = 0; i < 8; ++i) engine.step();
      const auto before = blocks_of(kv);
      REQUIRE(static_cast<int64_t>(before.size()) > kv.blocks_in_use());  // some are still cached
      if (ask) {
        REQUIRE_FALSE(engine.impl().switcher().begin(far_end(engine, start), false));
        CHECK(blocks_of(kv) == before);
        CHECK(engine.stats().running == running);
      }
      for (uint64_t n : numbers) engine.cancel(n);
      Script again;  // the newest of the cached prompts, once on every home
      for (int i = 0; i < 8; ++i) again.requests.push_back({greedy_request("d" + std::to_string(i), prompt_of(399, 33), 1)});
      Runner(engine).run(again);
      hits[ask] = engine.stats().prefix_hits;
    }
    INFO("from " << name_of(start));
    CHECK(hits[0] == hits[1]);
    CHECK(hits[0] > 0);
  }
}

TEST_CASE("a switch to TP preempts as many as do not fit, the last ones, and no token changes") {
  constexpr int kRequests = 64;
  Script script;
  for (int i = 0; i < kRequests; ++i) script.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(i, 30), 30)});
  const Outcome expected = run_script(kQwen, small_config(1, 1, Layout::kTp), script);
  EngineConfig config = small_config(8, 1, Layout::kEp);
  config.chunk_tokens = 512;
  config.kv_tokens = 8 * 64;
  config.memory_bytes = full_memory(config);
  config.kv_tokens = 0;
  config.preempt_to_fit = true;
  script.switches = {{8, -1}};
  Engine engine(kQwen, config);
  const int64_t fit = engine.impl().kv().tp_capacity() / 3;  // of requests with 31 to 48 tokens
  REQUIRE(fit < kRequests - 2);
  const Outcome got = Runner(engine).run(script);
  std::vector<uint64_t> preempted;
  for (const Event& e : got.events) {
    if (e.type == EventType::kSwitchStarted) break;
    if (e.type == EventType::kPreempted) preempted.push_back(e.request);
  }
  std::vector<uint64_t> last;
  for (uint64_t n = kRequests; n > static_cast<uint64_t>(fit); --n) last.push_back(n);
  CHECK(preempted == last);
  CHECK(got.count(EventType::kSwitchFinished) == 1);
  CHECK(difference(expected, got) == "");
}

}  // namespace moebius::test
