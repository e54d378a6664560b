#include "lib/runtime/workspace.h"

#include <bit>

namespace moebius {

int64_t Workspace::lay_out(const WorkspaceShape& s, std::byte* base) {
  int64_t at = 0;
  const auto take = [&]<class T>(T*& pointer, int64_t count) {
    pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  };
  RankBuffers& b = buffers;
  b.max_rows = s.max_rows;
  const int64_t q_width = s.num_heads * s.head_dim, kv_width = s.num_kv_heads * s.head_dim;
  take(b.h, s.max_rows * s.hidden);
  if (s.two_residuals) take(b.h_other, s.max_rows * s.hidden);
  take(b.x, s.max_rows * s.hidden);
  take(b.x_float, s.max_rows * s.hidden);
  take(b.qkv, s.max_rows * (q_width + 2 * kv_width));
  take(b.q, s.max_rows * q_width);
  take(b.attention, s.max_rows * q_width);
  take(b.expert_ids, s.max_rows * s.choices);
  take(b.expert_weights, s.max_rows * s.choices);
  take(b.begins, s.all_experts + 2);  // a dense MLP counts as one
  take(b.pair_rows, s.max_pairs);
  take(b.pair_weights, s.max_pairs);
  take(b.act, s.max_act_bytes);
  take(b.head_x, s.max_logit_rows * s.hidden);
  for (int i = 0; i < kNumAccumulators; ++i) {
    ExactSum& sum = b.sums[i];
    take(sum.sum, s.max_rows * s.hidden);
    // |c·scale| < 2^62 ÷ addends: no sum of that many can pass 2^62.
    const int64_t addends = i == static_cast<int>(Accumulator::kAttention) ? s.attention_addends : s.mlp_addends;
    sum.limit = 0x1p62f / static_cast<float>(std::bit_ceil(static_cast<uint64_t>(addends)));
    sum.plain = s.plain_sums;
  }
  take(b.step_state, 0);
  const int64_t state_begin = at;
  for (ExactSum& sum : b.sums) take(sum.flags, s.max_rows);
  take(b.experts_reached, 1);
  b.step_state_bytes = at - state_begin;
  take(logits_, s.max_logit_rows * s.logit_columns);
  take(shares_, s.collected_rows * s.logit_columns);
  take(chosen_, s.logit_columns > 0 ? s.max_logit_rows : 0);
  at = round_up(at, 256);  // what cuBLASLt asks of its workspace
  scratch_stride_ = static_cast<size_t>(round_up(static_cast<int64_t>(s.scratch_bytes), 4096));
  take(scratch_, static_cast<int64_t>(scratch_stride_) * s.threads);
  return at;
}

}  // namespace moebius
