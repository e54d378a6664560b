// A model laid out for a world: its arenas, what is replicated, and every rank's tables for both layouts.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "lib/comm/world.h"
#include "lib/device/buffer.h"
#include "lib/layout/arena.h"
#include "lib/layout/transfer.h"
#include "lib/model/config.h"
#include "lib/model/weights.h"
#include "lib/moe/layer_weights.h"
#include "lib/runtime/engine.h"
#include "lib/runtime/rank_executor.h"

namespace moebius {

class ModelStore {
 public:
  // Compares the checkpoint with config.json before any table is built from its numbers, plans the arenas within
  // config.memory_bytes, reserves them and loads each rank's slices of the start layout. workspace_bytes: what a rank needs
  // beside its arena.
  ModelStore(const std::filesystem::path& model_dir, const ModelConfig& model, const EngineConfig& config, World& world,
             int64_t workspace_bytes);
  // The same from weights that have been compared already.
  ModelStore(const WeightSource& source, const ModelConfig& model, const EngineConfig& config, World& world, int64_t workspace_bytes);

  const ArenaPlan& arena() const { return arena_; }
  const TransferPlan& to_tp() const { return to_tp_; }
  const TransferPlan& to_ep() const { return to_ep_; }
  const SliceTable& slices() const { return slices_; }
  const ForwardModel& forward() const { return forward_; }
  // [Layout][layer] tables of a rank.
  const std::vector<LayerWeights> (&tables(int rank) const)[2] { return ranks_[rank]->tables; }
  std::vector<std::byte*> arenas() const;
  int64_t shared_bytes() const { return shared_bytes_; }  // replicated weights and the rotary table
  int64_t memory_bytes() const { return memory_bytes_; }  // per rank, as asked for or chosen

 private:
  struct Rank {
    HostBuffer arena;
    std::vector<LayerWeights> tables[2];
  };
  ArenaPlan plan(const ModelConfig& model, const EngineConfig& config, int64_t workspace_bytes);
  void load(const WeightSource& source, const ModelConfig& model, const EngineConfig& config, World& world);
  void make_tables(const ModelConfig& model, int page_tokens, int rank, Layout layout);
  void make_rope(const ModelConfig& model, int64_t positions);

  SliceCounts counts_;
  SliceTable slices_;
  Owners tp_, ep_;
  int64_t memory_bytes_ = 0;
  ArenaPlan arena_;
  TransferPlan to_tp_, to_ep_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::unique_ptr<SharedWeights> shared_;
  int64_t shared_bytes_ = 0;
  HostBuffer rope_;
  std::vector<float> attention_scales_, value_scales_, mlp_scales_;  // [layers]
  ForwardModel forward_;
};

}  // namespace moebius
