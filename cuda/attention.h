// Causal attention over paged KV, decode and prefill by one arithmetic. head_dim: a multiple of 8, at most 256.
#pragma once

#include "lib/device/ops.h"

namespace moebius::cuda {

void attention(const AttentionArgs& args, const Lane& lane);
void rope_attention(const RopeAttentionArgs& args, const Lane& lane);
size_t scratch_bytes_attention(const OpLimits& limits);

}  // namespace moebius::cuda
