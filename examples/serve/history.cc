#include "examples/serve/history.h"

#include <cmath>

namespace moebius_examples {
namespace {

constexpr size_t kSamples = 2400, kMoves = 8192, kSwitches = 256;

template <class T>
void push(std::deque<T>& ring, size_t most, T&& value) {
  if (ring.size() == most) ring.pop_front();
  ring.push_back(std::forward<T>(value));
}

double rounded(double v, double digits) { return std::round(v * digits) / digits; }

}  // namespace

const char* name_of_layout(int32_t layout) { return layout == MOEBIUS_LAYOUT_TP ? "tp" : "ep"; }

void History::sample(const moebius_stats& s) {
  std::lock_guard lock(mutex_);
  const double ms = now_ms(), seconds = (ms - last_ms_) / 1000;
  const auto rate = [&](uint64_t now, uint64_t last) { return seconds > 0 ? static_cast<double>(now - last) / seconds : 0; };
  push(samples_, kSamples,
       Sample{ms, s.running, s.waiting, s.seam, rate(s.generation_tokens, last_generated_), rate(s.prompt_tokens, last_prompt_),
              s.kv_usage});
  last_ms_ = ms;
  last_generated_ = s.generation_tokens;
  last_prompt_ = s.prompt_tokens;
}

void History::record(const moebius_event& e) {
  std::lock_guard lock(mutex_);
  const auto add = [&](const char* what) {
    push(switches_, kSwitches, SwitchEvent{now_ms(), what, e.from, e.to, e.bytes, e.seconds, e.reason});
  };
  switch (e.type) {
    case MOEBIUS_EVENT_SWITCH_STARTED:
    case MOEBIUS_EVENT_SEAM: push(moves_, kMoves, Move{now_ms(), e.seam}); break;
    case MOEBIUS_EVENT_SWITCH_FINISHED:
      push(moves_, kMoves, Move{now_ms(), e.seam});
      add("finished");
      break;
    case MOEBIUS_EVENT_SWITCH_REFUSED: add("refused"); break;
    case MOEBIUS_EVENT_ROLLED_BACK:
      push(moves_, kMoves, Move{now_ms(), e.seam});
      add("rolled_back");
      break;
    case MOEBIUS_EVENT_DECISION: add("decided"); break;
    default: break;
  }
}

nlohmann::json History::json_of(const SwitchEvent& e) {
  return {{"ms", e.ms},           {"what", e.what},    {"from", name_of_layout(e.from)}, {"to", name_of_layout(e.to)}, {"bytes", e.bytes},
          {"seconds", e.seconds}, {"reason", e.reason}};
}

nlohmann::json History::since(double since_ms) const {
  std::lock_guard lock(mutex_);
  nlohmann::json samples = nlohmann::json::array(), moves = samples, switches = samples;
  for (const Sample& s : samples_)
    if (s.ms > since_ms)
      samples.push_back({s.ms, s.running, s.waiting, rounded(s.generated_per_second, 10), rounded(s.prompt_per_second, 10), s.seam,
                         rounded(s.kv_usage, 1e4)});
  for (const Move& m : moves_)
    if (m.ms > since_ms) moves.push_back({m.ms, m.seam});
  for (const SwitchEvent& e : switches_)
    if (e.ms > since_ms) switches.push_back(json_of(e));
  return {{"now", now_ms()},
          {"interval_ms", kInterval.count()},
          {"columns", {"ms", "running", "waiting", "generated_per_second", "prompt_per_second", "seam", "kv_usage"}},
          {"samples", std::move(samples)},
          {"seam", std::move(moves)},
          {"switches", std::move(switches)}};
}

nlohmann::json History::last_switch() const {
  std::lock_guard lock(mutex_);
  return switches_.empty() ? nlohmann::json() : json_of(switches_.back());
}

}  // namespace moebius_examples
