#include "lib/moe/expert_batch.h"

#include <algorithm>

namespace moebius {

ExpertBatch::ExpertBatch(int64_t max_pairs, int64_t max_experts)
    : pair_rows_(max_pairs), cursor_(max_experts + 1), pair_weights_(max_pairs) {
  jobs_.reserve(max_experts + 1);
}

void ExpertBatch::group(const LayerWeights& layer, Range rows, const int32_t* ids, const float* weights, int top_k) {
  std::fill_n(cursor_.begin(), layer.num_local_experts, 0);
  for (int64_t i = rows.begin * top_k; i < rows.end * top_k; ++i)
    if (const int32_t local = layer.local_of_expert[ids[i]]; local >= 0) ++cursor_[local];
  jobs_.clear();
  int32_t begin = 0;
  for (int32_t e = 0; e < layer.num_local_experts; ++e) {
    const int32_t count = cursor_[e];
    cursor_[e] = begin;
    if (count > 0) jobs_.push_back({begin, count, layer.cuts.data() + static_cast<int64_t>(e) * layer.num_cuts});
    begin += count;
  }
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t i = row * top_k; i < (row + 1) * top_k; ++i)
      if (const int32_t local = layer.local_of_expert[ids[i]]; local >= 0) {
        const int32_t at = cursor_[local]++;
        pair_rows_[at] = static_cast<int32_t>(row);
        pair_weights_[at] = weights[i];
      }
}

void ExpertBatch::group_dense(const LayerWeights& layer, Range rows) {
  jobs_.clear();
  if (rows.empty()) return;
  jobs_.push_back({0, static_cast<int32_t>(rows.size()), layer.cuts.data()});
  for (int64_t i = 0; i < rows.size(); ++i) {
    pair_rows_[i] = static_cast<int32_t>(rows.begin + i);
    pair_weights_[i] = 1.0f;
  }
}

void ExpertBatch::describe(ExpertsArgs& out) const {
  out.num_jobs = num_jobs();
  out.jobs = jobs_.data();
  out.pair_rows = pair_rows_.data();
  out.pair_weights = pair_weights_.data();
}

}  // namespace moebius
