// A small engine on the device of the executable, and what it serves.
#pragma once

#include "tests/unit/engine/harness.h"
#include "tests/unit/engine/model_copy.h"

namespace moebius::test {

inline EngineConfig device_config(int ranks, Layout layout) {
  EngineConfig c = small_config(ranks, 1, layout);
  c.device = MOEBIUS_TEST_DEVICE;
  c.kv_tokens = 512 * ranks;
  c.max_batch = 8;
  c.max_context = 128;
  return c;
}

// A checkpoint with heads of 64, for which decode's attention turns queries and stores K and V itself: with EngineConfig::dummy_weights.
struct WideHeads : ModelCopy {
  WideHeads() : ModelCopy(kQwen) { set("config.json", "head_dim", 64); }
};

inline Script brief_script() { return {{{greedy_request("a", prompt_of(1, 4), 3, true)}}, {}}; }

inline Script short_script() {
  Script s;
  s.requests.push_back({greedy_request("a", prompt_of(1, 19), 4, true)});
  s.requests.push_back({greedy_request("b", prompt_of(2, 1), 6, true), 1});
  return s;
}

// With a third request: greedy at 0, else by top_k and top_p too.
inline Script script_of_three(double temperature) {
  Script s = short_script();
  s.requests.push_back({greedy_request("c", prompt_of(3, 5), 5), 2});
  SamplingParams& sampling = s.requests.back().spec.sampling;
  sampling.temperature = temperature;
  if (temperature > 0) sampling.top_k = 40, sampling.top_p = 0.9;
  return s;
}

// Why an engine is refused.
inline std::string refusal(const EngineConfig& config, const std::filesystem::path& model = kQwen) {
  try {
    Engine engine(model, config);
  } catch (const Error& e) {
    return e.what();
  }
  return "accepted";
}

}  // namespace moebius::test
