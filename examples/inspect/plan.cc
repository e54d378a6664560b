#include "examples/inspect/plan.h"

#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "lib/base/error.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/runtime/engine_impl.h"

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
  void copy(int, void*, int, const void*, int64_t) override {}
  void copy_block(int, void*, int, const void*, int64_t) override {}
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

}  // namespace

MemoryPlan plan_memory(const ModelConfig& model, const EngineConfig& asked, bool own_memory) {
  const EngineConfig config = complete(asked, model);
  const int threads = threads_per_rank(config, model);
  CountingDevice device(config.ranks, cpu_ops(config.isa), own_memory);
  const int64_t workspace = workspace_bytes(device, workspace_shape(model, config, threads, device), model, config);
  const std::unique_ptr<WeightSource> source = make_dummy_source(model, 0);
  World world(config.ranks, 1, config.wait_deadline_ms);
  struct Place {
    alignas(ModelStore) std::byte bytes[sizeof(ModelStore)];
    const ModelStore& store() const { return *reinterpret_cast<const ModelStore*>(bytes); }
  } place;
  // Its members are read while its constructor is stopped inside the body: all of them live then.
  std::optional<MemoryPlan> plan;
  device.stopped = [&](int64_t shared_bytes) {
    const ModelStore& store = place.store();
    plan = MemoryPlan{store.arena(), store.to_tp(), store.to_ep(), store.memory_bytes(), workspace + store.table_bytes(), shared_bytes};
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

MemoryPlan plan_slices(const SliceTable& table, int ranks, int64_t kv_slice_bytes, int64_t memory_bytes, int64_t beside_bytes) {
  const Owners tp = tp_owners(table, ranks), ep = ep_owners(table, ranks);
  const Capacity capacity =
      plan_capacity(table, tp, ep, kv_slice_bytes, std::vector<int64_t>(static_cast<size_t>(ranks), memory_bytes - beside_bytes));
  ArenaPlan arena = plan_arena(table, tp, ep, kv_slice_bytes, capacity.tp_pages, capacity.ep_pages);
  TransferPlan to_tp = plan_transfer(arena, Layout::kEp), to_ep = plan_transfer(arena, Layout::kTp);
  return {std::move(arena), std::move(to_tp), std::move(to_ep), memory_bytes, 0, 0};
}

int64_t planned_workspace_bytes(const ModelConfig& model, const EngineConfig& asked) {
  const EngineConfig config = complete(asked, model);
  CountingDevice device(config.ranks, cpu_ops(config.isa), true);
  return workspace_bytes(device, workspace_shape(model, config, threads_per_rank(config, model), device), model, config);
}

}  // namespace moebius::inspect
