// Calibration: before an engine serves, requests that nobody sees fill both layouts' curves and price the switch between them. What
// remains of them is what was learned.
#include <algorithm>
#include <memory>
#include <utility>

#include "lib/runtime/dummies.h"
#include "lib/runtime/engine_impl.h"

namespace moebius {

// How many dummies of so many tokens find room in either layout.
int Engine::Impl::most_dummies(int64_t tokens) const {
  const int64_t pages = div_up(tokens, config_.page_tokens) + 1;
  int64_t homes = INT64_MAX;
  for (int h = 0; h < kv_.num_homes(); ++h) homes = std::min<int64_t>(homes, kv_.ep_capacity(h) / pages);
  return static_cast<int>(std::min({int64_t{config_.max_batch}, int64_t{config_.max_queue}, kv_.tp_capacity() / pages, homes * kv_.num_homes()}));
}

// Batches of 1, of the shortest whatever the time, and 2, 4 … until then; every request is gone afterwards.
void Engine::Impl::serve_dummies(const DummyRound& round, Clock::time_point until) {
  std::vector<uint64_t> numbers;
  const auto in_time = [&] { return (numbers.size() <= 1 && round.prompt <= DummyRound::kShortest) || Clock::now() < until; };
  const int64_t most = std::min<int64_t>(round.most, most_dummies(round.total));
  for (int64_t size = 1; size <= most && in_time(); size *= 2) {
    while (static_cast<int64_t>(numbers.size()) < size) {
      RequestSpec spec;
      for (int64_t i = 0; i < round.prompt; ++i)
        spec.prompt_ids.push_back(static_cast<int32_t>((static_cast<int64_t>(numbers.size()) * 7 + i) % model_.vocab_size));
      spec.sampling.max_tokens = static_cast<int32_t>(round.total - round.prompt);
      spec.sampling.ignore_eos = true;
      const RequestSpec* const one[] = {&spec};
      submit(one, &numbers.emplace_back());
    }
    do step();  // takes them in
    while (scheduler_.tokens_to_prefill() > 0 && in_time());
    for (int i = 0; i < DummyRound::kStepsOfSize && in_time(); ++i) step();
  }
  for (uint64_t number : numbers) cancel(number, -1);
  step();
}

void Engine::Impl::calibrate() {
  const auto round = [this](int64_t prompt) { return DummyRound::of(prompt, config_.max_context); };
  if (config_.ranks == 1 || config_.max_context < 2 || most_dummies(round(DummyRound::kShortest).total) < 1) return;
  if (costs_.curve(Layout::kTp).seen() && costs_.curve(Layout::kEp).seen()) return;
  calibrating_ = true;
  std::unique_ptr<Policy> policy = std::exchange(policy_, make_policy({}, policy_limits(config_)));
  const double stall_budget_ms = std::exchange(stall_budget_ms_, 0);
  const Layout start = config_.layout;
  for (Layout layout : {start, other(start)}) {
    aim(layout == Layout::kTp ? switcher_.num_layers() : 0);
    step();
    const auto until = Clock::now() + clamped_ms(config_.policy_calibrate_ms / 2);
    int64_t prompt = DummyRound::kShortest;
    do serve_dummies(round(prompt), until);
    while (prompt = DummyRound::next(prompt), Clock::now() < until);
  }
  aim(start == Layout::kTp ? switcher_.num_layers() : 0);
  step();

  policy_ = std::move(policy);
  stall_budget_ms_ = stall_budget_ms;
  kv_.drop_cached();
  scheduler_.prefix_queries = scheduler_.prefix_hits = 0;
  step_ = arrivals_ = 0;
  next_number_ = 1;
  last_seconds_ = 0;
  stats_ = {};
  stats_.num_layers = switcher_.num_layers();
  std::destroy_at(&metrics_);
  std::construct_at(&metrics_);
  calibrating_ = false;
  publish_stats();
}

}  // namespace moebius
