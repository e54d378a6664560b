#include "examples/bench/profile.h"

#include <array>
#include <atomic>
#include <chrono>

#include "lib/tensor/packed.h"

namespace moebius::bench {
namespace {

enum Op { kEmbed, kAddNorm, kProjections, kRopeStore, kAttention, kOutput, kRoute, kGateUp, kDown, kHead, kNumOps };
constexpr std::array<const char*, kNumOps> kNames = {"embed", "add and norm", "q, k, v",       "rope, kv store", "attention",
                                                     "o",     "route",        "experts gate, up", "experts down",   "lm head"};

struct Work {
  double bytes = 0, flops = 0;
};
Work operator+(Work a, Work b) { return {a.bytes + b.bytes, a.flops + b.flops}; }
Work product(double rows, double n, double k) { return {2 * n * k, 2 * rows * n * k}; }

// What an op reads and computes on one rank; activations are left out.
Work work_of(const LinearArgs& a) {
  Work w;
  for (int p = 0; p < a.num_parts; ++p) w = w + product(static_cast<double>(a.rows.size()), static_cast<double>(a.parts[p].n), static_cast<double>(a.k));
  return w;
}
Work work_of(const ExactLinearArgs& a) {
  return product(static_cast<double>(a.rows.size()), static_cast<double>(a.hidden), static_cast<double>(a.k * a.num_parts));
}
Work work_of(const RouteArgs& a) { return product(static_cast<double>(a.rows.size()), a.rule.num_experts, static_cast<double>(a.hidden)); }
Work work_of(const ExpertsArgs& a) {  // of one matrix of an expert; gate and up are two
  Work w;
  const double neurons = static_cast<double>(MlpCut{a.neurons_per_cut, a.hidden}.padded() * a.num_cuts);
  for (int e = 0; e < a.num_experts; ++e)
    if (const int32_t pairs = a.begins[e + 1] - a.begins[e]; pairs > 0) w = w + product(pairs, neurons, static_cast<double>(a.hidden));
  return w;
}
Work work_of(const AttentionArgs& a) {
  Work w;
  for (int c = 0; c < a.num_chunks; ++c) {
    const SequenceChunk& chunk = a.chunks[c];
    const double seen = chunk.first_position + chunk.num_rows, pairs = chunk.num_rows * (chunk.first_position + 0.5 * (chunk.num_rows + 1));
    w = w + Work{seen * a.kv.num_kv_heads * a.kv.head_dim * 4, pairs * a.num_heads * a.kv.head_dim * 4};
  }
  return w;
}
template <class Args>
Work work_of(const Args&) {
  return {};
}

struct Total {
  std::atomic<int64_t> nanoseconds{0}, bytes{0}, flops{0};
};
const Ops* base_ops = nullptr;
std::array<Total, kNumOps> totals;

template <class Args>
int kind_of(int op, const Args&) {
  return op;
}
int kind_of(int op, const LinearArgs& a) { return a.num_parts == 1 ? kHead : op; }

// A member of Ops as a function that calls the base's and adds its time, and once a rank its work.
template <int op, auto Member, class Args>
void timed(const Args& args, const Lane& lane) {
  const auto begin = std::chrono::steady_clock::now();
  (base_ops->*Member)(args, lane);
  const auto time = std::chrono::steady_clock::now() - begin;
  Total& total = totals[static_cast<size_t>(kind_of(op, args))];
  total.nanoseconds.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count(), std::memory_order_relaxed);
  if (lane.thread != 0) return;
  const Work work = work_of(args);
  const double times = op == kGateUp ? 2 : 1;
  total.bytes.fetch_add(static_cast<int64_t>(times * work.bytes), std::memory_order_relaxed);
  total.flops.fetch_add(static_cast<int64_t>(times * work.flops), std::memory_order_relaxed);
}

}  // namespace

const Ops& profiled(const Ops& base) {
  static Ops table;
  base_ops = &base;
  table = base;
  table.embed = timed<kEmbed, &Ops::embed, EmbedArgs>;
  table.add_norm = timed<kAddNorm, &Ops::add_norm, AddNormArgs>;
  table.linear = timed<kProjections, &Ops::linear, LinearArgs>;
  table.rope_store = timed<kRopeStore, &Ops::rope_store, RopeStoreArgs>;
  table.attention = timed<kAttention, &Ops::attention, AttentionArgs>;
  table.exact_linear = timed<kOutput, &Ops::exact_linear, ExactLinearArgs>;
  table.route = timed<kRoute, &Ops::route, RouteArgs>;
  table.group_experts = timed<kRoute, &Ops::group_experts, GroupArgs>;
  table.experts_gate_up = timed<kGateUp, &Ops::experts_gate_up, ExpertsArgs>;
  table.experts_down = timed<kDown, &Ops::experts_down, ExpertsArgs>;
  return table;
}

void reset_profile() {
  for (Total& t : totals) t.nanoseconds = 0, t.bytes = 0, t.flops = 0;
}

std::vector<OpProfile> profile() {
  std::vector<OpProfile> out;
  for (size_t i = 0; i < kNames.size(); ++i)
    out.push_back({kNames[i], static_cast<double>(totals[i].nanoseconds) * 1e-9, static_cast<double>(totals[i].bytes), static_cast<double>(totals[i].flops)});
  return out;
}

}  // namespace moebius::bench
