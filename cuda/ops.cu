#include "cuda/ops.h"

#include <algorithm>

#include "cuda/attention.h"
#include "cuda/choose.h"
#include "cuda/dense.h"
#include "cuda/products.h"
#include "cuda/reshard.h"
#include "cuda/route.h"
#include "cuda/rows.h"

namespace moebius::cuda {
namespace {

size_t scratch_bytes(const OpLimits& limits) {
  return std::max({scratch_bytes_attention(limits), scratch_bytes_route(limits), limits.row_major ? kDenseScratch : 0});
}

}  // namespace

const Ops& ops() {
  static constexpr Ops table{.name = "cuda",
                             .scratch_bytes = scratch_bytes,
                             .embed = embed,
                             .add_norm = add_norm,
                             .linear = linear,
                             .rope_store = rope_store,
                             .attention = attention,
                             .exact_linear = exact_linear,
                             .route = route,
                             .group_experts = group_experts,
                             .experts_gate_up = experts_gate_up,
                             .experts_down = experts_down,
                             .pick_rows = pick_rows,
                             .clear = clear,
                             .choose_tokens = choose_tokens,
                             .add_partials = add_partials,
                             .fetch_rows = fetch_rows,
                             .copy_pages = copy_pages,
                             .arg_max = nullptr,
                             .exp_sum = nullptr,
                             .probe_read = nullptr,
                             .probe_dot = nullptr};
  return table;
}

}  // namespace moebius::cuda
