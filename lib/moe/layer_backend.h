// The two ways to run a layer over the same kernels. Which one a layer uses is the seam's choice, step by step.
//
// A backend says which rows of the step its rank works on, how the two sums of a layer become complete, and where the
// experts' inputs come from. Everything else is common (runtime/rank_executor.cc). All threads of a rank call each function.
#pragma once

#include "lib/comm/communicator.h"
#include "lib/device/device.h"
#include "lib/moe/layer_weights.h"

namespace moebius {

// One rank's buffers for a step, [max_rows, …] each, indexed by the step's row.
struct RankBuffers {
  int64_t max_rows = 0;
  float* h = nullptr;             // [max_rows, hidden] the residual stream,
  float* h_other = nullptr;       // and by turns here, where Ops::norm_linear is; else null
  bf16* x = nullptr;              // [max_rows, hidden] normed input of attention or MLP
  float* x_float = nullptr;       // [max_rows, hidden] the same before rounding (router)
  float* qkv = nullptr;           // q [max_rows, heads·head_dim], then k and v [max_rows, kv_heads·head_dim]
  bf16* q = nullptr;              // [max_rows, heads·head_dim]
  bf16* attention = nullptr;      // [max_rows, heads·head_dim]
  int32_t* expert_ids = nullptr;  // [max_rows, choices]
  float* expert_weights = nullptr;
  int32_t* begins = nullptr;      // [experts + 1] and
  int32_t* pair_rows = nullptr;   // [max_rows·choices] and
  float* pair_weights = nullptr;  // [max_rows·choices]: pairs grouped by local expert
  std::byte* act = nullptr;       // [max_rows·choices, local padded neurons] as Ops::act_bytes has it
  bf16* head_x = nullptr;         // [max_logit_rows, hidden]
  ExactSum sums[kNumAccumulators];               // by Accumulator; scale and limit are set per layer
  // Cleared when a step begins: the flags of all sums, and
  std::byte* step_state = nullptr;
  int64_t step_state_bytes = 0;
  int32_t* experts_reached = nullptr;            // local experts with rows, summed over layers
};

// What a backend needs of its rank.
struct RankContext {
  const Ops* ops = nullptr;
  Communicator* comm = nullptr;
  RankBuffers* buffers = nullptr;
  int64_t hidden = 0;
  RouteRule rule;
  Device* device = nullptr;
  int32_t* routes = nullptr;        // [layers, max_rows, top_k] of the host's, where rank 0 leaves every row's experts; else null
  const int32_t* tokens = nullptr;  // of a step that is filled up, whose rows of token −1 choose no experts; else null
};

class LayerBackend {
 public:
  // homes: [ranks] rows of each home; the step has num_rows rows.
  virtual Range rows(const RankContext& rank, const Range* homes, int64_t num_rows) const = 0;
  virtual PartialSums finish_attention(RankContext& rank, int64_t num_rows) const = 0;
  // Norm, router and experts (or dense MLP) for the norm's rows. homes as above.
  virtual PartialSums run_mlp(RankContext& rank, const LayerWeights& layer, const AddNormArgs& norm, const Range* homes, int64_t num_rows,
                              const Lane& lane) const = 0;

 protected:
  ~LayerBackend() = default;  // there are the two below, which nothing ends: a rank's thread may still be in a step when the process exits
};

const LayerBackend& tp_backend();
const LayerBackend& ep_backend();

// Pieces both use.
void norm_rows(RankContext& rank, const AddNormArgs& norm, const Lane& lane);  // for every thread of the rank
void norm_and_route(RankContext& rank, const LayerWeights& layer, const AddNormArgs& norm, const Lane& lane);
// By expert, or as one dense MLP; once every row's choices are there. own: the rows that go through shared experts here.
void group_rows(RankContext& rank, const LayerWeights& layer, Range rows, Range own, const Lane& lane);
// All of it, of the rank's own rows, where no choices of other ranks come between.
void norm_route_and_group(RankContext& rank, const LayerWeights& layer, const AddNormArgs& norm, const Lane& lane);
// Adds the MLP outputs of `rows`, which were grouped, into the sum, cleared over `rows` first.
void run_experts(RankContext& rank, const LayerWeights& layer, Range rows, Accumulator sum, const Lane& lane);

}  // namespace moebius
