// What an engine says of itself and of what requests keep; and how it takes other weights.
#include <algorithm>

#include "lib/base/error.h"
#include "lib/runtime/engine_impl.h"

namespace moebius {

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
  ModelConfig of_files = model_;
  if (files.has("config.json")) {
    of_files = read_config(files);
    require_same_model(model_, of_files, files.name_of("config.json"));
  }
  const auto warn = [this](const std::string& text) { log(LogLevel::kWarning, "load", text); };
  const std::unique_ptr<WeightSource> source = partial ? open_tensors(files, of_files) : open_checkpoint(files, of_files, warn);
  kv_.drop_cached();  // nothing runs: that is all the KV there is
  try {
    if (store_.update(*source, switcher_.seam(), config_.progress)) captured_connection_ = 0;  // captured steps hold the scales
    prepare_ranks();
  } catch (...) {
    with_reason([this](std::string_view why) { fail_update(why); });
    throw;
  }
  {
    std::lock_guard lock(inbox_mutex_);
    mixed_ = false;
    failure_.clear();
  }
  inbox_filled_.notify_one();
  publish_stats();
  log(LogLevel::kInfo, "load", fmt::format("{}: weights updated in {:.1f} s", files.name(), seconds_since(begin)));
}

// Requests that came meanwhile end: no step with whole weights is in sight.
void Engine::Impl::fail_update(std::string_view why) {
  if (world_.dead()) return fail_everything(why);
  {
    std::lock_guard lock(inbox_mutex_);
    mixed_ = true;
    failure_ = why;
  }
  try {
    take_inbox();
    while (!scheduler_.waiting().empty()) {
      Sequence& s = *scheduler_.waiting().back();
      Request& request = *s.request;
      finish(s, FinishReason::kError, Reason::of("an update of the weights failed: {}", why));
      forget_if_done(request);
    }
  } catch (const std::bad_alloc&) {  // not even for their ends: an engine that knows half of its requests serves no more
    return fail_everything(why);
  }
  publish_stats();
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
  stats_.seam = seam();
  stats_.switching = switcher_.moving();
  stats_.prefix_queries = scheduler_.prefix_queries;
  stats_.prefix_hits = scheduler_.prefix_hits;
  stats_.kv_usage = kv_.usage();
  metrics_.set_gauges(stats_);
  metrics_.set_policy(policy_->figures());
  published_ = stats_;
  events_.show();  // before the lock is gone: who finds nothing running finds every event
  if (stats_.running + stats_.waiting == 0) emptied_.notify_all();
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
  refuse_if_failed();
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
  std::lock_guard step_lock(step_mutex_);  // requests change and end under it alone
  Sequence& s = [&]() -> Sequence& {
    std::lock_guard lock(inbox_mutex_);
    return sequence_that_keeps(number, sample, key, wanted);
  }();
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
  if (request.unfinished > 0 || !std::all_of(request.samples.begin(), request.samples.end(), collected)) return count;
  std::lock_guard lock(inbox_mutex_);
  requests_.erase(number);
  return count;
}

size_t Engine::Impl::take_logits(uint64_t number, int32_t sample, std::span<float> out) {
  return take(number, sample, &Sequence::logits, "keep_logits", &RequestSpec::keep_logits, model_.vocab_size, out);
}

size_t Engine::Impl::take_routes(uint64_t number, int32_t sample, std::span<int16_t> out) {
  return take(number, sample, &Sequence::routes, "routed_experts", &RequestSpec::keep_routes, route_width(), out);
}

}  // namespace moebius
