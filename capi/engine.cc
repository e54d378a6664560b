#include <array>
#include <span>
#include <vector>

#include "capi/config.h"
#include "capi/guarded.h"
#include "capi/layouts.h"
#include "capi/request.h"
#include "capi/source.h"
#include "lib/runtime/engine.h"

struct moebius_engine {
  moebius::Engine engine;
};

namespace {

using moebius::Code;
using moebius::fail;
using moebius::capi::check_stride;
using moebius::capi::check_struct;
using moebius::capi::copy_text;
using moebius::capi::fill_struct;
using moebius::capi::guarded;
using moebius::capi::layout_of;
using moebius::capi::not_null;

// Sizes of the structs as version 0.1 had them.
constexpr size_t kModelInfoV1 = 40, kStepResultV1 = 40, kEventV1 = 808, kEstimateV1 = 544, kStatsV1 = 120, kMemoryV1 = 72;
static_assert(sizeof(moebius_model_info) == kModelInfoV1 && sizeof(moebius_step_result) == kStepResultV1 &&
              sizeof(moebius_event) == kEventV1 && sizeof(moebius_switch_estimate) == kEstimateV1 && sizeof(moebius_stats) == kStatsV1 &&
              sizeof(moebius_memory) == kMemoryV1);

static_assert(sizeof(moebius_event::reason) == moebius::Reason::kCapacity + 1 && sizeof(moebius_switch_estimate::reason) == sizeof(moebius_event::reason));

moebius::EngineConfig config_of(const moebius_config* config) { return config != nullptr ? config->engine : moebius::EngineConfig{}; }

moebius_event event_of(const moebius::Event& e) {
  moebius_event out{};
  out.type = static_cast<int32_t>(e.type);
  out.step = e.step;
  out.request = e.request;
  out.user_data = e.user_data;
  out.time_ns = e.time_ns;
  out.sample = e.sample;
  out.token = e.token;
  out.logprob = e.logprob;
  out.num_top = e.num_top;
  for (int i = 0; i < e.num_top; ++i) {
    out.top_tokens[i] = e.top[static_cast<size_t>(i)].token;
    out.top_logprobs[i] = e.top[static_cast<size_t>(i)].logprob;
  }
  out.finish_reason = static_cast<int32_t>(e.finish_reason);
  out.from = static_cast<int32_t>(e.from);
  out.to = static_cast<int32_t>(e.to);
  out.seam = e.seam;
  out.bytes = e.bytes;
  out.bytes_changed = e.bytes_changed;
  out.seconds = e.seconds;
  out.prompt_tokens = e.usage.prompt_tokens;
  out.cached_tokens = e.usage.cached_tokens;
  out.generated_tokens = e.usage.generated_tokens;
  out.preemptions = e.usage.preemptions;
  out.queued_ns = e.usage.queued_ns;
  out.scheduled_ns = e.usage.scheduled_ns;
  out.first_token_ns = e.usage.first_token_ns;
  copy_text(out.reason, e.reason);
  return out;
}

template <class T>
void report_taken(size_t count, std::span<T> out, size_t* out_count) {
  if (out_count != nullptr) *out_count = count;
  if (out.data() != nullptr && out.size() < count) fail(Code::kInvalidArgument, "capacity is {} values, {} are kept", out.size(), count);
}

}  // namespace

extern "C" {

moebius_status moebius_engine_create(const char* model_dir, const moebius_config* config, moebius_engine** out_engine, moebius_error** err) {
  return guarded(err, [&] {
    not_null(model_dir, "model_dir");
    not_null(out_engine, "out_engine");
    *out_engine = new moebius_engine{moebius::Engine(model_dir, config_of(config))};
  });
}

moebius_status moebius_engine_create_from(const moebius_source* source, const moebius_config* config, moebius_engine** out_engine,
                                          moebius_error** err) {
  return guarded(err, [&] {
    const moebius_source& s = not_null(source, "source");
    not_null(out_engine, "out_engine");
    *out_engine = new moebius_engine{moebius::Engine(s.files, config_of(config))};
  });
}

void moebius_engine_destroy(moebius_engine* engine) { delete engine; }

moebius_status moebius_engine_model(const moebius_engine* engine, moebius_model_info* out_info, moebius_error** err) {
  return guarded(err, [&] {
    const moebius::ModelInfo m = not_null(engine, "engine").engine.model();
    not_null(out_info, "out_info");
    fill_struct(out_info, out_info->struct_size, kModelInfoV1,
                moebius_model_info{0, m.num_layers, m.vocab_size, m.hidden, m.num_experts, m.top_k, m.max_context, m.slices_per_expert, m.head_groups});
  });
}

moebius_status moebius_engine_submit(moebius_engine* engine, const moebius_request* request, uint64_t* out_id, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    const uint64_t id = e.engine.submit(not_null(request, "request").spec);
    if (out_id != nullptr) *out_id = id;
  });
}

moebius_status moebius_engine_submit_many(moebius_engine* engine, const moebius_request* const* requests, size_t num, uint64_t* out_ids,
                                          moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    if (num == 0) return;
    not_null(requests, "requests");
    not_null(out_ids, "out_ids");
    moebius::capi::check_length("num", num);
    std::vector<const moebius::RequestSpec*> specs;
    specs.reserve(num);
    for (size_t i = 0; i < num; ++i) {
      if (requests[i] == nullptr) fail(Code::kInvalidArgument, "request {} of {} is NULL", i, num);
      specs.push_back(&requests[i]->spec);
    }
    e.engine.submit(specs, out_ids);
  });
}

moebius_status moebius_engine_drain(moebius_engine* engine, double timeout_ms, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    if (e.engine.drain(timeout_ms)) return;
    const moebius::EngineStats s = e.engine.stats();
    fail(Code::kTimeout, "{} requests run and {} wait still{}", s.running, s.waiting, s.switching ? ", a switch is under way" : "");
  });
}

moebius_status moebius_engine_resume(moebius_engine* engine, moebius_error** err) {
  return guarded(err, [&] { not_null(engine, "engine").engine.resume(); });
}

moebius_status moebius_engine_check(const moebius_engine* engine, const moebius_request* request, moebius_error** err) {
  return guarded(err, [&] { not_null(engine, "engine").engine.check(not_null(request, "request").spec); });
}

moebius_status moebius_engine_cancel(moebius_engine* engine, uint64_t id, moebius_error** err) {
  return guarded(err, [&] {
    if (!not_null(engine, "engine").engine.cancel(id)) fail(Code::kNotFound, "request {} is not known, or has finished", id);
  });
}

moebius_status moebius_engine_cancel_sample(moebius_engine* engine, uint64_t id, int32_t sample, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    if (sample < 0) fail(Code::kInvalidArgument, "sample is {}, must be at least 0", sample);
    if (!e.engine.cancel(id, sample)) fail(Code::kNotFound, "request {} is not known, or has finished", id);
  });
}

moebius_status moebius_engine_step(moebius_engine* engine, moebius_step_result* out_result, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    if (out_result != nullptr) check_struct(out_result, out_result->struct_size, kStepResultV1);  // before anything runs
    const moebius::StepResult r = e.engine.step();
    if (out_result != nullptr)
      fill_struct(out_result, out_result->struct_size, kStepResultV1,
                  moebius_step_result{0, r.worked, r.decode_rows, r.prefill_rows, r.seconds, r.compute_seconds, r.switch_seconds});
  });
}

moebius_status moebius_engine_start(moebius_engine* engine, moebius_error** err) {
  return guarded(err, [&] { not_null(engine, "engine").engine.start(); });
}

moebius_status moebius_engine_stop(moebius_engine* engine, moebius_error** err) {
  return guarded(err, [&] { not_null(engine, "engine").engine.stop(); });
}

moebius_status moebius_engine_poll(moebius_engine* engine, moebius_event* out_events, size_t capacity, size_t stride, double timeout_ms,
                                   size_t* out_count, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    not_null(out_count, "out_count");
    if (capacity > 0) not_null(out_events, "out_events");
    check_stride(stride, kEventV1);
    constexpr size_t kBatch = 16;
    std::array<moebius::Event, kBatch> batch;
    size_t count = 0;
    while (count < capacity) {  // only the first batch waits
      const size_t n = e.engine.poll({batch.data(), std::min(kBatch, capacity - count)}, count == 0 ? timeout_ms : 0);
      for (size_t i = 0; i < n; ++i, ++count) {
        auto* out = reinterpret_cast<moebius_event*>(reinterpret_cast<char*>(out_events) + count * stride);
        std::memset(static_cast<void*>(out), 0, stride);
        fill_struct(out, static_cast<uint32_t>(stride), kEventV1, event_of(batch[i]));
      }
      if (n < kBatch) break;
    }
    *out_count = count;
  });
}

moebius_status moebius_engine_event_fd(moebius_engine* engine, int32_t* out_fd, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    not_null(out_fd, "out_fd");
    *out_fd = e.engine.event_descriptor();
  });
}

moebius_status moebius_engine_switch(moebius_engine* engine, moebius_layout to, moebius_error** err) {
  return guarded(err, [&] { not_null(engine, "engine").engine.request_switch(layout_of(to)); });
}

moebius_status moebius_engine_hold_seam(moebius_engine* engine, int32_t seam, moebius_error** err) {
  return guarded(err, [&] { not_null(engine, "engine").engine.hold_seam(seam); });
}

moebius_status moebius_engine_set_stall_budget(moebius_engine* engine, double ms, moebius_error** err) {
  return guarded(err, [&] { not_null(engine, "engine").engine.set_stall_budget(ms); });
}

moebius_status moebius_engine_set_policy(moebius_engine* engine, const moebius_config* config, moebius_error** err) {
  return guarded(err, [&] { not_null(engine, "engine").engine.set_policy(not_null(config, "config").engine.policy); });
}

moebius_status moebius_engine_estimate_switch(moebius_engine* engine, moebius_layout to, moebius_switch_estimate* out_estimate,
                                              moebius_error** err) {
  return guarded(err, [&] {
    const moebius::SwitchEstimate s = not_null(engine, "engine").engine.estimate_switch(layout_of(to));
    not_null(out_estimate, "out_estimate");
    moebius_switch_estimate out{0, s.fits, s.bytes, s.bytes_changed, s.seconds, {}};
    copy_text(out.reason, s.reason);
    fill_struct(out_estimate, out_estimate->struct_size, kEstimateV1, out);
  });
}

moebius_status moebius_engine_update_weights(moebius_engine* engine, const char* model_dir, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    e.engine.update_weights(&not_null(model_dir, "model_dir"));
  });
}

moebius_status moebius_engine_update_weights_from(moebius_engine* engine, const moebius_source* source, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    e.engine.update_weights(not_null(source, "source").files);
  });
}

moebius_status moebius_engine_update_tensors(moebius_engine* engine, const moebius_source* source, moebius_error** err) {
  return guarded(err, [&] {
    moebius_engine& e = not_null(engine, "engine");
    e.engine.update_tensors(not_null(source, "source").files);
  });
}

moebius_status moebius_engine_stats(const moebius_engine* engine, moebius_stats* out_stats, moebius_error** err) {
  return guarded(err, [&] {
    const moebius::EngineStats s = not_null(engine, "engine").engine.stats();
    not_null(out_stats, "out_stats");
    fill_struct(out_stats, out_stats->struct_size, kStatsV1,
                moebius_stats{0, s.running, s.waiting, s.seam, s.num_layers, s.switching, s.step, s.switches, s.rollbacks, s.refusals,
                              s.preemptions, s.prompt_tokens, s.generation_tokens, s.prefix_queries, s.prefix_hits, s.bytes_moved,
                              s.switch_seconds, s.kv_usage});
  });
}

moebius_status moebius_engine_memory(const moebius_engine* engine, moebius_memory* out_memory, moebius_error** err) {
  return guarded(err, [&] {
    const moebius::MemoryReport m = not_null(engine, "engine").engine.memory();
    not_null(out_memory, "out_memory");
    int64_t ep = 0;
    for (int64_t tokens : m.ep_tokens) ep += tokens;
    fill_struct(out_memory, out_memory->struct_size, kMemoryV1,
                moebius_memory{0, static_cast<int32_t>(m.ep_tokens.size()), m.arena_bytes, m.kept_bytes, m.lead_bytes, m.workspace_bytes,
                               m.shared_bytes, m.layer_bytes, m.tp_tokens, ep});
  });
}

moebius_status moebius_engine_metrics_text(const moebius_engine* engine, char* out_text, size_t capacity, size_t* out_needed,
                                           moebius_error** err) {
  return guarded(err, [&] {
    const std::string text = not_null(engine, "engine").engine.metrics_text();
    if (out_needed != nullptr) *out_needed = text.size() + 1;
    if (capacity == 0) return;
    not_null(out_text, "out_text");
    if (capacity < text.size() + 1) fail(Code::kInvalidArgument, "capacity is {}, the text needs {}", capacity, text.size() + 1);
    std::memcpy(out_text, text.c_str(), text.size() + 1);
  });
}

moebius_status moebius_engine_take_logits(moebius_engine* engine, uint64_t id, int32_t sample, float* out_logits, size_t capacity,
                                          size_t* out_count, moebius_error** err) {
  return guarded(err, [&] {
    const std::span<float> out(out_logits, out_logits != nullptr ? capacity : 0);
    report_taken(not_null(engine, "engine").engine.take_logits(id, sample, out), out, out_count);
  });
}

moebius_status moebius_engine_take_routes(moebius_engine* engine, uint64_t id, int32_t sample, int16_t* out_experts, size_t capacity,
                                          size_t* out_count, moebius_error** err) {
  return guarded(err, [&] {
    const std::span<int16_t> out(out_experts, out_experts != nullptr ? capacity : 0);
    report_taken(not_null(engine, "engine").engine.take_routes(id, sample, out), out, out_count);
  });
}

}  // extern "C"
