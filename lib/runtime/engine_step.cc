// A step: what came in, the plan, the ranks' work, the tokens.
#include <algorithm>
#include <cstring>

#include "lib/base/error.h"
#include "lib/comm/waits.h"
#include "lib/runtime/engine_impl.h"

namespace moebius {

void Engine::Impl::take_inbox() {
  arriving_.clear();
  cancelling_.clear();
  {
    std::lock_guard lock(inbox_mutex_);
    arriving_.swap(inbox_);
    cancelling_.swap(cancels_);
  }
  for (Request* request : arriving_) {
    next_deadline_ = std::min(next_deadline_, request->deadline);
    for (Sequence& s : request->samples) {
      s.arrival = arrivals_++;
      scheduler_.add(s);
    }
    emit_request(EventType::kArrived, request->samples[0]);
  }
  for (const Cancel& cancel : cancelling_) {
    Request* request = nullptr;
    {
      std::lock_guard lock(inbox_mutex_);
      const auto it = requests_.find(cancel.request);
      if (it == requests_.end()) continue;
      if (cancel.forgets) {
        requests_.erase(it);
        continue;
      }
      request = it->second.get();
    }
    if (request->unfinished > 0) take_cancel(*request, cancel.sample);
  }
}

void Engine::Impl::take_cancel(Request& request, int32_t sample) {
  bool told = false;
  for (Sequence& s : request.samples) {
    if (s.state == SequenceState::kFinished || (sample >= 0 && s.sample != sample)) continue;
    if (!std::exchange(told, true)) emit_request(EventType::kCancelled, s);
    finish(s, FinishReason::kAbort, "cancelled");
  }
  forget_if_done(request);
}

void Engine::Impl::take_wishes() {
  seams_.clear();
  seams_begun_ = 0;
  {
    std::lock_guard lock(inbox_mutex_);
    seams_.swap(wished_seams_);
    if (config_.ranks > 1 && !seams_.empty()) published_.switching = true;  // who drains waits for them
    if (wished_budget_) stall_budget_ms_ = *std::exchange(wished_budget_, std::nullopt);
    if (wished_policy_) {
      policy_ = std::move(wished_policy_);
      policy_asked_ = false;  // that was the former one
    }
  }
  if (!seams_.empty()) policy_asked_ = false;
  for (size_t i = 0; i < seams_.size(); ++i) {
    if (config_.ranks == 1) {
      ++seams_begun_;
      report_seam(seams_[i]);
      continue;
    }
    if (i > 0 && stall_budget_ms_ == 0) switcher_.advance(0);  // all at once: the one before has ended when this one begins
    ++seams_begun_;
    switcher_.begin(seams_[i], config_.preempt_to_fit);
  }
}

void Engine::Impl::refuse_seam(int32_t target, std::string_view why) {
  Event event;
  event.type = EventType::kSwitchRefused;
  event.seam = seam();
  event.to = layout_towards(event.seam, target, model_.shape.num_layers());
  event.from = other(event.to);
  event.reason = Reason::of("the engine has failed: {}", why);
  emit(std::move(event));
}

// With one rank every slice has one owner in both layouts: a switch succeeds and moves nothing.
void Engine::Impl::report_seam(int32_t target) {
  Event event;
  event.type = EventType::kSwitchStarted;
  event.to = layout_towards(label_seam_, target, model_.shape.num_layers());
  event.from = target == label_seam_ ? event.to : other(event.to);
  event.seam = label_seam_;
  emit(Event(event));
  event.type = EventType::kSwitchFinished;
  event.seam = label_seam_ = target;
  emit(std::move(event));
}

// What a policy that rests on costs wants to know beside them: prices, and how long the requests may stay.
void Engine::Impl::foresee(LoadSample& load) const {
  for (Layout to : {Layout::kTp, Layout::kEp}) load.price[static_cast<size_t>(to)] = costs_.price(to, switcher_.bytes_across(to));
  add_remaining(scheduler_, load);
}

void Engine::Impl::observe_load() {
  LoadSample load = sample_of(scheduler_);
  load.step = step_;
  load.time_s = clock_seconds();
  const int32_t seam = this->seam();
  load.layout = seam == 0 ? Layout::kEp : Layout::kTp;
  load.switching = switcher_.moving();
  load.inside = seam > 0 && seam < model_.shape.num_layers();
  load.last = last_load_;
  load.last_seconds = std::exchange(last_seconds_, 0);
  if (policy_->figures() != nullptr) foresee(load);
  const std::optional<Decision> decision = policy_->observe(load);
  if (!decision) return;
  Event event;
  event.type = EventType::kDecision;
  event.from = load.layout;
  event.to = decision->to;
  event.seam = seam;
  event.reason = decision->record;
  emit(std::move(event));
  if (decision->shadow) return;
  policy_asked_ = true;
  if (config_.ranks > 1) switcher_.begin(decision->to == Layout::kTp ? switcher_.num_layers() : 0, config_.preempt_to_fit && decision->may_preempt);
  else report_seam(decision->to == Layout::kTp ? switcher_.num_layers() : 0);
}

// Of the plan that is about to be committed; where requests have no homes, as if they were dealt to them.
StepLoads Engine::Impl::load_of_step() {
  std::fill(home_loads_.begin(), home_loads_.end(), StepLoad{});
  size_t dealt = 0;
  for (const ScheduledChunk& c : plan_.chunks) {
    const int32_t home = c.sequence->home;
    home_loads_[home >= 0 ? static_cast<size_t>(home) : dealt++ % home_loads_.size()] += StepLoad::of(static_cast<double>(c.sequence->computed), c.num_rows);
  }
  return StepLoads::of(home_loads_);
}

void Engine::Impl::learn_cost(const StepLoads& load, double seconds) {
  const double now = clock_seconds();
  const int32_t seam = plan_.shape.seam;
  if (switcher_.moving()) return costs_.on_step_under_way(layout_towards(seam, switcher_.target(), model_.shape.num_layers()), load, seconds, now);
  if (seam > 0 && seam < model_.shape.num_layers()) return;
  costs_.on_step(seam == 0 ? Layout::kEp : Layout::kTp, load, seconds, now);
  last_load_ = load;
  last_seconds_ = seconds;
}

void Engine::Impl::expire(Clock::time_point now) {
  if (now < next_deadline_) return;
  next_deadline_ = kNoDeadline;
  for (const std::vector<Sequence*>* list : {&scheduler_.running(), &scheduler_.waiting()})
    for (size_t i = list->size(); i-- > 0;) {
      Sequence& s = *(*list)[i];
      Request& request = *s.request;
      if (now < request.deadline) {
        next_deadline_ = std::min(next_deadline_, request.deadline);
        continue;
      }
      finish(s, FinishReason::kAbort, "deadline passed");
      forget_if_done(request);
    }
}

StepResult Engine::Impl::step() {
  std::lock_guard step_lock(step_mutex_);
  refuse_if_failed();
  refuse_if_mixed();
  return run_step();
}

// Under step_mutex_.
StepResult Engine::Impl::run_step() {
  const FloatingPointMode mode;
  const CallersDevice caller(*device_);
  StepResult result;
  const auto begin = Clock::now();
  try {
    take_inbox();
    expire(begin);
    const auto before_switch = Clock::now();
    take_wishes();
    observe_load();
    const bool switches = !seams_.empty() || switcher_.moving();
    switcher_.advance(stall_budget_ms_);
    result.switch_seconds = seconds_since(before_switch);
    for (const Sequence* s : scheduler_.plan(plan_)) emit_request(EventType::kPreempted, *s);
    if (plan_.num_rows() > 0) run_plan(result);
    result.worked = plan_.num_rows() > 0 || switches || !scheduler_.waiting().empty();
  } catch (...) {
    with_reason([this](std::string_view why) { fail_everything(why); });
    throw;
  }
  result.decode_rows = plan_.decode_rows;
  result.prefill_rows = plan_.prefill_rows;
  result.seconds = seconds_since(begin);
  ++step_;
  publish_stats();
  return result;
}

void Engine::Impl::run_plan(StepResult& result) {
  const auto begin = Clock::now();
  plan_.shape.seam = switcher_.seam();
  for (const ScheduledChunk& chunk : plan_.chunks) {
    Sequence& s = *chunk.sequence;
    if (s.first_scheduled == Clock::time_point{}) s.first_scheduled = begin;
  }
  make_records();
  if (device_->ops().choose_tokens != nullptr) list_choices();
  prepare_ranks();
  shape_now_ = &choose_shape();
  for (StepTables& tables : tables_)
    if (device_->host_memory()) tables.send(plan_, *shape_now_);
  world_.run([this](int rank, int thread) { compute(rank, thread); });
  result.captured = captured_now_ != nullptr;
  for (int r = 0; r < config_.ranks; ++r) result.experts_reached += readings_.experts_reached[r];
  result.compute_seconds = seconds_since(begin);
  learn_cost(load_of_step(), result.compute_seconds);
  scheduler_.commit(plan_);
  count_prompt_tokens();
  measure_exchanges();
  measure_expert_load();
  accept_tokens();
  metrics_.on_step(plan_.num_rows());
}

// Room for what requests keep of this step's positions. Choices of experts are read layer by layer, which no captured step does.
void Engine::Impl::make_records() {
  bool routes = false;
  for (const ScheduledChunk& chunk : plan_.chunks) {
    Sequence& s = *chunk.sequence;
    const RequestSpec& spec = s.request->spec;
    if (spec.keep_logits) s.logits.make_room(s.computed + chunk.num_rows, model_.vocab_size);
    if (spec.keep_routes) s.routes.make_room(s.computed + chunk.num_rows, route_width());
    routes |= spec.keep_routes;
  }
  if (routes && routes_.data() == nullptr)
    routes_ = PinnedBuffer(*device_, route_width() * shape_.max_rows * static_cast<int64_t>(sizeof(int32_t)));
  executors_[0]->context().routes = routes ? reinterpret_cast<int32_t*>(routes_.data()) : nullptr;
}

void Engine::Impl::count_prompt_tokens() {
  for (const ScheduledChunk& chunk : plan_.chunks) {
    Sequence& s = *chunk.sequence;
    const int64_t begin = std::max(s.prompt_counted, s.computed - chunk.num_rows), end = std::min(s.computed, s.prompt_tokens());
    if (end <= begin) continue;
    stats_.prompt_tokens += static_cast<uint64_t>(end - begin);
    s.prompt_counted = end;
  }
}

// What ranks read of one another's in a step: in TP both sums of every row on every rank; in EP the rows and their choices go
// to every other rank and the experts' sums come back.
void Engine::Impl::measure_exchanges() {
  const int64_t row_pairs = plan_.num_rows() * (config_.ranks - 1);
  const int64_t sum = shape_.hidden * static_cast<int64_t>(config_.fast() ? sizeof(float) : sizeof(int64_t));
  const int64_t row = shape_.hidden * static_cast<int64_t>(sizeof(bf16)) + shape_.choices * static_cast<int64_t>(sizeof(int32_t) + sizeof(float));
  int64_t all_reduce = 0, all_to_all = 0;
  for (int l = 0; l < model_.shape.num_layers(); ++l)
    if (l < plan_.shape.seam) all_reduce += 2 * row_pairs * config_.ranks * sum;
    else if (model_.shape.mlps[static_cast<size_t>(l)].num_experts > 0) all_to_all += row_pairs * (row + sum);
  metrics_.on_exchange(all_reduce, all_to_all);
}

// The last MoE layer, whose choices of all rows rank 0 still has after a step, in either layout. −1: there is none.
int Engine::Impl::last_moe_layer() const {
  int layer = model_.shape.num_layers() - 1;
  while (layer >= 0 && model_.shape.mlps[static_cast<size_t>(layer)].num_experts == 0) --layer;
  return layer;
}

void Engine::Impl::measure_expert_load() {
  const int layer = last_moe_layer();
  const int64_t choices = plan_.num_rows() * model_.top_k;
  if (layer < 0 || choices == 0) return;
  std::fill(expert_rows_.begin(), expert_rows_.end(), 0);
  for (size_t h = 0; h < plan_.shape.homes.size(); ++h) {  // where the shape has them, among rows that fill the step up
    const int64_t first = (plan_.shape.homes[h].begin + shape_now_->row_shift(plan_.shape, h)) * shape_.choices;
    const int64_t num = plan_.shape.homes[h].size() * shape_.choices;
    for (int64_t i = first; i < first + num; ++i)
      if (const auto e = static_cast<size_t>(readings_.choices[i]); e < expert_rows_.size()) ++expert_rows_[e];  // shared experts have every row
  }
  const int32_t most = *std::max_element(expert_rows_.begin(), expert_rows_.end());
  const double experts = model_.shape.mlps[static_cast<size_t>(layer)].num_experts;
  metrics_.on_expert_load(layer, most * experts / static_cast<double>(choices));
}

// One thread's part: the forward pass, then LM head and sampling for groups of rows.
void Engine::Impl::compute(int rank, int thread) {
  const DrainOnError drain(*device_, rank);
  if (step_hook) step_hook(rank, thread);
  const Lane lane{thread, threads_, workspaces_[rank]->scratch(thread), device_->queue(rank)};
  RankExecutor& executor = *executors_[rank];
  if (!device_->host_memory()) tables_[rank].send(plan_, *shape_now_);  // by the rank's one thread
  if (captured_now_ != nullptr) replay(rank);
  else executor.forward(*shape_now_, tables_[rank].view(), lane);
  if (thread == 0) read_counts(rank);
  const int64_t total = static_cast<int64_t>(plan_.logit_rows.size());
  const int lane_of_world = rank * threads_ + thread, lanes = config_.ranks * threads_;
  for (int64_t first = 0; first < total; first += shape_.max_logit_rows) {
    const Range group{first, std::min(total, first + shape_.max_logit_rows)};
    if (device_->host_memory()) executor.logits(tables_[rank].view(), group, readings_.logits + executor.columns().begin, model_.vocab_size, lane);
    else finish_logits(rank, group, lane);
    world_.world_barrier();  // every rank's share of the vocabulary before a row is read
    for (int64_t i = lane_of_world; i < group.size(); i += lanes)
      sample_row(plan_.logit_rows[group.begin + i], readings_.logits + i * model_.vocab_size, readings_.chosen[i], lane_of_world);
    if (group.end < total) world_.world_barrier();  // rows are read before the next group overwrites them
  }
  wait_until_idle(world_, *device_, rank);
}

// Which rows' tokens the device chooses, and how.
void Engine::Impl::list_choices() {
  for (LogitRow& row : plan_.logit_rows) {
    const Sequence& s = *plan_.chunks[row.chunk].sequence;
    std::optional<TokenChoice> choice;
    if (row.sample) choice = device_choice(s.request->spec.sampling, s.sampler);
    row.on_device = choice.has_value();
    plan_.choices.push_back(choice.value_or(TokenChoice{}));
  }
}

// This rank's share of the vocabulary for a group of logit rows: tokens are chosen where the logits are, and only rows that the host
// has to look at are read.
void Engine::Impl::finish_logits(int rank, Range group, const Lane& lane) {
  RankExecutor& executor = *executors_[rank];
  const StepView& view = tables_[rank].view();
  float* const own = workspaces_[rank]->logits();
  executor.logits(view, group, own, shape_.logit_columns, lane);
  const float* const* shares = comms_[rank]->collect_logits(group.size());
  Range columns[kMaxRanks];
  for (int r = 0; r < config_.ranks; ++r) columns[r] = executors_[r]->columns();
  const Range mine = share_of(group.size(), rank, config_.ranks);
  int32_t* const chosen = workspaces_[rank]->chosen();
  if (!mine.empty()) {
    device_->ops().choose_tokens(
        {{0, mine.size()}, config_.ranks, shares, columns, shape_.logit_columns, view.choices + group.begin + mine.begin, chosen}, lane);
    const int64_t bytes = mine.size() * static_cast<int64_t>(sizeof(int32_t));
    device_->read(rank, readings_.chosen + mine.begin, bytes, chosen, bytes, bytes, 1);
  }
  const auto floats = [](int64_t n) { return n * static_cast<int64_t>(sizeof(float)); };
  for (int64_t i = 0, next; i < group.size(); i = next) {  // runs of rows
    const auto for_host = [&](int64_t r) {
      const LogitRow& row = plan_.logit_rows[static_cast<size_t>(group.begin + r)];
      return !row.on_device || plan_.chunks[row.chunk].sequence->request->spec.keep_logits;
    };
    next = i + 1;
    if (!for_host(i)) continue;
    while (next < group.size() && for_host(next)) ++next;
    device_->read(rank, readings_.logits + i * model_.vocab_size + columns[rank].begin, floats(model_.vocab_size), own + i * shape_.logit_columns,
                  floats(shape_.logit_columns), floats(columns[rank].size()), next - i);
  }
  comms_[rank]->release_logits();
  wait_until_idle(world_, *device_, rank);
}

// What a rank has counted and chosen in a step, for the metrics.
void Engine::Impl::read_counts(int rank) {
  const RankBuffers& b = workspaces_[rank]->buffers;
  const auto read = [&](int32_t* to, const int32_t* from, int64_t n) {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(int32_t));
    device_->read(rank, to, bytes, from, bytes, bytes, 1);
  };
  read(readings_.experts_reached + rank, b.experts_reached, 1);
  if (rank == 0 && last_moe_layer() >= 0) read(readings_.choices, b.expert_ids, shape_now_->num_rows * shape_.choices);
}

void Engine::Impl::sample_row(const LogitRow& row, const float* logits, int32_t chosen, int lane) {
  Sequence& s = *plan_.chunks[row.chunk].sequence;
  if (s.request->spec.keep_logits && s.logits.wants(row.position))
    std::memcpy(s.logits.at(row.position, model_.vocab_size), logits, static_cast<size_t>(model_.vocab_size) * sizeof(float));
  if (row.on_device) {
    SampleResult& result = sampled_[row.chunk] = {};
    result.failed = chosen < 0;
    result.token = chosen;
    if (!result.failed) s.sampler.add_generated(chosen);
  } else if (row.sample)
    sampled_[row.chunk] = sample(logits, model_.vocab_size, s.request->spec.sampling, s.sampler, host_ops_, sampler_scratch_[lane],
                                 model_.eos_token_ids);
}

void Engine::Impl::accept_tokens() {
  for (size_t i = 0; i < plan_.chunks.size(); ++i) {
    Sequence& s = *plan_.chunks[i].sequence;
    if (s.request->spec.keep_logits) s.logits.kept = std::max(s.logits.kept, s.computed);
    if (s.request->spec.keep_routes) keep_routes(plan_.chunks[i]);
    if (plan_.chunks[i].samples) accept(s, sampled_[i]);
  }
}

void Engine::Impl::keep_routes(const ScheduledChunk& chunk) {
  Sequence& s = *chunk.sequence;
  const auto* const routes = reinterpret_cast<const int32_t*>(routes_.data());
  const int64_t first = s.computed - chunk.num_rows, top_k = model_.top_k;
  for (int64_t p = std::max(first, s.routes.kept); p < s.computed; ++p) {
    int16_t* out = s.routes.at(p, route_width());
    for (int l = 0; l < model_.shape.num_layers(); ++l, out += top_k) {
      const bool dense = model_.shape.mlps[static_cast<size_t>(l)].num_experts == 0;
      const int32_t* const chosen = routes + (l * shape_.max_rows + chunk.row_begin + p - first) * top_k;
      for (int64_t k = 0; k < top_k; ++k) out[k] = dense ? int16_t{-1} : static_cast<int16_t>(chosen[k]);
    }
  }
  s.routes.kept = std::max(s.routes.kept, s.computed);
}

void Engine::Impl::accept(Sequence& s, const SampleResult& result) {
  Request& request = *s.request;
  if (result.failed) {
    if (!result.no_choice) metrics_.on_corrupted();
    finish(s, FinishReason::kError,
           result.no_choice ? "allowed_token_ids are all end or stop tokens, which min_tokens keeps away"
                            : "the logits are not numbers (NaN): a sum overflowed or the weights hold NaN");
    forget_if_done(request);
    return;
  }
  const auto now = Clock::now();
  if (s.first_token == Clock::time_point{}) {
    s.first_token = now;
    metrics_.on_first_token(seconds_between(request.submitted, now));
  } else {
    metrics_.on_inter_token(seconds_between(s.last_token, now));
  }
  s.last_token = now;
  s.tokens.push_back(result.token);
  ++stats_.generation_tokens;
  const SamplingParams& p = request.spec.sampling;
  const auto holds = [&](const std::vector<int32_t>& ids) { return std::find(ids.begin(), ids.end(), result.token) != ids.end(); };
  FinishReason reason = FinishReason::kNone;
  if (s.generated() >= p.min_tokens && ((!p.ignore_eos && holds(model_.eos_token_ids)) || holds(p.stop_token_ids)))
    reason = FinishReason::kStop;
  else if (s.generated() >= p.max_tokens)
    reason = FinishReason::kLength;
  Event event = request_event(EventType::kToken, s);
  event.finish_reason = reason;
  event.token = result.token;
  event.logprob = result.logprob;
  event.num_top = result.num_top;
  std::copy_n(result.top.begin(), result.num_top, event.top.begin());
  emit(std::move(event));
  if (reason == FinishReason::kNone) return;
  finish(s, reason);
  forget_if_done(request);
}

// No host sees the event before the step has ended.
void Engine::Impl::finish(Sequence& s, FinishReason reason, std::string_view why) {
  emit(end_event(s, reason, why));
  scheduler_.remove(s);
  record_end(s, reason);
  const bool last = [&] {
    std::lock_guard lock(inbox_mutex_);
    return --s.request->unfinished == 0;
  }();
  if (last) {
    int64_t most = 0;
    for (const Sequence& sample : s.request->samples) most = std::max(most, sample.generated());
    metrics_.on_samples_finished(s.request->spec.sampling.n, most);
  }
}

Event Engine::Impl::end_event(const Sequence& s, FinishReason reason, std::string_view why) const {
  Event event = request_event(EventType::kFinished, s);
  event.finish_reason = reason;
  event.usage = {static_cast<int32_t>(s.prompt_tokens()), s.cached_tokens,    static_cast<int32_t>(s.generated()), s.preemptions,
                 ns_of(s.request->submitted),             ns_of(s.first_scheduled), ns_of(s.first_token)};
  event.reason = why;
  return event;
}

void Engine::Impl::record_end(const Sequence& s, FinishReason reason) {
  RequestTimes times;
  times.submitted = s.request->submitted;
  times.first_scheduled = s.first_scheduled;
  times.first_token = s.first_token;
  times.finished = Clock::now();
  metrics_.on_request_finished(times, s.prompt_tokens(), s.generated(), s.request->spec.sampling.max_tokens, reason);
}

// What is kept outlives the request until it is taken.
void Engine::Impl::forget_if_done(Request& request) {
  std::lock_guard lock(inbox_mutex_);
  if (request.unfinished == 0 && !keeps_positions(request.spec)) requests_.erase(request.number);
}

void Engine::Impl::fail_everything(std::string_view why) {
  std::lock_guard lock(inbox_mutex_);
  failed_ = true;
  failure_ = why;
  metrics_.on_failed();
  for (auto& [number, request] : requests_)
    for (Sequence& s : request->samples) {
      if (s.state == SequenceState::kFinished) continue;
      s.state = SequenceState::kFinished;
      --request->unfinished;
      record_end(s, FinishReason::kError);
      emit(end_event(s, FinishReason::kError, why));
    }
  inbox_.clear();
  // Switches have their outcome too: the one under way, those taken up and not begun, those not taken up.
  const auto refuse = [&](int32_t seam) {
    try {
      refuse_seam(seam, why);
    } catch (const std::bad_alloc&) {  // the next may still find room
    }
  };
  if (switcher_.moving()) refuse(switcher_.asked());
  for (; seams_begun_ < seams_.size(); ++seams_begun_) refuse(seams_[seams_begun_]);
  for (int32_t seam : wished_seams_) refuse(seam);
  wished_seams_.clear();
  waiting_hint_ = 0;
  stats_.running = stats_.waiting = 0;
  stats_.switching = false;
  metrics_.set_gauges(stats_);
  published_ = stats_;
  emptied_.notify_all();
  events_.show();
  log(LogLevel::kError, "engine", fmt::format("failed: {}", why));
}

}  // namespace moebius
