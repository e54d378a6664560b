// Where one rank finds its slices of one layer in one layout: the offset tables that kernels reach weights through.
// Made once at start-up for both layouts; a switch changes none of them, an update of the weights only the scales.
#pragma once

#include <cstdint>
#include <vector>

#include "lib/device/ops.h"

namespace moebius {

struct LayerWeights {
  // Attention: this rank's head groups, in order; local query heads are numbered group by group.
  int32_t num_heads = 0;                    // local query heads
  std::vector<const bf16*> q;               // [local groups] packed, n = heads_per_group·head_dim, k = hidden
  std::vector<ExactLinearPart> o;           // [local groups]
  std::vector<const bf16*> k, v;            // [local KV heads] packed, n = head_dim, k = hidden
  std::vector<Range> heads_of_kv;           // [local KV heads] local query heads
  KvView kv;
  // MLP: num_cuts cuts of each local expert, shared ones last (a dense MLP is one expert that every row chose).
  int64_t neurons_per_cut = 0;
  int32_t num_cuts = 0;
  int32_t num_local_experts = 0;
  const bf16* const* cuts = nullptr;        // [num_local_experts · num_cuts] in the rank's memory
  const int32_t* local_of_expert = nullptr; // [all experts] local number or −1, in the rank's memory; null: dense
  // Replicated (shared read-only by ranks of one process).
  const float* input_norm = nullptr;        // [hidden]
  const float* post_attention_norm = nullptr;
  const float* q_norm = nullptr;            // [head_dim] or null
  const float* k_norm = nullptr;
  const float* q_bias = nullptr;            // [num_heads·head_dim], k_bias and v_bias [local KV heads·head_dim]; all of them or null
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
  const bf16* router = nullptr;             // as RouteArgs::w
  const float* router_bias = nullptr;       // [num_experts] or null
  float value_scale = 1;                    // of V in the KV cache; a power of two, a property of the layer
  // Fixed-point scales of the two exact sums; a property of the layer.
  float attention_scale = 1, mlp_scale = 1;

  bool dense() const { return local_of_expert == nullptr; }
};

}  // namespace moebius
