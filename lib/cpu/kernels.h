// The table of one kernel path. Included last by the path's translation unit.
#pragma once

#include "lib/cpu/attention.h"
#include "lib/cpu/products.h"
#include "lib/cpu/rows.h"

namespace MOEBIUS_ISA {

size_t scratch_bytes(const OpLimits& l) {
  const int64_t heads = l.num_heads * l.head_dim, width = l.hidden > heads ? l.hidden : heads;
  int64_t bytes = laid_bytes(l.max_rows, div_up(width, 2));  // gathered rows
  for (const int64_t other : {attention_scratch_bytes(l.head_dim), (kRouterRows + 1) * (round_up(l.num_experts, kTile) + kTile) * 4, l.head_dim * 12})
    bytes = other > bytes ? other : bytes;
  return static_cast<size_t>(bytes);
}

int64_t act_bytes(int64_t pairs, int64_t width) { return laid_bytes(pairs, width / 2); }

uint64_t probe_read(const void* data, size_t bytes) {
  // Four streams, as a product reads its tiles; loads kept alive by a sum.
  const float* p = static_cast<const float*>(data);
  const size_t quarter = bytes / 16 / 16 * 16;  // floats, a multiple of 16
  F a = Vec::zero(), b = a, c = a, d = a;
  for (size_t i = 0; i + 16 <= quarter; i += 16) {
    a = Vec::max(Vec::load(p + i), a);
    b = Vec::max(Vec::load(p + quarter + i), b);
    c = Vec::max(Vec::load(p + 2 * quarter + i), c);
    d = Vec::max(Vec::load(p + 3 * quarter + i), d);
    __builtin_prefetch(p + i + 512);
    __builtin_prefetch(p + quarter + i + 512);
    __builtin_prefetch(p + 2 * quarter + i + 512);
    __builtin_prefetch(p + 3 * quarter + i + 512);
  }
  const float most = Vec::max_of(Vec::max(Vec::max(a, b), Vec::max(c, d)));
  return __builtin_bit_cast(uint32_t, most);
}

// Dot products whose operands stay in registers: nothing but the arithmetic.
template <class V>
double probe_dot(int64_t iterations) {
  if constexpr (V::kMatrix) return V::probe(iterations);
  constexpr int kChains = Vec::kRows >= 12 ? 16 : 4;  // enough to hide the latency, few enough for the registers
  constexpr int64_t kPairs = 512;
  alignas(64) bf16 w[2 * kTile];
  Pair rows[4];
  Laid x[4];
  for (int i = 0; i < 2 * kTile; ++i) w[i] = static_cast<bf16>(0x3c00 + i);
  for (int r = 0; r < 4; ++r) rows[r] = 0x3c003c00u + static_cast<uint32_t>(r);
  Vec::interleave(x, 4, 1, [&](int64_t r) { return rows + r; });
  F acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = Vec::set1(static_cast<float>(c));  // equal chains would be made one
  const Vec::W tile = Vec::load_w(w);
  Vec::A a[4] = {Vec::load_a(x), Vec::load_a(x + 1), Vec::load_a(x + 2), Vec::load_a(x + 3)};
  for (int64_t i = 0; i < iterations * kPairs; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = Vec::dot(acc[c], tile, a[Vec::kFewRegisters ? 0 : c % 4]);
  }
  float keep = 0;
  for (int c = 0; c < kChains; ++c) keep += Vec::sum(acc[c]);
  asm volatile("" ::"r"(&keep) : "memory");
  return static_cast<double>(iterations * kPairs) * kChains * kTile * 2 * 2;
}

const Ops& ops() {
  static constexpr Ops table{.name = MOEBIUS_ISA_NAME,
                             .scratch_bytes = scratch_bytes,
                             .act_bytes = act_bytes,
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
                             .choose_tokens = nullptr,
                             .add_partials = nullptr,
                             .fetch_rows = nullptr,
                             .copy_pages = nullptr,
                             .norm_linear = nullptr,
                             .rope_attention = nullptr,
                             .norm_route = nullptr,
                             .arg_max = arg_max,
                             .exp_sum = exp_sum,
                             .probe_read = probe_read,
                             .probe_dot = probe_dot<Vec>};
  return table;
}

}  // namespace MOEBIUS_ISA
