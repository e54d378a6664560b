// Slices: the units that a layout gives to ranks. Which slices a model has depends on the model and one setting only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lib/layout/types.h"

namespace moebius {

using RankSet = uint64_t;  // bit r: rank r
inline constexpr int kMaxRanks = 64;

enum class SliceKind : uint8_t { kExpertCut, kSharedCut, kDenseCut, kAttentionGroup, kKvProjection };

struct Slice {
  SliceKind kind;
  int32_t layer;
  int32_t index;  // expert (shared ones follow the others), 0, head group or KV head
  int32_t cut;    // of the MLP's intermediate neurons; 0 otherwise
  int64_t bytes;  // geometry: lib/tensor/packed.h; a multiple of 64
};

struct SliceCounts {
  int cuts = 0;         // S: of every MLP
  int head_groups = 0;  // A
};

// S: the setting, or (0) 8 where that leaves cuts of at least 96 neurons in every MLP, else 4, or the largest power of two
// that divides every width. A: the smallest divisor of the query heads that is a multiple of the KV heads and at least
// min(S, query heads). Throws when the setting (any divisor will do) does not divide every MLP width.
SliceCounts slice_counts(const ModelShape& model, int slices_per_expert);

// P ≤ min(S, A, E) and ≤ 64, E being the fewest experts of a sparse layer; throws with the numbers and the setting that would
// help.
void check_ranks(const ModelShape& model, SliceCounts counts, int ranks);

// Bytes of a slice by kind, multiples of 64; a shared cut has an expert's.
struct SliceBytes {
  int64_t attention_group = 0, kv_projection = 0, expert_cut = 0, dense_cut = 0;
};

class SliceTable {
 public:
  SliceTable(const ModelShape& model, SliceCounts counts);  // as lib/tensor/packed.h keeps weights
  // As an executor of the host's keeps them. Of `model` only the numbers of heads, KV heads, experts and layers count.
  SliceTable(const ModelShape& model, SliceCounts counts, const SliceBytes& bytes);

  const ModelShape& model() const { return model_; }
  SliceCounts counts() const { return counts_; }
  int num_layers() const { return model_.num_layers(); }
  std::span<const Slice> layer(int l) const { return layers_[static_cast<size_t>(l)]; }

  // Places inside any layer's span: head groups, then K/V projections, then MLP cuts (expert by expert).
  int attention(int group) const { return group; }
  int kv_projection(int head) const { return counts_.head_groups + head; }
  int expert_cut(int expert, int cut) const {
    return counts_.head_groups + model_.num_kv_heads + expert * counts_.cuts + cut;
  }
  int dense_cut(int cut) const { return expert_cut(0, cut); }
  int kv_head_of_group(int group) const { return group * model_.num_kv_heads / counts_.head_groups; }

 private:
  void add_layer(int layer, const SliceBytes& bytes);

  ModelShape model_;
  SliceCounts counts_;
  std::vector<std::vector<Slice>> layers_;
};

}  // namespace moebius
