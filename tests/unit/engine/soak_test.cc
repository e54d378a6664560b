// Random scripts: whatever happens on the way, each request's tokens and logits are those it gives alone on one rank.
// MOEBIUS_SOAK sets the number of scripts (200), MOEBIUS_SEED the first seed.
#include <cstdlib>
#include <random>

#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

struct Random {
  std::mt19937_64 engine;
  int below(int n) { return static_cast<int>(engine() % static_cast<uint64_t>(n)); }
  template <class T>
  T one_of(std::initializer_list<T> list) {
    return *(list.begin() + below(static_cast<int>(list.size())));
  }
};

Script random_script(Random& random, int layers) {
  Script script;
  const int requests = 1 + random.below(10);
  const std::vector<int32_t> common = prompt_of(static_cast<uint32_t>(random.below(5)), 70);
  for (int i = 0; i < requests; ++i) {
    const int length = 1 + random.below(random.below(4) ? 30 : 100);
    std::vector<int32_t> prompt = prompt_of(static_cast<uint32_t>(random.engine()), length);
    if (random.below(3) == 0) prompt.insert(prompt.begin(), common.begin(), common.begin() + 16 + random.below(50));
    ScriptedRequest r{greedy_request("r" + std::to_string(i), prompt, 1 + random.below(20), random.below(4) == 0), random.below(12)};
    if (random.below(3) == 0) {
      r.spec.sampling.temperature = 0.5 + 0.1 * random.below(10);
      r.spec.sampling.top_p = random.one_of({1.0, 0.9, 0.5});
      r.spec.sampling.top_k = random.one_of({0, 1, 40});
      r.spec.sampling.frequency_penalty = random.one_of({0.0, 0.5});
    }
    r.spec.sampling.ignore_eos = random.below(4) != 0;
    r.spec.priority = random.below(5) == 0 ? -1 : 0;
    if (random.below(8) == 0) r.spec.sampling.n = 2;
    if (random.below(12) == 0) r.spec.deadline_ms = 1 + random.below(20);  // when it falls is the machine's
    if (random.below(6) == 0) r.cancel_step = r.arrival_step + random.below(15);
    script.requests.push_back(r);
  }
  for (int n = random.below(6); n > 0; --n)
    script.switches.push_back({random.below(30), random.below(3) ? random.one_of({0, -1}) : random.below(layers + 1)});
  return script;
}

}  // namespace

TEST_CASE("random scripts of arrivals, cancels, preemptions, switches and faults change no bit") {
  const char* count = std::getenv("MOEBIUS_SOAK");
  const char* first = std::getenv("MOEBIUS_SEED");
  const int scripts = count ? std::atoi(count) : 200;
  const uint64_t seed0 = first ? std::strtoull(first, nullptr, 10) : std::random_device{}();
  WARN("first seed " << seed0 << ", " << scripts << " scripts");
  for (int i = 0; i < scripts; ++i) {
    const uint64_t seed = seed0 + static_cast<uint64_t>(i);
    INFO("MOEBIUS_SOAK=1 MOEBIUS_SEED=" << seed);
    Random random{std::mt19937_64(seed)};
    const std::string model = random.one_of({kQwen, kDense, kMixtral, kQwen2, kGlm, kGranite});
    const int layers = layers_of(model);
    Script script = random_script(random, layers);

    Script calm = script;  // the same requests one after another's arrival, nothing else going on
    calm.switches.clear();
    size_t sequences = 0;
    for (ScriptedRequest& r : calm.requests) {
      r.cancel_step = -1;
      r.spec.deadline_ms = 0;
      sequences += static_cast<size_t>(r.spec.sampling.n);
    }
    EngineConfig one = small_config(1, 1, Layout::kTp);
    one.prefix_cache = false;
    const Outcome expected = run_script(model, one, calm);

    EngineConfig config = small_config(random.one_of({1, 2, 3, 4, 8}), random.one_of({1, 1, 2}), random.one_of({Layout::kTp, Layout::kEp}));
    config.chunk_tokens = random.one_of({1, 5, 16, 64, 512});
    config.page_tokens = random.one_of({16, 32});
    config.max_batch = random.one_of({1, 3, 64});
    config.stall_budget_ms = random.one_of({0.0, 1e-6, 0.02});
    config.prefix_cache = random.below(4) != 0;
    config.preempt_to_fit = random.below(2) == 0;
    config.kv_tokens = random.one_of({4096, 256 * config.ranks});
    Engine engine(model, config);
    engine.impl().switcher().set_piece_bytes(random.below(8) ? int64_t{1} << 20 : random.one_of({16, 32, 64}) * kSmallPieces);
    int fault_at = random.below(3) == 0 ? random.below(12) : -1;
    const int fault_rank = random.below(config.ranks);
    engine.impl().switcher().hook = [&](const CopyPoint& p) {
      if (p.starts_rank() && p.rank == fault_rank && !p.undoing && fault_at-- == 0) throw Error(Code::kIo, "injected");
    };
    const Outcome got = Runner(engine).run(script, 20000);

    REQUIRE(got.outputs.size() == sequences);
    REQUIRE(expected.outputs.size() == sequences);
    for (const ScriptedRequest& r : script.requests)
      for (int sample = 0; sample < r.spec.sampling.n; ++sample) {
        const std::string id = record_of(r.spec, sample);
        const Output& x = expected.outputs.at(id);
        const Output& y = got.outputs.at(id);
        INFO(id << " on " << model);
        if (y.reason == FinishReason::kAbort) {
          REQUIRE((r.cancel_step >= 0 || r.spec.deadline_ms > 0));
          REQUIRE(y.tokens.size() <= x.tokens.size());
          REQUIRE(std::equal(y.tokens.begin(), y.tokens.end(), x.tokens.begin()));
          continue;
        }
        REQUIRE(y.tokens == x.tokens);
        REQUIRE(y.reason == x.reason);
        REQUIRE(y.logits.size() == x.logits.size());
        REQUIRE((y.logits.empty() || std::memcmp(y.logits.data(), x.logits.data(), y.logits.size() * 4) == 0));
      }
  }
}

}  // namespace moebius::test
