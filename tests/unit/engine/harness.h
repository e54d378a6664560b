// Runs scripts of requests, arrivals, cancels and switches on an engine, and compares what came out bit for bit.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "lib/base/error.h"
#include "lib/runtime/engine.h"
#include "lib/runtime/engine_impl.h"
#include "tests/catch.h"

namespace moebius::test {

// The longest sweeps take every n-th case: a prime, so that none of the nested loops stands still. MOEBIUS_TEST_SWEEP says another.
inline const int64_t kSweep = [] {
  if (const char* given = std::getenv("MOEBIUS_TEST_SWEEP")) return std::max<int64_t>(1, std::atoll(given));
#if defined(__SANITIZE_THREAD__)
  return int64_t{31};
#elif defined(__SANITIZE_ADDRESS__)
  return int64_t{13};
#else
  return int64_t{1};
#endif
}();
inline const std::string kQwen = std::string(MOEBIUS_TEST_DATA) + "/tiny-qwen3-moe";
inline const std::string kDense = std::string(MOEBIUS_TEST_DATA) + "/tiny-qwen3-moe-dense";
inline const std::string kMixtral = std::string(MOEBIUS_TEST_DATA) + "/tiny-mixtral";
inline const std::string kQwen2 = std::string(MOEBIUS_TEST_DATA) + "/tiny-qwen2-moe";
inline const std::string kGlm = std::string(MOEBIUS_TEST_DATA) + "/tiny-glm4-moe";
inline const std::string kGranite = std::string(MOEBIUS_TEST_DATA) + "/tiny-granite-moe";
inline int layers_of(const std::string& model) { return read_config(model).shape.num_layers(); }

inline constexpr int64_t kLater = INT64_MAX;

struct ScriptedRequest {
  RequestSpec spec;
  int64_t arrival_step = 0;
  int64_t cancel_step = -1;
};

struct ScriptedSwitch {
  int64_t step = 0;
  int32_t seam = 0;  // −1: TP, whatever the number of layers
};

struct Script {
  std::vector<ScriptedRequest> requests;
  std::vector<ScriptedSwitch> switches;
};

struct Output {
  std::vector<int32_t> tokens;
  std::vector<float> logits;
  FinishReason reason = FinishReason::kNone, last_token = FinishReason::kNone;  // as the end says, and the last token
};

// The name of a sample's record.
inline std::string record_of(const RequestSpec& spec, int sample) {
  return spec.sampling.n > 1 ? spec.id + "." + std::to_string(sample) : spec.id;
}

struct Outcome {
  std::map<std::string, Output> outputs;
  std::vector<Event> events;  // all but tokens
  int64_t steps = 0;
  int count(EventType type) const {
    int n = 0;
    for (const Event& e : events) n += e.type == type;
    return n;
  }
};

// The device that the tests run on, by MOEBIUS_TEST_DEVICE; null: the CPU.
inline const char* test_device() { return std::getenv("MOEBIUS_TEST_DEVICE"); }

inline const int kSlower = kSanitized || test_device() != nullptr ? 5 : 1;  // of deadlines in which steps must not need as long

// A rank's threads: on a device it has one.
inline int threads_here(int threads) { return test_device() != nullptr ? 1 : threads; }

// MOEBIUS_TEST_MODE=fast is for tests against references only.
inline const char* test_mode() {
  const char* mode = std::getenv("MOEBIUS_TEST_MODE");
  return mode != nullptr ? mode : "exact";
}

inline EngineConfig small_config(int ranks, int threads, Layout layout) {
  EngineConfig c;
  c.ranks = ranks;
  c.threads = threads_here(threads);
  if (test_device() != nullptr) c.device = test_device();
  if (const char* processes = std::getenv("MOEBIUS_TEST_PROCESSES")) c.rank_processes = test_device() != nullptr && *processes == '1';
  c.mode = test_mode();
  c.layout = layout;
  c.slices_per_expert = 8;
  c.kv_tokens = 4096;
  c.chunk_tokens = 64;
  c.max_batch = 64;
  c.policy.kind = PolicyKind::kManual;  // tests say when
  return c;
}

inline RequestSpec greedy_request(const std::string& id, std::vector<int32_t> prompt, int max_tokens, bool keep_logits = false) {
  RequestSpec r;
  r.id = id;
  r.prompt_ids = std::move(prompt);
  r.sampling.temperature = 0;
  r.sampling.max_tokens = max_tokens;
  r.sampling.ignore_eos = true;
  r.keep_logits = keep_logits;
  return r;
}

// A reproducible prompt.
inline std::vector<int32_t> prompt_of(uint32_t seed, int length, int vocab = 512) {
  std::vector<int32_t> ids;
  uint32_t x = seed * 2654435761u + 12345u;
  for (int i = 0; i < length; ++i) {
    x = x * 1664525u + 1013904223u;
    ids.push_back(static_cast<int32_t>((x >> 8) % static_cast<uint32_t>(vocab - 3)) + 3);
  }
  return ids;
}

inline Script busy_script() {
  Script s;
  for (int i = 0; i < 6; ++i)
    s.requests.push_back({greedy_request("r" + std::to_string(i), prompt_of(20 + i, 3 + 13 * i), 8 + i, true), i % 3});
  return s;
}

// After the last request no block is in use; the cache dropped, every page of the living tables is free.
inline void check_no_leaks(Engine& engine, bool keep_cache) {
  KvManager& kv = engine.impl().kv();
  CHECK(kv.blocks_in_use() == 0);
  if (keep_cache) return;
  kv.drop_cached();
  CHECK(kv.live_blocks().empty());
  if (kv.phase() == Phase::kTp)
    CHECK(kv.available(-1) == kv.tp_capacity());
  else
    for (int h = 0; h < kv.num_homes(); ++h)
      CHECK(kv.available(h) == (kv.phase() == Phase::kEp ? kv.ep_capacity(h) : std::min(kv.ep_capacity(h), kv.tp_capacity())));
}

class Runner {
 public:
  // keep_cache: another script will run on this engine.
  explicit Runner(Engine& engine, bool keep_cache = false) : engine_(engine), keep_cache_(keep_cache) {}

  // Called before anything that is due at a step. It may look into the engine, ask it for a switch, and set steps of the script
  // that are not due yet (kLater).
  std::function<void(int64_t step)> before_step;

  Outcome run(const Script& script, int64_t max_steps = 4000) {
    Outcome out;
    std::map<uint64_t, const ScriptedRequest*> by_number;
    std::map<const ScriptedRequest*, uint64_t> numbers;
    size_t finished = 0, expected = 0;
    for (const ScriptedRequest& r : script.requests) expected += static_cast<size_t>(r.spec.sampling.n);
    std::vector<Event> events(256);
    const int32_t layers = engine_.model().num_layers;
    for (int64_t step = 0; finished < expected || step <= last_due(script) || engine_.stats().switching; ++step) {
      if (step > max_steps) FAIL("no end after " << max_steps << " steps, " << finished << " of " << expected << " finished");
      if (before_step) before_step(step);
      for (const ScriptedSwitch& s : script.switches)
        if (s.step == step) engine_.hold_seam(s.seam < 0 ? layers : s.seam);
      for (const ScriptedRequest& r : script.requests) {
        if (r.arrival_step == step) {
          const uint64_t n = engine_.submit(r.spec);
          by_number[n] = &r;
          numbers[&r] = n;
        }
        if (r.cancel_step == step && numbers.count(&r)) engine_.cancel(numbers[&r]);
      }
      engine_.step();
      for (size_t n; (n = engine_.poll(events, 0)) > 0;)
        for (size_t i = 0; i < n; ++i) {
          Event& e = events[i];
          if (e.request != 0 && by_number.count(e.request)) {
            const RequestSpec& spec = by_number[e.request]->spec;
            Output& o = out.outputs[record_of(spec, e.sample)];
            if (e.type == EventType::kToken) {
              o.tokens.push_back(e.token);
              o.last_token = e.finish_reason;
            }
            if (e.type == EventType::kFinished) {
              const bool by_token = e.finish_reason == FinishReason::kStop || e.finish_reason == FinishReason::kLength;
              REQUIRE(o.last_token == (by_token ? e.finish_reason : FinishReason::kNone));
              REQUIRE(o.reason == FinishReason::kNone);
              o.reason = e.finish_reason;
              ++finished;
              if (spec.keep_logits) o.logits = engine_.take_logits(e.request, e.sample);
            }
          }
          if (e.type != EventType::kToken) out.events.push_back(e);
        }
      out.steps = step + 1;
    }
    check_no_leaks(engine_, keep_cache_);
    return out;
  }

 private:
  static int64_t last_due(const Script& script) {
    int64_t last = 0;
    for (const ScriptedSwitch& s : script.switches) last = std::max(last, s.step);
    return last;
  }
  Engine& engine_;
  bool keep_cache_;
};

// Below the smallest item of every test model, so that copying ahead takes several pieces on every rank.
inline constexpr int64_t kSmallPieces = 4096;

// piece_bytes: 0 for the default.
inline Outcome run_script(const std::string& model, const EngineConfig& config, const Script& script, int64_t piece_bytes = 0) {
  Engine engine(model, config);
  if (piece_bytes > 0) engine.impl().switcher().set_piece_bytes(piece_bytes);
  return Runner(engine).run(script);
}

// n samples of one prompt, at a temperature at which they differ.
inline Script samples_of_a_prompt(int length, int max_tokens, int n) {
  RequestSpec spec = greedy_request("n", prompt_of(3, length), max_tokens);
  spec.sampling.temperature = 1.5;
  spec.sampling.n = n;
  return {{{spec}}, {}};
}

// The running or waiting sequence of a request; null when there is none.
inline const Sequence* sequence_of(Engine& engine, const std::string& id) {
  const Scheduler& scheduler = engine.impl().scheduler();
  for (const auto* list : {&scheduler.running(), &scheduler.waiting()})
    for (const Sequence* s : *list)
      if (s->request->spec.id == id) return s;
  return nullptr;
}

inline bool seam_is_inside(const Engine& engine) {
  const EngineStats s = engine.stats();
  return s.switching && s.seam > 0 && s.seam < s.num_layers;
}

// Without the records of these requests.
inline Outcome without(Outcome outcome, std::initializer_list<std::string> ids) {
  for (const std::string& id : ids) outcome.outputs.erase(id);
  return outcome;
}

// What lies in a rank's memory, which may be a device's or another process's.
inline std::vector<std::byte> bytes_at(Engine& engine, int rank, const void* at, int64_t bytes) {
  Device& device = engine.impl().device();
  std::vector<std::byte> out(static_cast<size_t>(bytes));
  if (device.host_memory()) {
    std::memcpy(out.data(), at, out.size());
    return out;
  }
  device.read(rank, out.data(), bytes, at, bytes, bytes, 1);
  while (!device.idle(rank)) {
  }
  return out;
}

inline std::vector<std::byte> arena_of(Engine& engine, int rank) {
  const ModelStore& store = engine.impl().store();
  return bytes_at(engine, rank, store.arenas()[static_cast<size_t>(rank)], store.arena().arena_bytes(rank));
}

// Every byte of every slice that a rank owns where the seam stands.
inline std::vector<std::byte> weight_bytes(Engine& engine) {
  const ModelStore& store = engine.impl().store();
  std::vector<std::byte> out;
  for (int r = 0; r < engine.impl().world().ranks(); ++r) {
    const std::vector<std::byte> arena = arena_of(engine, r);
    for (int l = 0; l < engine.model().num_layers; ++l)
      for (size_t i = 0; i < store.slices().layer(l).size(); ++i) {
        const Layout layout = l < engine.impl().switcher().seam() ? Layout::kTp : Layout::kEp;
        const int64_t offset = store.arena().slice_offset(r, layout, l, static_cast<int>(i));
        if (offset < 0) continue;
        out.insert(out.end(), arena.begin() + offset, arena.begin() + offset + store.slices().layer(l)[i].bytes);
      }
  }
  return out;
}

// Says where two outcomes first differ; empty when they are equal bit for bit.
inline std::string difference(const Outcome& a, const Outcome& b) {
  if (a.outputs.size() != b.outputs.size()) return fmt::format("{} against {} records", a.outputs.size(), b.outputs.size());
  for (const auto& [id, x] : a.outputs) {
    const auto it = b.outputs.find(id);
    if (it == b.outputs.end()) return "no record for " + id;
    const Output& y = it->second;
    if (x.reason != y.reason)
      return fmt::format("{}: finish reason {} against {}", id, static_cast<int>(x.reason), static_cast<int>(y.reason));
    for (size_t i = 0; i < std::max(x.tokens.size(), y.tokens.size()); ++i)
      if (i >= x.tokens.size() || i >= y.tokens.size() || x.tokens[i] != y.tokens[i])
        return fmt::format("{}: token {} differs ({} against {} tokens)", id, i, x.tokens.size(), y.tokens.size());
    if (x.logits.size() != y.logits.size()) return fmt::format("{}: {} against {} logits", id, x.logits.size(), y.logits.size());
    for (size_t i = 0; i < x.logits.size(); ++i)
      if (std::memcmp(&x.logits[i], &y.logits[i], 4) != 0)
        return fmt::format("{}: logit {} differs: {:a} against {:a}", id, i, x.logits[i], y.logits[i]);
  }
  return {};
}

// Runs a script whose switch meets a fault: it goes back to `seam`, and no output is another.
inline void check_rolled_back(Engine& engine, const Script& script, const Outcome& expected, int32_t seam) {
  const Outcome got = Runner(engine).run(script);
  CHECK(got.count(EventType::kRolledBack) == 1);
  CHECK(engine.stats().seam == seam);
  CHECK(difference(expected, got) == "");
}

}  // namespace moebius::test
