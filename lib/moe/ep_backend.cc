// Expert parallelism with data-parallel attention: a rank works on the rows of its own requests with all heads; rows travel
// to the ranks of their experts and the experts' sums travel back.
#include "lib/moe/layer_backend.h"

namespace moebius {
namespace {

class EpBackend final : public LayerBackend {
 public:
  Range rows(const RankContext& rank, const Range* homes, int64_t) const override { return homes[rank.comm->rank()]; }

  PartialSums finish_attention(RankContext& rank, int64_t) const override { return rank.comm->local_sum(Accumulator::kAttention); }

  PartialSums run_mlp(RankContext& rank, const LayerWeights& layer, const AddNormArgs& norm, const Range* homes, int64_t num_rows,
                      const Lane& lane) const override {
    const Range rows = norm.rows;
    if (layer.dense()) {  // every rank owns a dense MLP whole, and shared experts
      norm_rows(rank, norm, lane);
      group_rows(rank, layer, rows, rows, lane);
      run_experts(rank, layer, rows, Accumulator::kLocal, lane);
      return rank.comm->local_sum(Accumulator::kLocal);
    }
    norm_and_route(rank, layer, norm, lane);
    rank.comm->dispatch(homes, lane);
    group_rows(rank, layer, {0, num_rows}, rows, lane);
    run_experts(rank, layer, {0, num_rows}, Accumulator::kMlp, lane);
    return rank.comm->combine(Accumulator::kMlp, homes);
  }
};

}  // namespace

const LayerBackend& ep_backend() {
  static constexpr EpBackend backend;
  return backend;
}

}  // namespace moebius
