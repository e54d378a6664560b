// One rank's part of a step: the forward pass, written once for both layouts and any seam.
#pragma once

#include <vector>

#include "lib/moe/layer_backend.h"
#include "lib/runtime/step_tables.h"

namespace moebius {

// Weights and dimensions that a forward pass reads; made once.
struct ForwardModel {
  int32_t num_layers = 0;
  int64_t hidden = 0, vocab = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  float eps = 0;
  float softmax_scale = 0, embedding_multiplier = 1, residual_multiplier = 1;
  const bf16* embedding = nullptr;     // [vocab, hidden], or null when tied to a packed lm_head
  const bf16* lm_head = nullptr;       // packed n = vocab, k = hidden,
  bool row_major_head = false;         // or [vocab, hidden]
  const float* final_norm = nullptr;   // [hidden]
  const float* rope = nullptr;         // [max_context][cos, sin][head_dim/2]
};

class RankExecutor {
 public:
  // layers: [Layout][num_layers], this rank's tables. All borrowed.
  RankExecutor(const ForwardModel& model, const std::vector<LayerWeights> (&layers)[2], const RankContext& context);

  // Called by every thread of the rank. Leaves the final normed rows of the whole step in the buffers.
  void forward(const StepShape& shape, const StepView& view, const Lane& lane);
  // This rank's share of the vocabulary, `columns()` of it, for logit rows [group.begin, group.end) of the plan: row i of the group is
  // at logits + i·stride, with the share's first column there.
  void logits(const StepView& view, Range group, float* logits, int64_t stride, const Lane& lane);
  Range columns() const;

  RankContext& context() { return context_; }

 private:
  // A layer's sum that has not been added to the residual stream yet.
  struct Sums {
    PartialSums partials;
    float scale = 1;
  };
  // Where the residual stream is, and where it goes next.
  struct Residual {
    float* here = nullptr;
    float* next = nullptr;
  };
  AddNormArgs norm_of(Range rows, const Sums& sums, const float* weight, bool keep_float, Residual& residual) const;
  void keep_routes(int32_t layer, int64_t num_rows);
  void attend(const StepShape& shape, const StepView& view, const LayerWeights& layer, Layout layout, const AddNormArgs& norm, const Lane& lane);

  const ForwardModel& model_;
  const std::vector<LayerWeights> (&layers_)[2];
  RankContext context_;
};

}  // namespace moebius
