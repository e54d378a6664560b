// Tensor parallelism: every rank works on all rows with its cut of every expert and its heads; both sums are all-reduced.
#include "lib/moe/layer_backend.h"

namespace moebius {
namespace {

class TpBackend final : public LayerBackend {
 public:
  Range rows(const RankContext&, const Range*, int64_t num_rows) const override { return {0, num_rows}; }

  PartialSums finish_attention(RankContext& rank, int64_t num_rows) const override {
    return rank.comm->all_reduce(Accumulator::kAttention, num_rows);
  }

  PartialSums run_mlp(RankContext& rank, const LayerWeights& layer, const AddNormArgs& norm, const Range*, int64_t num_rows,
                      const Lane& lane) const override {
    if (layer.dense()) norm_rows(rank, norm, lane), group_rows(rank, layer, norm.rows, norm.rows, lane);
    else norm_route_and_group(rank, layer, norm, lane);
    run_experts(rank, layer, norm.rows, Accumulator::kMlp, lane);
    return rank.comm->all_reduce(Accumulator::kMlp, num_rows);
  }
};

}  // namespace

const LayerBackend& tp_backend() {
  static constexpr TpBackend backend;
  return backend;
}

}  // namespace moebius
