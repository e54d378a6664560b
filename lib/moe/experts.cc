#include "lib/moe/layer_backend.h"

namespace moebius {

void route_rows(RankContext& rank, const LayerWeights& layer, Range rows, const Lane& lane) {
  const RankBuffers& b = *rank.buffers;
  RouteArgs args;
  args.rows = rows;
  args.x = b.x_float;
  args.w = layer.router;
  args.hidden = rank.dims.hidden;
  args.num_experts = rank.dims.num_experts;
  args.top_k = rank.dims.top_k;
  args.renormalise = rank.dims.renormalise;
  args.ids = b.expert_ids;
  args.weights = b.expert_weights;
  rank.ops->route(args, lane);
}

void run_experts(RankContext& rank, const LayerWeights& layer, Range rows, Accumulator sum, const Lane& lane) {
  const RankBuffers& b = *rank.buffers;
  if (lane.thread == 0) {
    if (layer.dense()) rank.batch->group_dense(layer, rows);
    else rank.batch->group(layer, rows, b.expert_ids, b.expert_weights, rank.dims.top_k);
    rank.experts_reached += rank.batch->num_jobs();
  }
  rank.comm->rank_barrier();  // the batch before every thread's use of it
  ExpertsArgs args;
  args.hidden = rank.dims.hidden;
  args.neurons_per_cut = layer.neurons_per_cut;
  args.num_cuts = layer.num_cuts;
  rank.batch->describe(args);
  args.x = b.x;
  args.act = b.act;
  args.zero_rows = rows;
  args.out = b.sums[static_cast<int>(sum)];
  args.out.scale = layer.mlp_scale;
  rank.ops->experts_gate_up(args, lane);
  rank.comm->rank_barrier();  // act before its reading by columns
  rank.ops->experts_down(args, lane);
}

}  // namespace moebius
