// A model laid out for a world: its arenas, what is replicated, and every rank's tables for both layouts.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "lib/comm/world.h"
#include "lib/device/device.h"
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
  // beside its arena. model, world and device outlive it.
  ModelStore(const ModelFiles& files, const ModelConfig& model, const EngineConfig& config, World& world, Device& device,
             int64_t workspace_bytes);
  // The same from weights that have been compared already.
  ModelStore(const WeightSource& source, const ModelConfig& model, const EngineConfig& config, World& world, Device& device,
             int64_t workspace_bytes);

  // Loads other weights of the same model, or those that a partial source has, over the present ones, while layers [0, seam) lie in TP and
  // the others in EP. True: scales have changed, which tables hold. When this throws the weights are a mixture, and scales are what they were.
  bool update(const WeightSource& source, int seam, const std::function<bool(int64_t, int64_t)>& progress);

  const ArenaPlan& arena() const { return arena_; }
  const TransferPlan& to_tp() const { return to_tp_; }
  const TransferPlan& to_ep() const { return to_ep_; }
  const SliceTable& slices() const { return slices_; }
  const ForwardModel& forward(int rank) const { return ranks_[rank]->forward; }
  // [Layout][layer] tables of a rank.
  const std::vector<LayerWeights> (&tables(int rank) const)[2] { return ranks_[rank]->tables; }
  std::vector<std::byte*> arenas() const;
  int64_t shared_bytes() const { return shared_bytes_; }  // replicated weights and the rotary table
  int64_t memory_bytes() const { return memory_bytes_; }  // per rank, as asked for or chosen
  int64_t table_bytes() const;                            // per rank at most: its lists, and what switches are told by

 private:
  struct Rank {
    DeviceBuffer arena;
    DeviceBuffer lists;  // that `tables` point to
    std::vector<LayerWeights> tables[2];
    const std::byte* shared = nullptr;  // its place's copy
    ForwardModel forward;
  };
  // Of a layer: powers of two, properties of its weights.
  struct Scales {
    float value = 1, attention = 1, mlp = 1;
    friend bool operator==(const Scales&, const Scales&) = default;
  };
  ArenaPlan plan(const EngineConfig& config, int64_t workspace_bytes);
  int64_t most_table_bytes(int64_t tp_pages, int64_t ep_pages) const;
  void reserve_shared(int64_t positions);
  int loading_threads() const;  // of each rank
  std::vector<std::vector<bool>> touched_by(const WeightSource& source) const;
  std::vector<Scales> scales_of(const std::byte* shared) const;
  std::vector<Scales> load(const WeightSource& source, int seam, const std::function<bool(int64_t, int64_t)>& progress);
  void make_tables(int page_tokens, int rank);
  void fill_table(int page_tokens, int rank, Layout layout, int layer, LayerWeights& w, std::vector<const bf16*>& cuts,
                  std::vector<int32_t>& local_of_expert) const;
  void set_scales();
  void wait_for_ranks();

  const ModelConfig& model_;
  World& world_;
  Device& device_;
  SharedWeights shared_;
  SliceCounts counts_;
  SliceTable slices_;
  Owners tp_, ep_;
  int64_t memory_bytes_ = 0;
  ArenaPlan arena_;
  TransferPlan to_tp_, to_ep_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::pair<int, DeviceBuffer>> copies_;  // [places] of the replicated weights and the rotary table behind them; a rank there
  int64_t shared_bytes_ = 0;
  std::vector<std::vector<SliceMaxima>> maxima_;  // [layers][1 + experts] of attention, then of each expert or the dense MLP
  std::vector<Scales> scales_;                    // [layers] that follow from these
};

}  // namespace moebius
