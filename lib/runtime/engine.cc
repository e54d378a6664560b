#include "lib/runtime/engine.h"

#include <algorithm>
#include <cstring>
#include <fstream>

#include "lib/base/error.h"
#include "lib/base/time.h"
#include "lib/comm/collective.h"
#include "lib/comm/local.h"
#include "lib/comm/waits.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/runtime/backend.h"
#include "lib/runtime/cost_file.h"
#include "lib/runtime/engine_impl.h"
#include "lib/runtime/probe.h"
#include "lib/tensor/packed.h"

namespace moebius {
namespace {

using namespace std::chrono_literals;

constexpr size_t kEventRing = 4096;
constexpr auto kIdleSample = 50ms;  // from one idle step of the own thread to the next while a policy watches
constexpr size_t kMaxWishes = 64;  // switches asked for between two steps; a host that asks for more has lost count

double seconds_between(Clock::time_point a, Clock::time_point b) { return std::chrono::duration<double>(b - a).count(); }

}  // namespace

// Before any thread is started: the checks of ranks against the model, and of what would be threads by the thousand.
int threads_per_rank(const EngineConfig& config, const ModelConfig& model) {
  constexpr int64_t kMaxThreads = 4096;  // of all ranks
  check_ranks(model.shape, slice_counts(model.shape, config.slices_per_expert), config.ranks);
  if (config.device != "cpu") {  // one thread queues a rank's work
    if (config.threads > 1) fail(Code::kInvalidArgument, "threads is {}, a rank on device '{}' has one", config.threads, config.device);
    return 1;
  }
  if (config.threads == 0) return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / config.ranks);
  if (int64_t{config.ranks} * config.threads > kMaxThreads)
    fail(Code::kInvalidArgument, "{} ranks of {} threads are {} threads, at most {} are started", config.ranks, config.threads,
         int64_t{config.ranks} * config.threads, kMaxThreads);
  return config.threads;
}

PolicyLimits policy_limits(const EngineConfig& c) { return {c.ranks, c.max_batch, c.max_queue}; }

namespace {

void check_config(const EngineConfig& c) {
  const auto in_range = [](const char* key, auto value, auto least, auto most) {
    if (!(value >= least && value <= most)) fail(Code::kInvalidArgument, "{} is {}, must be from {} to {}", key, value, least, most);
  };
  // Upper bounds keep every size that is made of these numbers far from overflow.
  in_range("ranks", c.ranks, 1, 1 << 20);
  in_range("threads", c.threads, 0, 1 << 20);
  in_range("chunk_tokens", c.chunk_tokens, 1, 1 << 20);
  in_range("max_batch", c.max_batch, 1, 1 << 20);
  in_range("max_queue", c.max_queue, 1, INT32_MAX);
  in_range("max_context", c.max_context, int64_t{0}, int64_t{1} << 31);
  in_range("memory_bytes", c.memory_bytes, int64_t{0}, INT64_MAX);
  in_range("two_shot_bytes", c.two_shot_bytes, int64_t{0}, INT64_MAX);
  in_range("engine_id", c.engine_id, 0, INT32_MAX);
  in_range("kv_tokens", c.kv_tokens, int64_t{0}, int64_t{1} << 40);
  in_range("slices_per_expert", c.slices_per_expert, 0, 1 << 20);
  if (!(c.stall_budget_ms >= 0)) fail(Code::kInvalidArgument, "stall_budget_ms is {}, must be at least 0", c.stall_budget_ms);
  if (!(c.wait_deadline_ms > 0)) fail(Code::kInvalidArgument, "wait_deadline_ms is {}, must be above 0", c.wait_deadline_ms);
  if (!(c.policy_calibrate_ms >= 0)) fail(Code::kInvalidArgument, "policy_calibrate_ms is {}, must be at least 0", c.policy_calibrate_ms);
  in_range("page_tokens", c.page_tokens, static_cast<int>(kTile), 1 << 16);
  if (c.page_tokens % kTile != 0) fail(Code::kInvalidArgument, "page_tokens is {}, must be a multiple of {}", c.page_tokens, kTile);
  if (!c.mode.empty() && c.mode != "exact" && c.mode != "fast") fail(Code::kInvalidArgument, "mode is '{}', must be exact or fast", c.mode);
  make_policy(c.policy, policy_limits(c));  // refuses a bad one
}

}  // namespace

EngineConfig complete(EngineConfig config, const ModelConfig& model) {
  check_config(config);
  if (config.mode.empty()) config.mode = config.device == "cpu" ? "exact" : "fast";
  if (config.max_context == 0) config.max_context = model.max_position_embeddings;
  if (config.max_context > model.max_position_embeddings)
    fail(Code::kInvalidArgument, "max_context is {}, the model was made for {}", config.max_context, model.max_position_embeddings);
  return config;
}

WorkspaceShape workspace_shape(const ModelConfig& model, const EngineConfig& config, int threads, Device& device) {
  const Ops& ops = device.ops();
  const SliceCounts counts = slice_counts(model.shape, config.slices_per_expert);
  WorkspaceShape s;
  s.max_rows = config.chunk_tokens + config.max_batch;
  s.max_logit_rows = std::min(config.max_batch, device.host_memory() ? 64 : 256);
  s.hidden = model.shape.hidden;
  s.num_heads = model.shape.num_heads;
  s.num_kv_heads = model.shape.num_kv_heads;
  s.head_dim = model.shape.head_dim;
  s.top_k = std::max(1, model.top_k);
  OpLimits limits{s.max_rows, s.hidden, s.head_dim, s.num_heads, 1, s.top_k};
  for (const MlpShape& mlp : model.shape.mlps) {
    const int64_t width = MlpCut{mlp.intermediate / counts.cuts, s.hidden}.padded() * counts.cuts;
    const int64_t pairs = s.max_rows * (mlp.num_experts > 0 ? s.top_k : 1);
    s.max_act_elements = std::max(s.max_act_elements, pairs * width);
    s.max_pairs = std::max(s.max_pairs, pairs);
    s.num_experts = std::max<int64_t>(s.num_experts, mlp.num_experts);
  }
  limits.num_experts = std::max<int64_t>(1, s.num_experts);
  limits.row_major = row_major_head(config);
  s.mlp_addends = s.top_k * counts.cuts;
  s.attention_addends = counts.head_groups;
  s.threads = threads;
  s.scratch_bytes = ops.scratch_bytes(limits);
  s.plain_sums = config.fast();
  if (!device.host_memory()) s.logit_columns = div_up(div_up(model.vocab_size, kTile), config.ranks) * kTile;
  if (device.collectives() != nullptr) s.collected_rows = div_up(s.max_logit_rows, config.ranks) * config.ranks;
  return s;
}

namespace {

StepLimits step_limits(const WorkspaceShape& shape, const EngineConfig& config) {
  return {shape.max_rows, shape.max_rows, std::min<int64_t>(shape.max_rows, config.max_batch), div_up(config.max_context, config.page_tokens), config.page_tokens};
}

// All ranks together have one buffer of logits: [logit rows, vocab].
int64_t logits_bytes(const WorkspaceShape& shape, const ModelConfig& model) {
  return shape.max_logit_rows * model.vocab_size * static_cast<int64_t>(sizeof(float));
}

}  // namespace

// A rank's: its buffers and step tables, and what lies in the host's memory where that is its own: its threads' sampling scratch, its
// share of the logits.
int64_t workspace_bytes(const Device& device, const WorkspaceShape& shape, const ModelConfig& model, const EngineConfig& config) {
  const int64_t own = Workspace::bytes(shape) + StepTables::bytes(device, step_limits(shape, config));
  if (!device.host_memory()) return own;
  return own + shape.threads * SamplerScratch::bytes(model.vocab_size) + div_up(logits_bytes(shape, model), config.ranks);
}

namespace {

int64_t ns_of(Clock::time_point t) { return std::chrono::duration_cast<std::chrono::nanoseconds>(t.time_since_epoch()).count(); }

// What learned costs hold for: model, machine and ranks.
std::string costs_key(const ModelFiles& files, const ModelConfig& model, const EngineConfig& config, int threads, const Ops& ops) {
  std::string cpu = "unknown";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0) {
      cpu = line.substr(std::min(line.size(), line.find(':') + 2));
      break;
    }
  return fmt::format("{} ({}, {} layers, hidden {}), {} ranks of {} threads, {} {} {} {}, {} of {} cores", files.label(), model.family,
                     model.shape.num_layers(), model.shape.hidden, config.ranks, threads, config.device, ops.name, config.communicator, config.mode, cpu,
                     std::thread::hardware_concurrency());
}

std::vector<int64_t> ep_pages_of(const ArenaPlan& arena) { return arena.ep_pages(); }

}  // namespace

Readings::Readings(Device& device, const WorkspaceShape& shape, int64_t vocab, int ranks)
    : memory_(device, place(shape, vocab, ranks, nullptr)) {
  place(shape, vocab, ranks, memory_.data());
}

int64_t Readings::place(const WorkspaceShape& shape, int64_t vocab, int ranks, std::byte* base) {
  int64_t at = 0;
  const auto take = [&]<class T>(T*& pointer, int64_t count) {
    pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  };
  take(logits, shape.max_logit_rows * vocab);
  take(chosen, shape.max_logit_rows);
  take(choices, shape.max_rows * shape.top_k);
  take(experts_reached, ranks);
  return at;
}

// ---- construction

Engine::Impl::Impl(const ModelFiles& files, const EngineConfig& config)
    : model_(read_config(files)),
      config_(complete(config, model_)),
      threads_(threads_per_rank(config_, model_)),
      host_ops_(cpu_ops(config_.isa)),
      device_(open_device(config_, model_)),
      caller_(*device_),
      world_(config_.ranks, threads_, config_.wait_deadline_ms, config_.thread_hook),
      shape_(workspace_shape(model_, config_, threads_, *device_)),
      store_(files, model_, config_, world_, *device_, workspace_bytes(*device_, shape_, model_, config_)),
      kv_(store_.arena().tp_pages(), ep_pages_of(store_.arena()), config_.page_tokens, config_.prefix_cache,
          config_.layout == Layout::kTp ? Phase::kTp : Phase::kEp),
      scheduler_(kv_, {config_.chunk_tokens, config_.max_batch, config_.max_queue, config_.prefix_cache}),
      switcher_({world_, *device_, store_.arena(), store_.to_tp(), store_.to_ep(), store_.arenas(), kv_, scheduler_,
                 [this](Event&& e) { emit(std::move(e)); },
                 [this](Sequence& s) { emit_request(EventType::kPreempted, s); }},
                config_.layout),
      plan_(shape_.max_rows, config_.max_batch, config_.ranks),
      readings_(*device_, shape_, model_.vocab_size, config_.ranks),
      sampled_(static_cast<size_t>(config_.max_batch)),
      events_(kEventRing),
      home_loads_(static_cast<size_t>(config_.ranks)),
      stall_budget_ms_(config_.stall_budget_ms),
      label_seam_(switcher_.seam()) {
  for (int r = 0; r < config_.ranks; ++r) {
    workspaces_.push_back(std::make_unique<Workspace>(*device_, r, shape_));
    tables_.emplace_back(*device_, r, step_limits(shape_, config_));
    exchange_.push_back(workspaces_.back()->exchange());
  }
  const ExchangeWidths widths{shape_.hidden, shape_.top_k, shape_.logit_columns, config_.fast(), config_.two_shot_bytes};
  for (int r = 0; r < config_.ranks; ++r) {
    if (device_->collectives() == nullptr) comms_.push_back(std::make_unique<LocalCommunicator>(world_, *device_, r, exchange_, widths));
    else comms_.push_back(std::make_unique<CollectiveCommunicator>(world_, *device_, r, exchange_[static_cast<size_t>(r)], widths));
    RankContext context;
    context.ops = &device_->ops();
    context.comm = comms_.back().get();
    context.buffers = &workspaces_[r]->buffers;
    context.device = device_.get();
    context.dims = {shape_.hidden, static_cast<int32_t>(shape_.num_experts), model_.top_k, model_.norm_topk_prob};
    executors_.push_back(std::make_unique<RankExecutor>(store_.forward(r), store_.tables(r), context));
  }
  compare_ranks();
  prepare_ranks();
  for (int i = 0; i < config_.ranks * threads_; ++i) sampler_scratch_.emplace_back(model_.vocab_size);
  policy_ = make_policy(config_.policy, policy_limits(config_), &costs_);
  if (!config_.policy_file.empty()) {
    costs_key_ = costs_key(files, model_, config_, threads_, device_->ops());
    const double now = seconds_between(Clock::time_point{}, Clock::now());
    const std::string warning = read_costs(config_.policy_file, costs_key_, now, costs_);
    keeps_costs_ = warning.empty();  // a file that is not this engine's is not written over
    if (!keeps_costs_) log(LogLevel::kWarning, "policy", warning);
  }
  expert_rows_.resize(static_cast<size_t>(shape_.num_experts));
  metrics_info_ = {files.label(), config_.page_tokens, kv_.tp_capacity(), 0, config_.prefix_cache, seconds_between(created_, Clock::now()),
                   config_.engine_id};
  for (int h = 0; h < kv_.num_homes(); ++h) metrics_info_.ep_pages += kv_.ep_capacity(h);
  wished_seams_.reserve(kMaxWishes);
  seams_.reserve(kMaxWishes);
  stats_.num_layers = model_.shape.num_layers();
  publish_stats();
  log(LogLevel::kInfo, "load",
      fmt::format("{}: {} on {} ranks of {} ({} threads each) in {:.1f} s, layout {}, KV for {} tokens in tp", files.name(), model_.family,
                  config_.ranks, device_->name(), threads_, metrics_info_.load_seconds, name_of(config_.layout),
                  kv_.tp_capacity() * config_.page_tokens));
  caller_.restore();
}

Engine::Impl::~Impl() {
  stop();
  keep_costs();
  caller_.take();
}

void Engine::Impl::keep_costs() noexcept {
  if (!keeps_costs_ || !(costs_.curve(Layout::kTp).seen() || costs_.curve(Layout::kEp).seen())) return;
  try {
    write_costs(config_.policy_file, costs_key_, costs_);
  } catch (const std::exception& e) {
    try {
      log(LogLevel::kWarning, "policy", e.what());
    } catch (...) {  // no memory for the message either
    }
  }
}

void Engine::Impl::compare_ranks() {
  std::vector<uint64_t> digests(static_cast<size_t>(config_.ranks));
  world_.run_long([this, &digests](int rank, int thread) {
    if (thread == 0) digests[static_cast<size_t>(rank)] = probe_digest(*device_, rank);
  });
  compare_probes(digests);
}

// ---- what other threads hand in

void Engine::Impl::check_request(const RequestSpec& spec) const {
  if (spec.prompt_ids.empty()) fail(Code::kInvalidArgument, "the prompt is empty");
  for (size_t i = 0; i < spec.prompt_ids.size(); ++i)
    if (spec.prompt_ids[i] < 0 || spec.prompt_ids[i] >= model_.vocab_size)
      fail(Code::kInvalidArgument, "prompt token {} is {}, the vocabulary has {}", i, spec.prompt_ids[i], model_.vocab_size);
  moebius::check(spec.sampling, model_.vocab_size);
  refuse_if_never(spec.sampling.n);
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
    size_t kept = 0;
    try {
      for (; kept < made.size(); ++kept) requests_[first + kept] = std::move(made[kept]);
    } catch (...) {
      for (size_t i = 0; i <= kept; ++i) requests_.erase(first + i);
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
  return emptied_.wait_for(lock, clamped_ms(timeout_ms), [&] { return published_.running == 0 && waiting_hint_ == 0; });
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
    if (it == requests_.end() || it->second->unfinished == 0) return false;
    if (const int32_t n = it->second->spec.sampling.n; sample < -1 || sample >= n)
      fail(Code::kInvalidArgument, "sample {} of request {}: it has {}", sample, request, n);
    cancels_.push_back({request, sample});
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
  wished_budget_ = ms;
}

void Engine::Impl::set_policy(const PolicyConfig& policy) {
  std::unique_ptr<Policy> made = make_policy(policy, policy_limits(config_), &costs_);  // refuses a bad one here
  {
    std::lock_guard lock(inbox_mutex_);
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
  const bool inside = event.seam > 0 && event.seam < model_.shape.num_layers();
  if (event.type == EventType::kSwitchFinished && event.from != event.to && !inside) costs_.on_switch(event.to, event.bytes, event.seconds);
}

void Engine::Impl::emit(Event&& event) {
  event.step = step_;
  event.time_ns = ns_of(Clock::now());
  learn_price(event);
  if (calibrating_) return;
  if (config_.log) log_event(event);
  switch (event.type) {
    case EventType::kSwitchFinished:
      count_moved(event);
      if (event.seam > 0 && event.seam < model_.shape.num_layers()) break;  // held inside: no layout has been reached
      if (event.from == event.to && event.bytes == 0) break;  // asked for the layout that serves already
      metrics_.on_switch(event.from, event.to, event.seconds);
      ++stats_.switches;
      policy_->on_switched(seconds_between(Clock::time_point{}, Clock::now()));
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
  events_.push(std::move(event));
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

// ---- a step

void Engine::Impl::take_inbox() {
  arriving_.clear();
  cancelling_.clear();
  {
    std::lock_guard lock(inbox_mutex_);
    arriving_.swap(inbox_);
    cancelling_.swap(cancels_);
  }
  for (Request* request : arriving_) {
    request->arrived = true;
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
      if (const auto it = requests_.find(cancel.request); it != requests_.end()) request = it->second.get();
    }
    if (request != nullptr && request->unfinished > 0) take_cancel(*request, cancel.sample);
  }
}

void Engine::Impl::take_cancel(Request& request, int32_t sample) {
  bool told = false;
  for (Sequence& s : request.samples) {
    if (s.state == SequenceState::kFinished || (sample >= 0 && s.sample != sample)) continue;
    if (!std::exchange(told, true)) emit_request(EventType::kCancelled, sample >= 0 ? s : request.samples[0]);
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
  event.seam = config_.ranks > 1 ? switcher_.seam() : label_seam_;
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
  load.time_s = seconds_between(Clock::time_point{}, Clock::now());
  const int32_t seam = config_.ranks > 1 ? switcher_.seam() : label_seam_;
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
  if (config_.ranks > 1) switcher_.begin(decision->to == Layout::kTp ? switcher_.num_layers() : 0, config_.preempt_to_fit);
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
  const double now = seconds_between(Clock::time_point{}, Clock::now());
  const int32_t seam = plan_.shape.seam;
  if (switcher_.moving()) return costs_.on_step_under_way(layout_towards(seam, switcher_.target(), model_.shape.num_layers()), load, seconds, now);
  if (seam > 0 && seam < model_.shape.num_layers()) return;
  costs_.on_step(seam == 0 ? Layout::kEp : Layout::kTp, load, seconds, now);
  last_load_ = load;
  last_seconds_ = seconds;
}

void Engine::Impl::expire(Clock::time_point now) {
  const auto due = [&](const Sequence* s) { return s->request->deadline != Clock::time_point{} && now >= s->request->deadline; };
  for (const std::vector<Sequence*>* list : {&scheduler_.running(), &scheduler_.waiting()})
    for (size_t i = list->size(); i-- > 0;)
      if (Sequence& s = *(*list)[i]; due(&s)) {
        Request& request = *s.request;
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
    switcher_.advance(stall_budget_ms_);
    result.switch_seconds = seconds_between(before_switch, Clock::now());
    scheduler_.plan(plan_, [&](Sequence& s) { emit_request(EventType::kPreempted, s); });
    if (plan_.num_rows() > 0) run_plan(result);
    result.worked = plan_.num_rows() > 0 || switcher_.moving() || !scheduler_.waiting().empty();
  } catch (const std::exception& e) {
    fail_everything(e.what());
    throw;
  } catch (...) {
    fail_everything("an exception of unknown type");
    throw;
  }
  result.decode_rows = plan_.decode_rows;
  result.prefill_rows = plan_.prefill_rows;
  result.seconds = seconds_between(begin, Clock::now());
  ++step_;
  publish_stats();
  events_.show();
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
  result.compute_seconds = seconds_between(begin, Clock::now());
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
  const int64_t row = shape_.hidden * static_cast<int64_t>(sizeof(bf16)) + shape_.top_k * static_cast<int64_t>(sizeof(int32_t) + sizeof(float));
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
    const int64_t first = (plan_.shape.homes[h].begin + shape_now_->row_shift(plan_.shape, h)) * model_.top_k;
    const int64_t num = plan_.shape.homes[h].size() * model_.top_k;
    for (int64_t i = first; i < first + num; ++i)
      if (const auto e = static_cast<size_t>(readings_.choices[i]); e < expert_rows_.size()) ++expert_rows_[e];  // a NaN row may have none
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

// ---- captured steps

// Ranks can exchange; a connection that replaces one whose rank failed needs the steps captured again.
void Engine::Impl::prepare_ranks() {
  join_ranks(world_, *device_);
  const Collectives* collectives = device_->collectives();
  const int connection = collectives != nullptr ? collectives->connection() : 1;
  if (connection == captured_connection_) return;
  capture_steps();
  captured_connection_ = connection;
}

// Captured are decode steps in pure layouts for 1, 2, 4, … rows (in EP rows of each home, in TP of all). Nothing is computed: weights may be in either
// layout, and what the rank's tables hold does not matter.
void Engine::Impl::capture_steps() {
  for (auto& steps : captured_) steps.clear();
  if (!config_.capture_steps || !device_->can_capture()) return;
  for (int r = 0; r < config_.ranks; ++r) device_->forget_captures(r);
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    const int homes = layout == Layout::kTp ? 1 : config_.ranks;
    for (int64_t rows = 1;; rows *= 2) {
      CapturedStep step;
      step.rows_of_home = std::min<int64_t>(rows, config_.max_batch);
      step.shape.num_rows = step.shape.num_chunks = homes * step.rows_of_home;
      if (step.shape.num_rows > shape_.max_rows) break;
      step.shape.max_tokens = config_.max_context;
      step.shape.seam = layout == Layout::kTp ? model_.shape.num_layers() : 0;
      for (int64_t h = 0; h < config_.ranks && layout == Layout::kEp; ++h)
        step.shape.homes.push_back({h * step.rows_of_home, (h + 1) * step.rows_of_home});
      step.shape.chunks_of_home = step.shape.homes;
      const StepShape& shape = step.shape;
      int* const number = &step.number;
      try {
        world_.run_long([this, &shape, number](int rank, int) { capture(shape, rank, number); });
      } catch (...) {  // also what a rank has begun and not ended
        for (int r = 0; r < config_.ranks; ++r) device_->forget_captures(r);
        throw;
      }
      captured_[static_cast<int>(layout)].push_back(std::move(step));
      if (rows >= config_.max_batch) break;
    }
  }
}

void Engine::Impl::capture(const StepShape& shape, int rank, int* number) {
  const bool alone = !device_->captures_together();
  if (rank == 0 || alone) device_->begin_capture(rank);
  world_.world_barrier();
  if (rank != 0 && !alone) device_->join_capture(rank);
  RankContext& context = executors_[rank]->context();
  context.tokens = tables_[rank].view().tokens;
  executors_[rank]->forward(shape, tables_[rank].view(), {0, 1, workspaces_[rank]->scratch(0), device_->queue(rank)});
  context.tokens = nullptr;
  if (!alone) device_->mark(rank);
  world_.world_barrier();
  if (rank != 0 && !alone) return;
  if (!alone) device_->pass(0);
  const int captured = device_->end_capture(rank);
  if (rank == 0) *number = captured;
}

// The smallest captured shape that holds the step, or the step's own.
const StepShape& Engine::Impl::choose_shape() {
  captured_now_ = nullptr;
  const StepShape& own = plan_.shape;
  const int layers = model_.shape.num_layers();
  if (own.num_chunks != own.num_rows || (own.seam > 0 && own.seam < layers)) return own;  // a prompt's rows, or a seam inside
  if (executors_[0]->context().routes != nullptr) return own;
  const bool is_tp = own.seam == layers;
  int64_t most = is_tp ? own.num_rows : 0;
  for (const Range& home : own.homes) most = std::max(most, home.size());
  for (const CapturedStep& step : captured_[is_tp ? 0 : 1])
    if (step.rows_of_home >= most) {
      captured_now_ = &step;
      return step.shape;
    }
  return own;
}

// Queues the captured work: of all ranks by rank 0, after what each has queued and before what it queues next, or each rank's by itself.
void Engine::Impl::replay(int rank) {
  if (!device_->captures_together()) {
    device_->replay(rank, captured_now_->number);
    return;
  }
  const auto meet = [&] {
    device_->mark(rank);
    world_.world_barrier();
  };
  meet();
  if (rank == 0) {
    device_->pass(0);
    device_->replay(0, captured_now_->number);
  }
  meet();
  device_->pass(rank);
}

// What a rank has counted and chosen in a step, for the metrics.
void Engine::Impl::read_counts(int rank) {
  const RankBuffers& b = workspaces_[rank]->buffers;
  const auto read = [&](int32_t* to, const int32_t* from, int64_t n) {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(int32_t));
    device_->read(rank, to, bytes, from, bytes, bytes, 1);
  };
  read(readings_.experts_reached + rank, b.experts_reached, 1);
  if (rank == 0 && last_moe_layer() >= 0) read(readings_.choices, b.expert_ids, shape_now_->num_rows * model_.top_k);
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
  const int64_t first = s.computed - chunk.num_rows, top_k = shape_.top_k;
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
  Event event = request_event(EventType::kToken, s);
  event.token = result.token;
  event.logprob = result.logprob;
  event.num_top = result.num_top;
  std::copy_n(result.top.begin(), result.num_top, event.top.begin());
  emit(std::move(event));

  const SamplingParams& p = request.spec.sampling;
  const auto holds = [&](const std::vector<int32_t>& ids) { return std::find(ids.begin(), ids.end(), result.token) != ids.end(); };
  FinishReason reason = FinishReason::kNone;
  if (s.generated() >= p.min_tokens && ((!p.ignore_eos && holds(model_.eos_token_ids)) || holds(p.stop_token_ids)))
    reason = FinishReason::kStop;
  else if (s.generated() >= p.max_tokens)
    reason = FinishReason::kLength;
  if (reason == FinishReason::kNone) return;
  finish(s, reason);
  forget_if_done(request);
}

// The event comes last: a host that has seen it can no longer cancel the request.
void Engine::Impl::finish(Sequence& s, FinishReason reason, std::string_view why) {
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
  emit(end_event(s, reason, why));
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
  if (switcher_.moving()) refuse_seam(switcher_.target(), why);
  for (; seams_begun_ < seams_.size(); ++seams_begun_) refuse_seam(seams_[seams_begun_], why);
  for (int32_t seam : wished_seams_) refuse_seam(seam, why);
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

// ---- other weights

// As of the last step.
void Engine::Impl::refuse_if_busy() const {
  std::lock_guard lock(inbox_mutex_);
  if (published_.switching)
    fail(Code::kInvalidState, "a switch is under way (at seam {}): weights are updated when it has ended", published_.seam);
  if (published_.running > 0 || waiting_hint_ > 0)
    fail(Code::kInvalidState, "{} requests run and {} wait: weights are updated when all have ended, so drain first", published_.running, waiting_hint_);
}

void Engine::Impl::update_weights(const ModelFiles& files, bool partial) {
  refuse_if_busy();  // rather than wait for a thread that steps without pause
  std::lock_guard step_lock(step_mutex_);
  const FloatingPointMode mode;
  const CallersDevice caller(*device_);
  refuse_if_failed();
  if (partial) refuse_if_mixed();
  refuse_if_busy();
  const auto begin = Clock::now();
  if (files.has("config.json")) require_same_model(model_, read_config(files), files.name_of("config.json"));
  const auto warn = [this](const std::string& text) { log(LogLevel::kWarning, "load", text); };
  const std::unique_ptr<WeightSource> source = partial ? open_tensors(files, model_) : open_checkpoint(files, model_, warn);
  kv_.drop_cached();  // nothing runs: that is all the KV there is
  try {
    if (store_.update(*source, switcher_.seam(), config_.progress)) captured_connection_ = 0;  // captured steps hold the scales
    prepare_ranks();
  } catch (const std::exception& e) {
    fail_update(e.what());
    throw;
  } catch (...) {
    fail_update("an exception of unknown type");
    throw;
  }
  {
    std::lock_guard lock(inbox_mutex_);
    mixed_ = false;
    failure_.clear();
  }
  inbox_filled_.notify_one();
  publish_stats();
  log(LogLevel::kInfo, "load", fmt::format("{}: weights updated in {:.1f} s", files.name(), seconds_between(begin, Clock::now())));
}

// Requests that came meanwhile end: no step with whole weights is in sight.
void Engine::Impl::fail_update(std::string_view why) {
  if (world_.dead()) return fail_everything(why);
  {
    std::lock_guard lock(inbox_mutex_);
    mixed_ = true;
    failure_ = why;
  }
  take_inbox();
  while (!scheduler_.waiting().empty()) {
    Sequence& s = *scheduler_.waiting().back();
    Request& request = *s.request;
    finish(s, FinishReason::kError, Reason::of("an update of the weights failed: {}", why));
    forget_if_done(request);
  }
  publish_stats();
  events_.show();
  log(LogLevel::kError, "load", fmt::format("an update of the weights failed: {}", why));
}

// ---- reports

void Engine::Impl::publish_stats() {
  std::lock_guard lock(inbox_mutex_);
  stats_.step = step_;
  stats_.running = static_cast<int32_t>(scheduler_.running().size());
  waiting_hint_ = static_cast<int64_t>(scheduler_.waiting().size());
  for (const Request* r : inbox_) waiting_hint_ += static_cast<int64_t>(r->samples.size());
  stats_.waiting = static_cast<int32_t>(waiting_hint_);
  stats_.seam = config_.ranks > 1 ? switcher_.seam() : label_seam_;
  stats_.switching = switcher_.moving();
  stats_.prefix_queries = scheduler_.prefix_queries;
  stats_.prefix_hits = scheduler_.prefix_hits;
  stats_.kv_usage = kv_.usage();
  metrics_.set_gauges(stats_);
  metrics_.set_policy(policy_->figures());
  published_ = stats_;
  if (draining_ && stats_.running + stats_.waiting == 0) emptied_.notify_all();
}

EngineStats Engine::Impl::stats() const {
  std::lock_guard lock(inbox_mutex_);
  EngineStats s = published_;
  s.waiting = static_cast<int32_t>(waiting_hint_);
  return s;
}

std::string Engine::Impl::metrics_text() const { return metrics_.text(metrics_info_); }

ModelInfo Engine::Impl::model() const {
  ModelInfo info;
  info.family = model_.family;
  info.num_layers = model_.shape.num_layers();
  info.vocab_size = model_.vocab_size;
  info.hidden = model_.shape.hidden;
  info.num_experts = static_cast<int32_t>(shape_.num_experts);
  info.top_k = model_.top_k;
  info.max_context = config_.max_context;
  const SliceCounts counts = slice_counts(model_.shape, config_.slices_per_expert);
  info.slices_per_expert = counts.cuts;
  info.head_groups = counts.head_groups;
  info.eos_token_ids = model_.eos_token_ids;
  return info;
}

MemoryReport Engine::Impl::memory() const {
  const ArenaPlan& arena = store_.arena();
  MemoryReport m;
  for (int r = 0; r < config_.ranks; ++r) {
    m.arena_bytes = std::max(m.arena_bytes, arena.arena_bytes(r));
    m.kept_bytes = std::max(m.kept_bytes, arena.kept_bytes(r));
    m.lead_bytes = std::max(m.lead_bytes, arena.lead(r));
    for (int l = 0; l < model_.shape.num_layers(); ++l)
      for (Layout layout : {Layout::kTp, Layout::kEp})
        m.layer_bytes = std::max(m.layer_bytes, arena.item_range(r, layout, l).size());
    m.ep_tokens.push_back(kv_.ep_capacity(r) * config_.page_tokens);
  }
  m.workspace_bytes = workspace_bytes(*device_, shape_, model_, config_) + store_.table_bytes();
  m.shared_bytes = store_.shared_bytes();
  m.tp_tokens = kv_.tp_capacity() * config_.page_tokens;
  return m;
}

SwitchEstimate Engine::Impl::estimate_switch(Layout to) {
  std::lock_guard step_lock(step_mutex_);
  SwitchEstimate e;
  const int target = to == Layout::kTp ? switcher_.num_layers() : 0;
  e.fits = true;
  if (config_.ranks == 1 || switcher_.seam() == target) return e;
  Reason reason;
  e.fits = switcher_.fits(target, &reason);
  e.reason = reason.str();
  std::tie(e.bytes, e.bytes_changed) = switcher_.bytes_to(to);
  e.seconds = static_cast<double>(e.bytes) / switcher_.copy_rate();
  return e;
}

Sequence& Engine::Impl::sequence_that_keeps(uint64_t number, int32_t sample, const char* key, bool RequestSpec::*wanted) {
  const auto it = requests_.find(number);
  if (it == requests_.end()) fail(Code::kNotFound, "request {} is not known, or what it kept has been taken", number);
  Request& request = *it->second;
  if (!(request.spec.*wanted)) fail(Code::kInvalidState, "request {} was submitted without {}", number, key);
  if (sample < 0 || sample >= static_cast<int32_t>(request.samples.size()))
    fail(Code::kInvalidArgument, "sample {} of request {}: it has {}", sample, number, request.samples.size());
  return request.samples[static_cast<size_t>(sample)];
}

// One locked call: a step between asking and taking would add rows that the caller made no room for.
template <class T>
size_t Engine::Impl::take(uint64_t number, int32_t sample, Record<T> Sequence::*record, const char* key, bool RequestSpec::*wanted,
                          int64_t width, std::span<T> out) {
  std::lock_guard step_lock(step_mutex_);
  std::lock_guard lock(inbox_mutex_);
  Sequence& s = sequence_that_keeps(number, sample, key, wanted);
  Record<T>& r = s.*record;
  const size_t count = static_cast<size_t>((r.kept - r.taken) * width);
  if (out.data() == nullptr || out.size() < count) return count;
  std::copy_n(r.values.begin(), count, out.begin());
  if (world_.dead()) return count;  // a stuck thread may still write the rows after them: they stay, and can be taken again
  r.values = {};
  r.taken = r.kept;
  r.collected = s.state == SequenceState::kFinished;
  const Request& request = *s.request;
  const auto collected = [&](const Sequence& x) {
    return (!request.spec.keep_logits || x.logits.collected) && (!request.spec.keep_routes || x.routes.collected);
  };
  if (request.unfinished == 0 && std::all_of(request.samples.begin(), request.samples.end(), collected)) requests_.erase(number);
  return count;
}

size_t Engine::Impl::take_logits(uint64_t number, int32_t sample, std::span<float> out) {
  return take(number, sample, &Sequence::logits, "keep_logits", &RequestSpec::keep_logits, model_.vocab_size, out);
}

size_t Engine::Impl::take_routes(uint64_t number, int32_t sample, std::span<int16_t> out) {
  return take(number, sample, &Sequence::routes, "routed_experts", &RequestSpec::keep_routes, route_width(), out);
}

// ---- the engine's own thread

// Under inbox_mutex_.
bool Engine::Impl::was_called() const {
  if (mixed_) return false;
  return !inbox_.empty() || !cancels_.empty() || !wished_seams_.empty() || wished_policy_ != nullptr;
}

bool Engine::Impl::has_work() {
  std::lock_guard lock(inbox_mutex_);
  return was_called() || published_.running > 0 || published_.waiting > 0 || published_.switching;
}

// True: for a whole while nobody has called.
bool Engine::Impl::wait_for_call() {
  std::unique_lock lock(inbox_mutex_);
  return !inbox_filled_.wait_for(lock, kIdleSample, [&] { return was_called() || own_thread_stops_; });
}

StepResult Engine::Impl::step_by_host() {
  {
    std::lock_guard lock(own_thread_mutex_);
    if (own_thread_.joinable()) fail(Code::kInvalidState, "the engine's own thread steps; stop it first");
  }
  return step();
}

void Engine::Impl::start() {
  std::lock_guard own_lock(own_thread_mutex_);
  {
    std::lock_guard lock(inbox_mutex_);
    refuse_if_failed();
  }
  if (own_thread_.joinable()) fail(Code::kInvalidState, "the engine's own thread runs already");
  own_thread_stops_ = false;
  own_thread_ = std::thread([this] {
    if (config_.thread_hook) config_.thread_hook(-1, -1, true);
    try {
      while (!own_thread_stops_)
        if (has_work() || (wait_for_call() && policy_->watches())) {
          std::lock_guard step_lock(step_mutex_);
          refuse_if_failed();
          if (!mixed_) run_step();
        }
    } catch (...) {
      // every request has its final event, and submit says why
    }
    if (config_.thread_hook) config_.thread_hook(-1, -1, false);
  });
}

void Engine::Impl::stop() {
  std::lock_guard own_lock(own_thread_mutex_);
  if (!own_thread_.joinable()) return;
  own_thread_stops_ = true;
  inbox_filled_.notify_all();
  own_thread_.join();
}

// ---- the public face

Engine::Engine(const ModelFiles& files, const EngineConfig& config)
    : impl_([&] {
        const FloatingPointMode mode;  // tables and weights are made in it too
        return std::make_shared<Impl>(files, config);
      }()) {
  if (!(config.policy_calibrate_ms > 0)) return;
  try {
    impl_->calibrate();
  } catch (...) {
    if (impl_->world().dead()) impl_->world().keep_alive(impl_);
    throw;
  }
}

Engine::~Engine() {
  impl_->stop();
  if (impl_->world().dead()) impl_->world().keep_alive(impl_);
}

uint64_t Engine::submit(const RequestSpec& spec) {
  const RequestSpec* const specs[] = {&spec};
  uint64_t number = 0;
  impl_->submit(specs, &number);
  return number;
}
void Engine::submit(std::span<const RequestSpec* const> specs, uint64_t* out_numbers) { impl_->submit(specs, out_numbers); }
bool Engine::drain(double timeout_ms) { return impl_->drain(timeout_ms); }
void Engine::resume() { impl_->resume(); }
void Engine::check(const RequestSpec& spec) const { impl_->check(spec); }
bool Engine::cancel(uint64_t request, int32_t sample) { return impl_->cancel(request, sample); }
StepResult Engine::step() { return impl_->step_by_host(); }
void Engine::start() { impl_->start(); }
void Engine::stop() { impl_->stop(); }
size_t Engine::poll(std::span<Event> out, double timeout_ms) { return impl_->poll(out, timeout_ms); }
int Engine::event_descriptor() { return impl_->event_descriptor(); }
void Engine::request_switch(Layout to) { impl_->aim(to == Layout::kTp ? impl_->model().num_layers : 0); }
void Engine::hold_seam(int32_t seam) { impl_->aim(seam); }
void Engine::set_stall_budget(double ms) { impl_->set_stall_budget(ms); }
void Engine::set_policy(const PolicyConfig& policy) { impl_->set_policy(policy); }
SwitchEstimate Engine::estimate_switch(Layout to) const { return impl_->estimate_switch(to); }
void Engine::update_weights(const ModelFiles& files) { impl_->update_weights(files, false); }
void Engine::update_tensors(const ModelFiles& files) { impl_->update_weights(files, true); }
EngineStats Engine::stats() const { return impl_->stats(); }
std::string Engine::metrics_text() const { return impl_->metrics_text(); }
ModelInfo Engine::model() const { return impl_->model(); }
MemoryReport Engine::memory() const { return impl_->memory(); }
size_t Engine::take_logits(uint64_t request, int32_t sample, std::span<float> out) { return impl_->take_logits(request, sample, out); }
size_t Engine::take_routes(uint64_t request, int32_t sample, std::span<int16_t> out) { return impl_->take_routes(request, sample, out); }
std::vector<float> Engine::take_logits(uint64_t request, int32_t sample) {
  std::vector<float> out;
  for (size_t count = impl_->take_logits(request, sample, {});;) {
    out.resize(count + 1);  // never empty, so that the call takes them
    count = impl_->take_logits(request, sample, out);
    if (count > out.size()) continue;  // a step came between
    out.resize(count);
    return out;
  }
}

}  // namespace moebius
