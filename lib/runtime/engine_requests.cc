// What hosts hand in from other threads, and what they are told: submissions, cancels, wishes, events.
#include <algorithm>

#include "lib/base/error.h"
#include "lib/base/time.h"
#include "lib/runtime/engine_impl.h"

namespace moebius {

// ---- what other threads hand in

void Engine::Impl::check_request(const RequestSpec& spec) const {
  if (spec.prompt_ids.empty()) fail(Code::kInvalidArgument, "the prompt is empty");
  for (size_t i = 0; i < spec.prompt_ids.size(); ++i)
    if (spec.prompt_ids[i] < 0 || spec.prompt_ids[i] >= model_.vocab_size)
      fail(Code::kInvalidArgument, "prompt token {} is {}, the vocabulary has {}", i, spec.prompt_ids[i], model_.vocab_size);
  moebius::check(spec.sampling, model_.vocab_size);
  refuse_if_never(spec.sampling.n);
  if (spec.keep_routes && (shape_.num_experts == 0 || shape_.num_experts > INT16_MAX))
    fail(Code::kUnsupported, "routed_experts: the model has {} experts, their numbers are given in 16 bits", shape_.num_experts);
  if (!(spec.deadline_ms >= 0)) fail(Code::kInvalidArgument, "deadline_ms is {}, must be at least 0", spec.deadline_ms);
  const int64_t total = static_cast<int64_t>(spec.prompt_ids.size()) + spec.sampling.max_tokens;
  if (total > config_.max_context)
    fail(Code::kContextTooLong, "prompt of {} + max_tokens {} = {} tokens, the context is {}", spec.prompt_ids.size(),
         spec.sampling.max_tokens, total, config_.max_context);
  // The last token is never fed, so total − 1 tokens have KV; one page more is asked for before a token is chosen.
  const int64_t pages = div_up(total, config_.page_tokens);
  int64_t ep_pages = 0;
  for (int h = 0; h < kv_.num_homes(); ++h) ep_pages = std::max(ep_pages, kv_.ep_capacity(h));
  for (const auto& [name, capacity] : {std::pair<const char*, int64_t>{"tp", kv_.tp_capacity()}, {"ep", ep_pages}})
    if (pages > capacity)
      fail(Code::kDoesNotFit, "the request needs {} KV pages of {} tokens, layout {} holds {}: raise memory_bytes or shorten it",
           pages, config_.page_tokens, name, capacity);
}

// Under step_mutex_ or inbox_mutex_.
void Engine::Impl::refuse_if_failed() const {
  if (failed_) fail(Code::kInvalidState, "the engine has failed and serves no more: {}", failure_.view());
}

void Engine::Impl::refuse_if_never(int64_t n) const {
  if (n > config_.max_queue)
    fail(Code::kInvalidArgument, "{} samples at once can never be queued, max_queue is {}", n, config_.max_queue);
}

// Under step_mutex_ or inbox_mutex_.
void Engine::Impl::refuse_if_mixed() const {
  if (mixed_)
    fail(Code::kInvalidState, "the weights are a mixture until an update of all of them succeeds, for the last one failed: {}", failure_.view());
}

// Under inbox_mutex_.
void Engine::Impl::refuse_if_full(int64_t n) {
  if (waiting_hint_ + n <= config_.max_queue) return;
  metrics_.on_rejection();
  fail(Code::kQueueFull, "{} requests are waiting, max_queue is {}", waiting_hint_, config_.max_queue);
}

void Engine::Impl::check(const RequestSpec& spec) const {
  check_request(spec);
  std::lock_guard lock(inbox_mutex_);
  refuse_if_failed();
  refuse_if_mixed();
  refuse_if_draining();
}

// Under inbox_mutex_.
void Engine::Impl::refuse_if_draining() const {
  if (draining_) fail(Code::kInvalidState, "the engine is draining and takes no requests until it is resumed");
}

void Engine::Impl::submit(std::span<const RequestSpec* const> specs, uint64_t* out_numbers) {
  int64_t samples = 0;
  for (const RequestSpec* spec : specs) {
    check_request(*spec);
    samples += spec->sampling.n;
  }
  refuse_if_never(samples);
  const auto refuse = [&] {
    refuse_if_failed();
    refuse_if_mixed();
    refuse_if_draining();
    refuse_if_full(samples);
  };
  uint64_t first = 0;
  {
    std::lock_guard lock(inbox_mutex_);
    refuse();
    first = next_number_;
    next_number_ += specs.size();
  }
  std::vector<std::unique_ptr<Request>> made;  // unlocked: up to 1,024 copies of each prompt
  for (const RequestSpec* spec : specs) made.push_back(make_request(*spec, first + made.size()));
  {
    std::lock_guard lock(inbox_mutex_);
    refuse();
    const size_t inbox_size = inbox_.size() + made.size();
    if (inbox_.capacity() < inbox_size) inbox_.reserve(2 * inbox_size);
    try {
      for (size_t i = 0; i < made.size(); ++i) requests_[first + i] = std::move(made[i]);
      events_.promise(static_cast<size_t>(samples));  // the end of each
    } catch (...) {
      for (size_t i = 0; i < made.size(); ++i) requests_.erase(first + i);
      throw;
    }
    for (size_t i = 0; i < made.size(); ++i) inbox_.push_back(requests_[first + i].get());
    waiting_hint_ += samples;
    metrics_.set_waiting(waiting_hint_);
  }
  inbox_filled_.notify_one();
  for (size_t i = 0; i < specs.size(); ++i) out_numbers[i] = first + i;
}

std::unique_ptr<Request> Engine::Impl::make_request(const RequestSpec& spec, uint64_t number) const {
  auto request = std::make_unique<Request>();
  request->spec = spec;
  request->number = number;
  request->submitted = Clock::now();
  if (spec.deadline_ms > 0) request->deadline = request->submitted + clamped_ms(spec.deadline_ms);
  make_samples(*request);
  return request;
}

bool Engine::Impl::drain(double timeout_ms) {
  std::unique_lock lock(inbox_mutex_);
  refuse_if_failed();
  draining_ = true;
  const bool empty = emptied_.wait_for(lock, clamped_ms(timeout_ms), [&] {
    return published_.running == 0 && waiting_hint_ == 0 && !published_.switching && (wished_seams_.empty() || mixed_);
  });
  refuse_if_failed();
  return empty;
}

void Engine::Impl::resume() {
  std::lock_guard lock(inbox_mutex_);
  refuse_if_failed();
  draining_ = false;
}

void Engine::Impl::make_samples(Request& request) const {
  RequestSpec& spec = request.spec;
  const size_t total = spec.prompt_ids.size() + static_cast<size_t>(spec.sampling.max_tokens);
  const size_t pages = static_cast<size_t>(div_up(static_cast<int64_t>(total) + 1, config_.page_tokens)) + 1;
  if (spec.id.empty()) spec.id = std::to_string(request.number);
  request.samples.resize(static_cast<size_t>(spec.sampling.n));
  request.unfinished = spec.sampling.n;
  for (int i = 0; i < spec.sampling.n; ++i) {
    Sequence& s = request.samples[static_cast<size_t>(i)];
    s.request = &request;
    s.sample = i;
    s.tokens.reserve(total);
    s.tokens = spec.prompt_ids;
    s.blocks.reserve(pages);
    s.tp_pages.reserve(pages);
    s.ep_pages.reserve(pages);
    const uint64_t seed = spec.sampling.seed ? request_seed(*spec.sampling.seed, {}, i) : request_seed(config_.seed, spec.id, i);
    s.sampler.start(spec.sampling, seed, spec.prompt_ids, model_.vocab_size);
  }
}

bool Engine::Impl::cancel(uint64_t request, int32_t sample) {
  {
    std::lock_guard lock(inbox_mutex_);
    const auto it = requests_.find(request);
    if (it == requests_.end()) return false;
    const bool forgets = it->second->unfinished == 0;
    if (forgets && (sample >= 0 || !keeps_positions(it->second->spec))) return false;
    if (const int32_t n = it->second->spec.sampling.n; sample < -1 || sample >= n)
      fail(Code::kInvalidArgument, "sample {} of request {}: it has {}", sample, request, n);
    cancels_.push_back({request, sample, forgets});
  }
  inbox_filled_.notify_one();
  return true;
}

void Engine::Impl::aim(int32_t seam) {
  if (seam < 0 || seam > model_.shape.num_layers())
    fail(Code::kInvalidArgument, "seam {} is outside 0 … {}", seam, model_.shape.num_layers());
  {
    std::lock_guard lock(inbox_mutex_);
    refuse_if_failed();
    if (wished_seams_.size() >= kMaxWishes)
      fail(Code::kQueueFull, "{} switches wait to be taken up by the next step already", wished_seams_.size());
    wished_seams_.push_back(seam);
  }
  inbox_filled_.notify_one();
}

void Engine::Impl::set_stall_budget(double ms) {
  if (!(ms >= 0)) fail(Code::kInvalidArgument, "stall_budget_ms is {}, must be at least 0", ms);
  std::lock_guard lock(inbox_mutex_);
  refuse_if_failed();
  wished_budget_ = ms;
}

void Engine::Impl::set_policy(const PolicyConfig& policy) {
  std::unique_ptr<Policy> made = make_policy(policy, policy_limits(config_), &costs_);  // refuses a bad one here
  {
    std::lock_guard lock(inbox_mutex_);
    refuse_if_failed();
    wished_policy_ = std::move(made);
  }
  inbox_filled_.notify_one();
}

// ---- events

// What a switch wrote and took, there and back.
void Engine::Impl::count_moved(const Event& event) {
  metrics_.on_bytes_moved(event.bytes);
  stats_.switch_seconds += event.seconds;
  stats_.bytes_moved += event.bytes;
}

// Of a switch from one layout to the other; one that was turned, or began or ended inside, has another price.
void Engine::Impl::learn_price(const Event& event) {
  if (event.type == EventType::kSwitchStarted) costs_.on_switch_started();
  const bool inside = switcher_.began_inside() || (event.seam > 0 && event.seam < model_.shape.num_layers());
  if (event.type == EventType::kSwitchFinished && event.from != event.to && !inside) costs_.on_switch(event.to, event.bytes, event.seconds);
}

void Engine::Impl::emit(Event&& event) {
  event.step = step_;
  event.time_ns = ns_of(Clock::now());
  learn_price(event);
  const bool promised = event.type == EventType::kFinished;
  if (calibrating_) {
    if (promised) events_.forgo_promised();
    return;
  }
  if (config_.log) log_event(event);
  switch (event.type) {
    case EventType::kSwitchFinished:
      count_moved(event);
      if (event.seam > 0 && event.seam < model_.shape.num_layers()) break;  // held inside: no layout has been reached
      if (event.from == event.to && event.bytes == 0) break;  // asked for the layout that serves already
      metrics_.on_switch(event.from, event.to, event.seconds);
      ++stats_.switches;
      policy_->on_switched(clock_seconds());
      break;
    case EventType::kSwitchRefused:
      metrics_.on_refusal();
      if (policy_asked_) policy_->on_failed(event.to, event.reason);
      ++stats_.refusals;
      break;
    case EventType::kRolledBack:
      count_moved(event);
      metrics_.on_rollback();
      if (policy_asked_) policy_->on_failed(event.from, event.reason);  // its from and to are those of the way back
      ++stats_.rollbacks;
      break;
    case EventType::kPreempted:
      metrics_.on_preemption();
      ++stats_.preemptions;
      break;
    default:
      break;
  }
  if (promised) events_.push_promised(std::move(event));
  else events_.push(std::move(event));
}

void Engine::Impl::log(LogLevel level, const char* category, const std::string& message) const {
  if (config_.log) config_.log(level, category, message);
}

void Engine::Impl::log_event(const Event& e) const {
  const auto moved = [&] { return fmt::format("{} to {}, seam {}, {} bytes in {:.3f} s", name_of(e.from), name_of(e.to), e.seam, e.bytes, e.seconds); };
  switch (e.type) {
    case EventType::kSwitchFinished: return log(LogLevel::kInfo, "switch", "finished: " + moved());
    case EventType::kSwitchRefused: return log(LogLevel::kWarning, "switch", fmt::format("refused to {}: {}", name_of(e.to), e.reason.view()));
    case EventType::kRolledBack: return log(LogLevel::kWarning, "switch", fmt::format("rolled back: {}: {}", moved(), e.reason.view()));
    case EventType::kDecision: return log(LogLevel::kInfo, "policy", e.reason.str());
    default: return;
  }
}

Event Engine::Impl::request_event(EventType type, const Sequence& sequence) const {
  Event event;
  event.type = type;
  event.request = sequence.request->number;
  event.user_data = sequence.request->spec.user_data;
  event.sample = sequence.sample;
  return event;
}

void Engine::Impl::emit_request(EventType type, const Sequence& sequence) { emit(request_event(type, sequence)); }

}  // namespace moebius
