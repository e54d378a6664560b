// Token permutation: the rows of a step grouped by the local expert they chose. A counting sort; pairs of one expert keep the
// order of rows.
#pragma once

#include <cstdint>
#include <vector>

#include "lib/moe/layer_weights.h"

namespace moebius {

class ExpertBatch {
 public:
  ExpertBatch(int64_t max_pairs, int64_t max_experts);

  // ids, weights: [max_rows, top_k], read at `rows`. Choices of experts that are not local are left out.
  void group(const LayerWeights& layer, Range rows, const int32_t* ids, const float* weights, int top_k);
  // Every row once, with weight 1: a dense MLP.
  void group_dense(const LayerWeights& layer, Range rows);

  // Jobs (one per local expert that has rows), pair_rows and pair_weights filled in.
  void describe(ExpertsArgs& out) const;
  int num_jobs() const { return static_cast<int>(jobs_.size()); }

 private:
  std::vector<ExpertJob> jobs_;
  std::vector<int32_t> pair_rows_, cursor_;
  std::vector<float> pair_weights_;
};

}  // namespace moebius
