// What the live page shows: the last ten minutes of load, throughput and seam, and the last switches, in rings that never grow.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>

#include <nlohmann/json.hpp>

#include "moebius/moebius.hpp"

namespace moebius_examples {

class History {
 public:
  static constexpr std::chrono::milliseconds kInterval{250};

  // One look at the engine; rates are those since the last look.
  void sample(const moebius_stats& stats);
  // Takes what belongs to switches; the rest is left alone.
  void record(const moebius_event& event);
  // What happened after `since_ms` (milliseconds since the start, as in the answer's "now"; as they are: who gives one back gets what
  // came after it).
  nlohmann::json since(double since_ms) const;
  // Or refusal, rollback or decision of a policy; null before the first.
  nlohmann::json last_switch() const;

 private:
  struct Sample {
    double ms;
    int32_t running, waiting, seam;
    double generated_per_second, prompt_per_second, kv_usage;
  };
  struct Move {
    double ms;
    int32_t seam;
  };
  struct SwitchEvent {
    double ms;
    const char* what;
    int32_t from, to;
    int64_t bytes;
    double seconds;
    std::string reason;
  };
  using Clock = std::chrono::steady_clock;

  double now_ms() const { return std::chrono::duration<double, std::milli>(Clock::now() - start_).count(); }
  static nlohmann::json json_of(const SwitchEvent& e);

  const Clock::time_point start_ = Clock::now();
  mutable std::mutex mutex_;
  std::deque<Sample> samples_;
  std::deque<Move> moves_;  // of the seam, also between two samples
  std::deque<SwitchEvent> switches_;
  double last_ms_ = 0;
  uint64_t last_generated_ = 0, last_prompt_ = 0;
};

const char* name_of_layout(int32_t layout);

}  // namespace moebius_examples
