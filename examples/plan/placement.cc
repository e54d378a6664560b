#include "examples/plan/placement.h"

#include <algorithm>
#include <vector>

#include "lib/base/error.h"

namespace moebius::plan {
namespace {

inspect::MemoryPlan plan_of(const Model& model, const EngineConfig& engine, int64_t memory_bytes) {
  if (model.served) {
    EngineConfig config = engine;
    config.memory_bytes = memory_bytes;
    return inspect::plan_memory(model.config, config, true);
  }
  const int64_t workspace = inspect::planned_workspace_bytes(model.config, engine), shared = static_cast<int64_t>(model.replicated_bytes);
  inspect::MemoryPlan plan = inspect::plan_slices(model.slices(engine.slices_per_expert), engine.ranks, model.kv_slice_bytes(engine.page_tokens),
                                                  memory_bytes, workspace + shared);
  plan.workspace_bytes = workspace;
  plan.shared_bytes = shared;
  return plan;
}

// With one page of KV.
inspect::MemoryPlan least_of(const Model& model, const EngineConfig& engine) {
  if (model.served) return inspect::plan_least(model.config, engine, true);
  const SliceTable table = model.slices(engine.slices_per_expert);
  const Owners tp = tp_owners(table, engine.ranks), ep = ep_owners(table, engine.ranks);
  const int64_t slice = model.kv_slice_bytes(engine.page_tokens);
  ArenaPlan arena = plan_arena(table, tp, ep, slice, 1, std::vector<int64_t>(static_cast<size_t>(engine.ranks), 1));
  TransferPlan to_tp = plan_transfer(arena, Layout::kEp), to_ep = plan_transfer(arena, Layout::kTp);
  const int64_t workspace = inspect::planned_workspace_bytes(model.config, engine), shared = static_cast<int64_t>(model.replicated_bytes);
  int64_t bytes = 0;
  for (int r = 0; r < engine.ranks; ++r) bytes = std::max(bytes, arena.arena_bytes(r));
  return {std::move(arena), std::move(to_tp), std::move(to_ep), bytes + workspace + shared, workspace, shared};
}

}  // namespace

int slices_for(const Model& model, int ranks, int setting) {
  const SliceCounts counts = slice_counts(model.shape(), setting);
  if (setting > 0 || counts.cuts >= ranks) return counts.cuts;
  const auto divides = [&](int cuts) {
    return std::all_of(model.shape().mlps.begin(), model.shape().mlps.end(), [&](const MlpShape& m) { return m.intermediate % cuts == 0; });
  };
  for (int cuts = ranks; cuts <= 4096; ++cuts)
    if (divides(cuts)) return cuts;
  return counts.cuts;
}

Placement place(const Model& model, const Cluster& cluster, const Settings& s) {
  EngineConfig engine;
  engine.ranks = s.ranks > 0 ? s.ranks : cluster.ranks;
  engine.threads = 1;
  engine.page_tokens = s.page_tokens;
  engine.chunk_tokens = s.chunk_tokens;
  engine.max_batch = s.max_batch;
  engine.mode = cluster.sum_bytes == 8 ? "exact" : "fast";
  if (engine.ranks > cluster.devices)
    fail(Code::kInvalidArgument, "{} ranks are too many: {} has {} devices", engine.ranks, cluster.name, cluster.devices);
  engine.slices_per_expert = slices_for(model, engine.ranks, s.slices_per_expert);
  check_ranks(model.shape(), slice_counts(model.shape(), engine.slices_per_expert), engine.ranks);
  engine.memory_bytes = s.memory_bytes > 0 ? s.memory_bytes : static_cast<int64_t>(s.memory_share * static_cast<double>(cluster.memory_bytes));
  inspect::MemoryPlan least = least_of(model, engine);
  const int64_t least_bytes = least.memory_bytes;
  Placement p{engine.ranks, cluster.devices / engine.ranks, engine, false, "", std::move(least), least_bytes};
  try {
    p.memory = plan_of(model, engine, engine.memory_bytes);
    p.fits = true;
  } catch (const Error& e) {
    if (e.code() != Code::kDoesNotFit) throw;
    p.why_not = e.what();
  }
  return p;
}

SwitchModel::SwitchModel(const inspect::MemoryPlan& memory, const Cluster& cluster, int page_tokens) {
  const ArenaPlan& arena = memory.arena;
  const int ranks = arena.ranks(), layers = arena.num_layers();
  const Exchanges exchanges(cluster, ranks);
  rate_ = exchanges.copy_rate();
  // One before the first layer, one after each; its kernels start anew.
  fences_s_ = ranks > 1 ? (layers + 1) * (cluster.launch_s + exchanges.collect(0)) : 0;
  for (Layout to : {Layout::kTp, Layout::kEp}) {
    const auto x = static_cast<size_t>(to);
    const TransferPlan& weights = to == Layout::kTp ? memory.to_tp : memory.to_ep;
    for (int r = 0; r < ranks; ++r) {
      double bytes = 0;
      for (const ItemTransfer& item : weights.items)
        for (const BlockCopy& c : item.to[static_cast<size_t>(r)]) bytes += static_cast<double>(c.bytes);
      weight_bytes_[x] = std::max(weight_bytes_[x], bytes);
      // Of one page of each home, in one layer, as the engine copies them.
      double kv = 0;
      for (int home = 0; home < ranks; ++home)
        for_each_kv_block(arena, to, 0, r, PagePair{home, home, 0},
                          [&](const BlockCopy& c, bool local) { kv += local ? 0 : static_cast<double>(c.bytes); });
      kv_bytes_[x] = std::max(kv_bytes_[x], kv * layers / (static_cast<double>(ranks) * page_tokens));
    }
  }
}

}  // namespace moebius::plan
