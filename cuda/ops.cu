#include "cuda/ops.h"

#include <algorithm>

#include "cuda/attention.h"
#include "cuda/choose.h"
#include "cuda/dense.h"
#include "cuda/products.h"
#include "cuda/reshard.h"
#include "cuda/route.h"
#include "cuda/rows.h"
#include "cuda/scratch.h"
#include "cuda/turn.h"

namespace moebius::cuda {
namespace {

size_t scratch_bytes(const OpLimits& limits) {
  return kCounterBytes + std::max({scratch_bytes_attention(limits), scratch_bytes_route(limits), limits.row_major ? kDenseScratch : 0});
}

template <auto op, class Args>
void in_turn(const Args& args, const Lane& lane) {
  const Turn turn;
  op(args, lane);
}

}  // namespace

const Ops& ops() {
  static constexpr Ops table{.name = "cuda",
                             .scratch_bytes = scratch_bytes,
                             .act_bytes = [](int64_t pairs, int64_t width) { return pairs * width * int64_t{sizeof(bf16)}; },
                             .embed = in_turn<embed>,
                             .add_norm = in_turn<add_norm>,
                             .linear = in_turn<linear>,
                             .rope_store = in_turn<rope_store>,
                             .attention = in_turn<attention>,
                             .exact_linear = in_turn<exact_linear>,
                             .route = in_turn<route>,
                             .group_experts = in_turn<group_experts>,
                             .experts_gate_up = in_turn<experts_gate_up>,
                             .experts_down = in_turn<experts_down>,
                             .pick_rows = in_turn<pick_rows>,
                             .clear = [](void* to, size_t bytes, const Lane& lane) {
                               const Turn turn;
                               clear(to, bytes, lane);
                             },
                             .choose_tokens = in_turn<choose_tokens>,
                             .add_partials = in_turn<add_partials>,
                             .fetch_rows = in_turn<fetch_rows>,
                             .copy_pages = in_turn<copy_pages>,
                             .norm_linear = in_turn<norm_linear>,
                             .rope_attention = in_turn<rope_attention>,
                             .norm_route = in_turn<norm_route>,
                             .arg_max = nullptr,
                             .exp_sum = nullptr,
                             .probe_read = nullptr,
                             .probe_dot = nullptr};
  return table;
}

}  // namespace moebius::cuda
