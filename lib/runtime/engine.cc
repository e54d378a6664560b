#include "lib/runtime/engine.h"

#include <algorithm>
#include <fstream>
#include <system_error>

#include "lib/base/error.h"
#include "lib/comm/collective.h"
#include "lib/comm/local.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/runtime/backend.h"
#include "lib/runtime/cost_file.h"
#include "lib/runtime/engine_impl.h"
#include "lib/runtime/probe.h"

namespace moebius {
namespace {

using namespace std::chrono_literals;

constexpr size_t kEventRing = 4096;
constexpr auto kIdleSample = 50ms;  // from one idle step of the own thread to the next while a policy watches

// What learned costs hold for: model, machine and ranks.
std::string costs_key(const ModelFiles& files, const ModelConfig& model, const EngineConfig& config, int threads, const Ops& ops) {
  std::string cpu = "unknown";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0) {
      cpu = line.substr(std::min(line.size(), line.find(':') + 2));
      break;
    }
  const MlpShape& last = model.shape.mlps.back();
  return fmt::format("{} ({}, {} layers, hidden {}, last with {} + {} experts of {}, {} a token), {} ranks of {} threads, {} {} {} {}, {} of {} cores",
                     files.label(), model.family, model.shape.num_layers(), model.shape.hidden, last.num_experts, last.num_shared, last.intermediate,
                     model.top_k, config.ranks, threads, config.device, ops.name, config.communicator, config.mode, cpu,
                     std::thread::hardware_concurrency());
}

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
  take(choices, shape.max_rows * shape.choices);
  take(experts_reached, ranks);
  return at;
}

// ---- construction

Engine::Impl::Impl(const ModelFiles& files, const EngineConfig& config)
    : model_(read_config(files)),
      config_(complete(config, model_)),
      threads_(threads_per_rank(config_, model_)),
      host_ops_(cpu_ops(config_.isa, config_.device == "cpu")),
      device_(open_device(config_, model_)),
      caller_(*device_),
      world_(config_.ranks, threads_, config_.wait_deadline_ms, config_.thread_hook),
      shape_(workspace_shape(model_, config_, threads_, *device_)),
      store_(files, model_, config_, world_, *device_, workspace_bytes(*device_, shape_, model_, config_)),
      kv_(store_.arena().tp_pages(), store_.arena().ep_pages(), config_.page_tokens, config_.prefix_cache,
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
  const ExchangeWidths widths{shape_.hidden, shape_.choices, shape_.logit_columns, config_.fast(), config_.two_shot_bytes};
  for (int r = 0; r < config_.ranks; ++r) {
    if (device_->collectives() == nullptr) comms_.push_back(std::make_unique<LocalCommunicator>(world_, *device_, r, exchange_, widths));
    else comms_.push_back(std::make_unique<CollectiveCommunicator>(world_, *device_, r, exchange_[static_cast<size_t>(r)], widths));
    RankContext context;
    context.ops = &device_->ops();
    context.comm = comms_.back().get();
    context.buffers = &workspaces_[r]->buffers;
    context.device = device_.get();
    context.hidden = shape_.hidden;
    context.rule = route_rule(model_, shape_);
    executors_.push_back(std::make_unique<RankExecutor>(store_.forward(r), store_.tables(r), context));
  }
  compare_ranks();
  prepare_ranks();
  for (int i = 0; i < config_.ranks * threads_; ++i) sampler_scratch_.emplace_back(model_.vocab_size);
  policy_ = make_policy(config_.policy, policy_limits(config_), &costs_);
  if (!config_.policy_file.empty()) {
    costs_key_ = costs_key(files, model_, config_, threads_, device_->ops());
    const double now = clock_seconds();
    const std::string warning = read_costs(config_.policy_file, costs_key_, now, costs_);
    keeps_costs_ = warning.empty();  // a file that is not this engine's is not written over
    if (!keeps_costs_) log(LogLevel::kWarning, "policy", warning);
  }
  expert_rows_.resize(static_cast<size_t>(shape_.num_experts));
  metrics_info_ = {files.label(), config_.page_tokens, kv_.tp_capacity(), 0, config_.prefix_cache, seconds_since(created_),
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
    events_.set_waits(true);
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
  const auto run = [this] {
    if (config_.thread_hook) config_.thread_hook(-1, -1, true);
    try {
      while (!own_thread_stops_) {
        const bool idle = !has_work();
        if (idle && !wait_for_call()) continue;
        std::lock_guard step_lock(step_mutex_);
        refuse_if_failed();
        if (!mixed_ && (!idle || policy_->watches())) run_step();
      }
    } catch (...) {
      // every request has its final event, and submit says why
    }
    if (config_.thread_hook) config_.thread_hook(-1, -1, false);
  };
  try {
    own_thread_ = std::thread(run);
  } catch (const std::system_error& e) {
    fail(Code::kOutOfMemory, "the engine's own thread cannot start: {}", e.what());
  }
  events_.set_waits(true);
}

void Engine::Impl::stop() {
  std::lock_guard own_lock(own_thread_mutex_);
  if (own_thread_.joinable()) {
    own_thread_stops_ = true;
    inbox_filled_.notify_all();
    own_thread_.join();
  }
  events_.set_waits(false);
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
  impl_->keep_costs();  // not later, when a stuck thread has come back: the host is done with this engine
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
