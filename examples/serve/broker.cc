#include "examples/serve/broker.h"

#include <algorithm>

namespace moebius_examples {
namespace {

using namespace std::chrono_literals;

constexpr size_t kMostUnread = 4096;    // items of a choice
constexpr auto kLookAtWaiters = 250ms;  // at whether the outcome of a switch is still wanted

Item item_of(const moebius_event& e, size_t prompt, int32_t n) {
  Item item;
  item.choice = static_cast<int32_t>(prompt) * n + e.sample;
  if (e.type == MOEBIUS_EVENT_FINISHED) {
    item.finish_reason = e.finish_reason;
    item.why = e.reason;
    return item;
  }
  item.token = e.token;
  item.logprob = e.logprob;
  for (int32_t i = 0; i < e.num_top; ++i) item.top.emplace_back(e.top_tokens[i], e.top_logprobs[i]);
  return item;
}

}  // namespace

Generation::~Generation() { broker_.release(*this); }

std::vector<Item> Generation::wait(std::chrono::milliseconds most) {
  std::unique_lock lock(mutex_);
  filled_.wait_for(lock, most, [&] { return !items_.empty(); });
  return std::exchange(items_, {});
}

void Generation::cancel(int32_t choice) {
  std::lock_guard lock(broker_.mutex_);
  broker_.cancel(ids_[static_cast<size_t>(choice / n_)], choice % n_);
}

bool Generation::overran() {
  std::lock_guard lock(mutex_);
  return overran_;
}

Broker::Broker(moebius_cpp::Engine& engine) : engine_(engine) {
  engine_.start();
  thread_ = std::thread([this] { dispatch(); });
}

Broker::~Broker() {
  engine_.stop();
  {
    std::lock_guard lock(mutex_);
    ends_ = true;
  }
  thread_.join();
}

std::unique_ptr<Generation> Broker::submit(const std::vector<moebius_cpp::Request>& requests, int n) {
  std::unique_ptr<Generation> generation(new Generation(*this));
  generation->n_ = n;
  generation->most_unread_ = kMostUnread * requests.size() * static_cast<size_t>(n);
  std::lock_guard lock(mutex_);
  generation->ids_ = engine_.submit(requests);
  for (size_t prompt = 0; prompt < requests.size(); ++prompt)
    routes_.emplace(generation->ids_[prompt], Route{generation.get(), prompt, n, n});
  return generation;
}

std::optional<SwitchOutcome> Broker::switch_to(moebius_layout to, const std::function<bool()>& wanted) {
  std::unique_lock lock(mutex_);
  engine_.request_switch(to);
  const auto waiter = waiters_.insert(waiters_.end(), Waiter{to, {}});
  while (!waiter->outcome && wanted()) settled_.wait_for(lock, kLookAtWaiters);
  const std::optional<SwitchOutcome> outcome = waiter->outcome;
  waiters_.erase(waiter);
  return outcome;
}

void Broker::dispatch() {
  std::vector<moebius_event> events;
  auto next_sample = std::chrono::steady_clock::now();
  for (;;) {
    engine_.poll(events, 50);
    {
      std::lock_guard lock(mutex_);
      if (ends_) return;
      for (const moebius_event& e : events) hand_out(e);
    }
    if (const auto now = std::chrono::steady_clock::now(); now >= next_sample) {
      history_.sample(engine_.stats());
      next_sample = now + History::kInterval;
    }
  }
}

// Under mutex_.
void Broker::hand_out(const moebius_event& e) {
  if (e.type != MOEBIUS_EVENT_TOKEN && e.type != MOEBIUS_EVENT_FINISHED) {
    history_.record(e);
    settle(e);
    return;
  }
  const auto it = routes_.find(e.request);
  if (it == routes_.end()) return;
  Route& route = it->second;
  Generation& g = *route.generation;
  {
    std::lock_guard lock(g.mutex_);
    if (g.items_.size() < g.most_unread_)
      g.items_.push_back(item_of(e, route.prompt, route.n));
    else
      g.overran_ = true;
    g.filled_.notify_one();
    if (g.overran_) cancel(e.request);
  }
  if (e.type == MOEBIUS_EVENT_FINISHED && --route.unfinished == 0) {
    g.ids_[route.prompt] = 0;
    routes_.erase(it);
  }
}

// Under mutex_. An outcome is of whoever asked for its layout; who asked earlier for the other one has been turned round by them.
void Broker::settle(const moebius_event& e) {
  SwitchOutcome outcome{SwitchOutcome::kFinished, e};
  moebius_layout to = e.to;
  if (e.type == MOEBIUS_EVENT_SWITCH_REFUSED) {
    outcome.kind = SwitchOutcome::kRefused;
  } else if (e.type == MOEBIUS_EVENT_ROLLED_BACK) {
    outcome.kind = SwitchOutcome::kRolledBack;
    to = e.from;  // its from and to are those of the way back
  } else if (e.type != MOEBIUS_EVENT_SWITCH_FINISHED) {
    return;
  }
  const auto due = [&](const Waiter& w) { return !w.outcome && w.to == to; };
  const auto first = std::find_if(waiters_.begin(), waiters_.end(), due);
  if (first == waiters_.end()) return;
  for (auto w = waiters_.begin(); w != first; ++w)
    if (!w->outcome) w->outcome = SwitchOutcome{SwitchOutcome::kTurned, e};
  for (auto w = first; w != waiters_.end() && due(*w); ++w) w->outcome = outcome;
  settled_.notify_all();
}

// Under mutex_.
void Broker::cancel(uint64_t id, std::optional<int32_t> sample) {
  if (id == 0) return;
  try {
    if (sample) engine_.cancel(id, *sample);
    else engine_.cancel(id);
  } catch (const moebius_cpp::Error&) {
    // it has ended meanwhile
  }
}

void Broker::release(Generation& generation) {
  std::lock_guard lock(mutex_);
  for (uint64_t id : generation.ids_)
    if (id != 0 && routes_.erase(id) > 0) cancel(id);
}

}  // namespace moebius_examples
