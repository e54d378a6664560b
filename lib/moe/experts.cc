#include "lib/moe/layer_backend.h"

namespace moebius {
namespace {

RouteArgs route_args(const RankContext& rank, const LayerWeights& layer, Range rows) {
  const RankBuffers& b = *rank.buffers;
  RouteArgs args;
  args.rows = rows;
  args.x = b.x_float;
  args.w = layer.router;
  args.hidden = rank.hidden;
  args.rule = rank.rule;
  args.bias = layer.router_bias;
  args.ids = b.expert_ids;
  args.weights = b.expert_weights;
  return args;
}

GroupArgs group_args(const RankContext& rank, const LayerWeights& layer, Range rows, Range own) {
  const RankBuffers& b = *rank.buffers;
  GroupArgs args;
  args.rows = rows;
  args.choices = rank.rule.choices();
  args.num_routed = rank.rule.num_experts;
  args.shared_rows = own;
  args.tokens = rank.tokens;
  args.ids = b.expert_ids;
  args.weights = b.expert_weights;
  args.num_experts = layer.num_local_experts;
  args.local_of_expert = layer.local_of_expert;
  args.begins = b.begins;
  args.pair_rows = b.pair_rows;
  args.pair_weights = b.pair_weights;
  args.experts_reached = b.experts_reached;
  return args;
}

}  // namespace

void norm_rows(RankContext& rank, const AddNormArgs& norm, const Lane& lane) {
  rank.ops->add_norm(norm, lane);
  rank.comm->rank_barrier();
}

void norm_and_route(RankContext& rank, const LayerWeights& layer, const AddNormArgs& norm, const Lane& lane) {
  const RouteArgs route = route_args(rank, layer, norm.rows);
  if (rank.ops->norm_route != nullptr) return rank.ops->norm_route({norm, route, {}}, lane);
  norm_rows(rank, norm, lane);
  rank.ops->route(route, lane);
}

void group_rows(RankContext& rank, const LayerWeights& layer, Range rows, Range own, const Lane& lane) {
  rank.ops->group_experts(group_args(rank, layer, rows, own), lane);
}

void norm_route_and_group(RankContext& rank, const LayerWeights& layer, const AddNormArgs& norm, const Lane& lane) {
  const Range rows = norm.rows;
  if (rank.ops->norm_route != nullptr) return rank.ops->norm_route({norm, route_args(rank, layer, rows), group_args(rank, layer, rows, rows)}, lane);
  norm_and_route(rank, layer, norm, lane);
  rank.comm->rank_barrier();
  group_rows(rank, layer, rows, rows, lane);
}

void run_experts(RankContext& rank, const LayerWeights& layer, Range rows, Accumulator sum, const Lane& lane) {
  const RankBuffers& b = *rank.buffers;
  rank.comm->rank_barrier();  // the pairs before every thread's use of them
  ExpertsArgs args;
  args.hidden = rank.hidden;
  args.neurons_per_cut = layer.neurons_per_cut;
  args.num_cuts = layer.num_cuts;
  args.num_experts = layer.num_local_experts;
  args.begins = b.begins;
  args.cuts = layer.cuts;
  args.max_pairs = rows.size() * (layer.dense() ? 1 : rank.rule.choices());
  args.pair_rows = b.pair_rows;
  args.pair_weights = b.pair_weights;
  args.x = b.x;
  args.act = b.act;
  args.rows = rows;
  args.out = b.sums[static_cast<int>(sum)];
  args.out.scale = layer.mlp_scale;
  rank.ops->experts_gate_up(args, lane);
  rank.comm->rank_barrier();  // act before its reading by columns
  rank.ops->experts_down(args, lane);
}

}  // namespace moebius
