// What an engine fixes before it is made: its configuration, checked and completed, and the memory of its ranks.
#include <algorithm>
#include <thread>

#include "lib/base/error.h"
#include "lib/runtime/backend.h"
#include "lib/runtime/engine_impl.h"
#include "lib/tensor/packed.h"

namespace moebius {

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
  s.choices = std::max(1, model.top_k + model.num_shared);
  OpLimits limits{s.max_rows, s.hidden, s.head_dim, s.num_heads, 1, s.choices};
  for (const MlpShape& mlp : model.shape.mlps) {
    const int64_t width = MlpCut{mlp.intermediate / counts.cuts, s.hidden}.padded() * counts.cuts;
    const int64_t pairs = s.max_rows * (mlp.num_experts > 0 ? s.choices : 1);
    s.max_act_bytes = std::max(s.max_act_bytes, ops.act_bytes(pairs, width));
    s.max_pairs = std::max(s.max_pairs, pairs);
    s.num_experts = std::max<int64_t>(s.num_experts, mlp.num_experts);
    s.all_experts = std::max<int64_t>(s.all_experts, mlp.all_experts());
  }
  limits.num_experts = std::max<int64_t>(1, s.all_experts);
  limits.row_major = row_major_head(config);
  s.mlp_addends = s.choices * counts.cuts;
  s.attention_addends = counts.head_groups;
  s.threads = threads;
  s.scratch_bytes = ops.scratch_bytes(limits);
  s.plain_sums = config.fast();
  s.two_residuals = ops.norm_linear != nullptr;
  if (!device.host_memory()) s.logit_columns = div_up(div_up(model.vocab_size, kTile), config.ranks) * kTile;
  if (device.collectives() != nullptr) s.collected_rows = div_up(s.max_logit_rows, config.ranks) * config.ranks;
  return s;
}

RouteRule route_rule(const ModelConfig& model, const WorkspaceShape& shape) {
  RouteRule rule;
  rule.num_experts = static_cast<int32_t>(shape.num_experts);
  rule.top_k = model.top_k;
  rule.num_shared = model.num_shared;
  rule.gates_shared = model.names->shared_gate != nullptr;
  rule.sigmoid = model.names->router_bias != nullptr;
  rule.renormalise = model.norm_topk_prob;
  rule.scale = model.routed_scaling_factor;
  return rule;
}

StepLimits step_limits(const WorkspaceShape& shape, const EngineConfig& config) {
  return {shape.max_rows, shape.max_rows, std::min<int64_t>(shape.max_rows, config.max_batch), div_up(config.max_context, config.page_tokens), config.page_tokens};
}

namespace {

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

}  // namespace moebius
