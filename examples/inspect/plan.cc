#include "examples/inspect/plan.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <thread>

#include "lib/base/error.h"
#include "lib/comm/world.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/runtime/model_store.h"
#include "lib/runtime/sampler.h"
#include "lib/runtime/workspace.h"
#include "lib/tensor/packed.h"

namespace moebius::inspect {
namespace {

struct Stop {};

// Reserves nothing. A ModelStore asks for each rank's arena, all planned by then, and next for one block of what is replicated: there it
// is stopped, before a weight is read.
class CountingDevice final : public Device {
 public:
  CountingDevice(int ranks, const Ops& ops, bool own_memory) : ranks_(ranks), ops_(ops), own_memory_(own_memory) {}
  const char* name() const override { return "cpu"; }
  bool host_memory() const override { return true; }
  const Ops& ops() const override { return ops_; }
  int place(int rank) const override { return own_memory_ ? rank : 0; }
  int64_t total_bytes(int) const override { return kUnlimited; }
  int64_t free_bytes(int) const override { return kUnlimited; }
  std::byte* allocate(int, int64_t bytes) override {
    if (arenas_++ < ranks_) return nullptr;
    stopped(bytes);
    throw Stop();
  }
  void release(int, std::byte*, int64_t) noexcept override {}
  void* queue(int) override { return nullptr; }
  void write(int, void*, const void*, int64_t) override {}
  void read(int, void*, int64_t, const void*, int64_t, int64_t, int64_t) override {}
  void copy(int, void*, const void*, int64_t) override {}
  void copy_block(int, void*, const void*, int64_t) override {}
  void finish_blocks(int) override {}
  void mark(int) override {}
  void pass(int) override {}
  bool idle(int) override { return true; }

  std::function<void(int64_t shared_bytes)> stopped;

 private:
  static constexpr int64_t kUnlimited = int64_t{1} << 60;
  int ranks_, arenas_ = 0;
  const Ops& ops_;
  bool own_memory_;
};

// As lib/runtime/engine.cc has it for ranks on the CPU; tests/capi/inspect_test.cc compares the sizes.
WorkspaceShape workspace_shape(const ModelConfig& model, const EngineConfig& config, int threads, const Ops& ops) {
  const SliceCounts counts = slice_counts(model.shape, config.slices_per_expert);
  WorkspaceShape s;
  s.max_rows = config.chunk_tokens + config.max_batch;
  s.max_logit_rows = std::min(config.max_batch, 64);
  s.hidden = model.shape.hidden;
  s.num_heads = model.shape.num_heads;
  s.num_kv_heads = model.shape.num_kv_heads;
  s.head_dim = model.shape.head_dim;
  s.top_k = std::max(1, model.top_k);
  for (const MlpShape& mlp : model.shape.mlps) {
    const int64_t pairs = s.max_rows * (mlp.num_experts > 0 ? s.top_k : 1);
    s.max_act_elements = std::max(s.max_act_elements, pairs * MlpCut{mlp.intermediate / counts.cuts, s.hidden}.padded() * counts.cuts);
    s.max_pairs = std::max(s.max_pairs, pairs);
    s.num_experts = std::max<int64_t>(s.num_experts, mlp.num_experts);
  }
  s.threads = threads;
  s.scratch_bytes = ops.scratch_bytes({s.max_rows, s.hidden, s.head_dim, s.num_heads, std::max<int64_t>(1, s.num_experts), s.top_k});
  return s;
}

int64_t workspace_bytes(const ModelConfig& model, const EngineConfig& config, const Ops& ops) {
  const WorkspaceShape shape = workspace_shape(model, config, config.threads, ops);
  const int64_t logits = shape.max_logit_rows * model.vocab_size * static_cast<int64_t>(sizeof(float));  // all ranks' together
  return Workspace::bytes(shape) + shape.threads * SamplerScratch::bytes(model.vocab_size) + div_up(logits, config.ranks);
}

EngineConfig complete(EngineConfig config, const ModelConfig& model) {
  if (config.page_tokens < 1 || config.page_tokens % kTile != 0)
    fail(Code::kInvalidArgument, "page_tokens is {}, must be a multiple of {}", config.page_tokens, kTile);
  if (config.max_context > model.max_position_embeddings)
    fail(Code::kInvalidArgument, "max_context is {}, the model was made for {}", config.max_context, model.max_position_embeddings);
  if (config.max_context == 0) config.max_context = model.max_position_embeddings;
  if (config.threads == 0) config.threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / config.ranks);
  return config;
}

}  // namespace

MemoryPlan plan_memory(const ModelConfig& model, const EngineConfig& asked, bool own_memory) {
  const EngineConfig config = complete(asked, model);
  check_ranks(model.shape, slice_counts(model.shape, config.slices_per_expert), config.ranks);
  const Ops& ops = cpu_ops(config.isa);
  const int64_t workspace = workspace_bytes(model, config, ops);
  const std::unique_ptr<WeightSource> source = make_dummy_source(model, 0);
  World world(config.ranks, 1, config.wait_deadline_ms);
  CountingDevice device(config.ranks, ops, own_memory);
  struct Place {
    alignas(ModelStore) std::byte bytes[sizeof(ModelStore)];
    const ModelStore& store() const { return *reinterpret_cast<const ModelStore*>(bytes); }
  } place;
  // Its members are read while its constructor is stopped inside the body: all of them live then.
  std::optional<MemoryPlan> plan;
  device.stopped = [&](int64_t shared_bytes) {
    const ModelStore& store = place.store();
    plan = MemoryPlan{store.arena(), store.to_tp(), store.to_ep(), store.memory_bytes(), workspace, shared_bytes};
  };
  try {
    new (place.bytes) ModelStore(*source, model, config, world, device, workspace);
  } catch (const Stop&) {
  }
  MOEBIUS_ASSERT(plan.has_value());
  return *std::move(plan);
}

MemoryPlan plan_least(const ModelConfig& model, EngineConfig config, bool own_memory) {
  config.memory_bytes = 0;
  config.kv_tokens = 1;
  return plan_memory(model, config, own_memory);
}

}  // namespace moebius::inspect
