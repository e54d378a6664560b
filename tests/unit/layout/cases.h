// Random models, layouts and sizes for the tests of lib/layout, and a way to spoil finished plans.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "lib/layout/arena.h"
#include "lib/layout/transfer.h"
#include "lib/tensor/packed.h"
#include "tests/catch.h"

namespace moebius {

// Makes plans that the planner would never make.
struct ArenaSabotage {
  ArenaPlan& plan;

  // An item's whole region: its slices that are not kept, its KV pool and its bounds.
  void shift(int rank, Layout layout, int layer, int64_t by) {
    const auto w = static_cast<size_t>(layout), l = static_cast<size_t>(layer);
    auto& r = plan.ranks_[static_cast<size_t>(rank)];
    r.items[w][l] = {r.items[w][l].begin + by, r.items[w][l].end + by};
    r.kv[w][l] += by;
    for (size_t i = 0; i < r.offsets[w][l].size(); ++i)
      if (r.offsets[w][l][i] >= 0 && !plan.kept(rank, layer, static_cast<int>(i))) r.offsets[w][l][i] += by;
  }
  void wrong_lead(int rank, int64_t by) {
    for (int l = 0; l < plan.num_layers(); ++l) shift(rank, Layout::kEp, l, by);
  }
  int64_t& offset(int rank, Layout layout, int layer, int slice) {
    auto& offsets = plan.ranks_[static_cast<size_t>(rank)].offsets[static_cast<size_t>(layout)];
    return offsets[static_cast<size_t>(layer)][static_cast<size_t>(slice)];
  }
  int64_t& kv_offset(int rank, Layout layout, int layer) {
    return plan.ranks_[static_cast<size_t>(rank)].kv[static_cast<size_t>(layout)][static_cast<size_t>(layer)];
  }
  int64_t& arena_bytes(int rank) { return plan.ranks_[static_cast<size_t>(rank)].bytes; }
  std::vector<int>& kv_heads(int rank, Layout layout) {
    return plan.ranks_[static_cast<size_t>(rank)].kv_heads[static_cast<size_t>(layout)];
  }
};

namespace layout_test {

struct Random {
  std::mt19937_64 engine;
  int below(int n) { return static_cast<int>(engine() % static_cast<uint64_t>(n)); }
  int from(int low, int high) { return low + below(high - low + 1); }
  bool once_in(int n) { return below(n) == 0; }
};

// MOEBIUS_SEED, or else always the same.
inline uint64_t seed() {
  const char* text = std::getenv("MOEBIUS_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 20241124;
}

inline constexpr int kThinned = kSanitized ? 8 : 1;  // one case of so many runs

// Runs body(random) `cases` times, each with a generator of its own; context names the case in a failure.
template <class F>
void repeat(int cases, F&& body) {
  cases /= kThinned;
  fmt::print("MOEBIUS_SEED={}: {} random cases\n", seed(), cases);
  for (int i = 0; i < cases; ++i) {
    INFO("MOEBIUS_SEED=" << seed() << ", case " << i);
    Random random{std::mt19937_64(seed() * 1000003 + static_cast<uint64_t>(i))};
    body(random);
  }
}

inline ModelShape model_of(int hidden, int heads, int kv, int dim, std::vector<MlpShape> mlps) {
  return {hidden, heads, kv, dim, std::move(mlps)};
}

struct Case {
  ModelShape model;
  SliceCounts counts;
  int ranks = 1;
  std::vector<std::vector<int>> placement;  // [layer][expert] → rank, or empty
  int64_t kv_slice = 0, tp_pages = 0;
  std::vector<int64_t> ep_pages;  // [rank]

  SliceTable table() const { return SliceTable(model, counts); }
};

// Dense and sparse layers of unequal widths and numbers of experts, any P that is accepted (KV replicas and unequal ranks
// among them), a placement by floor or at random, pages from none on.
inline Case random_case(Random& random) {
  constexpr int kCuts[] = {1, 2, 3, 4, 5, 6, 8, 8, 8, 12, 16};
  Case c;
  const int kv = random.from(1, 8), heads = kv * random.from(1, 6), cuts = kCuts[random.below(11)], layers = random.from(1, 9);
  int fewest = 64;
  std::vector<MlpShape> mlps;
  for (int l = 0; l < layers; ++l) {
    const int experts = random.once_in(4) ? 0 : random.from(1, 12);
    mlps.push_back({experts, cuts * random.from(1, 24)});
    if (experts > 0) fewest = std::min(fewest, experts);
  }
  if (random.once_in(2))  // as models are: one number of experts
    for (MlpShape& m : mlps)
      if (m.num_experts > 0) m.num_experts = fewest = 12;
  c.model = model_of(2 * random.from(1, 32), heads, kv, 2 * random.from(1, 10), mlps);
  c.counts = slice_counts(c.model, cuts);
  c.ranks = random.from(1, std::min({c.counts.cuts, c.counts.head_groups, fewest}));
  if (random.once_in(3))
    for (const MlpShape& m : mlps) {
      c.placement.emplace_back();
      for (int e = 0; e < m.num_experts; ++e) c.placement.back().push_back(random.below(c.ranks));
    }
  c.kv_slice = KvSlice{16 * random.from(1, 3), c.model.head_dim}.bytes();
  c.tp_pages = random.below(30);
  for (int r = 0; r < c.ranks; ++r) c.ep_pages.push_back(random.once_in(8) ? 0 : random.below(30));
  return c;
}

inline ArenaPlan arena_of(const Case& c) {
  const SliceTable table = c.table();
  return plan_arena(table, tp_owners(table, c.ranks), ep_owners(table, c.ranks, c.placement), c.kv_slice, c.tp_pages, c.ep_pages);
}

// Two ranks, three sparse layers and a dense one.
inline Case plain_case() {
  Case c;
  c.model = model_of(64, 8, 2, 16, {{4, 64}, {4, 64}, {0, 128}, {4, 64}});
  c.counts = slice_counts(c.model, 4);
  c.ranks = 2;
  c.kv_slice = KvSlice{16, 16}.bytes();
  c.tp_pages = 7;
  c.ep_pages = {4, 5};
  return c;
}

// Eight ranks over two KV heads: four replicas of each.
inline Case replicated_case() {
  Case c = plain_case();
  c.model = model_of(64, 8, 2, 16, {{8, 64}, {8, 64}});
  c.counts = slice_counts(c.model, 8);
  c.ranks = 8;
  c.ep_pages.assign(8, 4);
  return c;
}

}  // namespace layout_test
}  // namespace moebius
