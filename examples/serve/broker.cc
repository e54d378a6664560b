#include "examples/serve/broker.h"

#include <algorithm>
#include <cstdio>

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
  item.is_stop = e.finish_reason == MOEBIUS_FINISH_STOP;
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
  if (switches_.empty() || switches_.back()->to != to) {
    const auto added = std::make_shared<Switch>(Switch{to});
    if (switches_.empty() || switches_.back()->begun) {
      engine_.request_switch(to);
      added->asked = true;
    }
    switches_.push_back(added);
  }
  const std::shared_ptr<Switch> mine = switches_.back();
  while (!mine->outcome && wanted()) settled_.wait_for(lock, kLookAtWaiters);
  return mine->outcome;
}

void Broker::dispatch() {
  std::vector<moebius_event> events;
  auto next_sample = std::chrono::steady_clock::now();
  for (;;) {
    engine_.poll(events, 50);
    {
      std::lock_guard lock(mutex_);
      if (ends_) return;
      for (const moebius_event& e : events) try {
          hand_out(e);
        } catch (const std::bad_alloc&) {
          lose(e);
        }
    }
    if (const auto now = std::chrono::steady_clock::now(); now >= next_sample) {
      try {
        history_.sample(engine_.stats());
      } catch (const std::bad_alloc&) {  // one sample fewer
      }
      next_sample = now + History::kInterval;
    }
  }
}

// Under mutex_.
void Broker::hand_out(const moebius_event& e) {
  if (e.type != MOEBIUS_EVENT_TOKEN && e.type != MOEBIUS_EVENT_FINISHED) {
    history_.record(e);
    follow(e);
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

// Under mutex_. For an event that there was no memory for: whoever it belongs to ends, as one that has not taken its events.
void Broker::lose(const moebius_event& e) {
  const auto it = routes_.find(e.request);
  if (it == routes_.end()) return;
  {
    std::lock_guard lock(it->second.generation->mutex_);
    it->second.generation->overran_ = true;
  }
  it->second.generation->filled_.notify_one();
  if (e.type != MOEBIUS_EVENT_FINISHED) cancel(e.request);
}

// Under mutex_. A policy's switches have events, too: one that goes where the first of these goes counts as it.
void Broker::follow(const moebius_event& e) {
  using Kind = SwitchOutcome::Kind;
  static const std::map<int32_t, Kind> kEnds = {{MOEBIUS_EVENT_SWITCH_FINISHED, Kind::kFinished},
                                                {MOEBIUS_EVENT_SWITCH_REFUSED, Kind::kRefused},
                                                {MOEBIUS_EVENT_ROLLED_BACK, Kind::kRolledBack}};
  const bool rolled_back = e.type == MOEBIUS_EVENT_ROLLED_BACK;
  const moebius_layout to = rolled_back ? e.from : e.to;  // from and to are those of the way back
  const bool starts = e.type == MOEBIUS_EVENT_SWITCH_STARTED;
  if (starts && !switches_.empty() && switches_.front()->begun && switches_.front()->to != to) settle(switches_.begin(), Kind::kTurned, e);
  if (!switches_.empty() && (switches_.front()->to == to || (rolled_back && switches_.front()->begun))) {
    if (starts) switches_.front()->begun = true;
    else if (const auto end = kEnds.find(e.type); end != kEnds.end()) settle(switches_.begin(), end->second, e);
  }
  ask_for_next();
}

void Broker::settle(Switches::iterator which, SwitchOutcome::Kind kind, const moebius_event& e) {
  (*which)->outcome = SwitchOutcome{kind, e};
  switches_.erase(which);
  settled_.notify_all();
}

void Broker::ask_for_next() {
  for (;;) {
    const auto next = std::find_if(switches_.begin(), switches_.end(), [](const auto& s) { return !s->begun; });
    if (next == switches_.end() || (*next)->asked) return;
    try {
      engine_.request_switch((*next)->to);
      (*next)->asked = true;
      return;
    } catch (const moebius_cpp::Error& error) {
      moebius_event e{};
      std::snprintf(e.reason, sizeof e.reason, "%s", error.what());
      settle(next, SwitchOutcome::kRefused, e);
    }
  }
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
