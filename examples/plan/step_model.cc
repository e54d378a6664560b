#include "examples/plan/step_model.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "lib/layout/owners.h"
#include "lib/runtime/sequence.h"

namespace moebius::plan {
namespace {

// Kernels of a layer, as the engine's executor queues them (lib/runtime/rank_executor.cc): norm, Q/K/V, rotary and store, attention, O, norm with
// router, choice, grouping, gate-up, down; EP fetches rows besides. Exchanges have rounds of their own.
constexpr int kKernels[2] = {10, 11};
constexpr int kKernelsOfStep = 6;  // embedding, last norm, rows, LM head, choice of tokens, tables
// Passes over a row of hidden numbers in a layer: residual and norm twice (read, add, write, write), Q/K/V's input and O's output.
constexpr double kPasses = 10;

double most(const std::vector<RankSet>& owners, int ranks) {
  double fullest = 0;
  for (int r = 0; r < ranks; ++r) {
    double mine = 0;
    for (RankSet of : owners) mine += static_cast<double>(of >> r & 1);
    fullest = std::max(fullest, mine);
  }
  return fullest / static_cast<double>(owners.size());
}

}  // namespace

Work& Work::operator+=(const Work& o) {
  StepLoad::operator+=(o);
  logit_rows += o.logit_rows;
  window_kv_tokens += o.window_kv_tokens, window_attended += o.window_attended;
  return *this;
}

Work operator*(double n, const Work& w) {
  return {{n * w.rows, n * w.prompt_rows, n * w.kv_tokens, n * w.attended}, n * w.logit_rows, n * w.window_kv_tokens, n * w.window_attended};
}

StepModel::StepModel(const Model& model, const Cluster& cluster, int ranks, int slices_per_expert, const Routing& routing)
    : model_(model), cluster_(cluster), ranks_(ranks), routing_(routing), exchanges_(cluster, ranks) {
  // Owners are the same in every layer: one sparse layer says them.
  Model one = model;
  std::erase_if(one.config.shape.mlps, [](const MlpShape& mlp) { return mlp.num_experts == 0; });
  one.config.shape.mlps.resize(1);
  const SliceCounts counts = slice_counts(model.shape(), slices_per_expert);  // of all layers
  const SliceTable table = one.slices(counts.cuts);
  const Owners tp = tp_owners(table, ranks);
  const auto first = tp.slices[0].begin();
  heads_share_ = most({first, first + counts.head_groups}, ranks);
  keys_share_ = most(tp.kv_heads, ranks);
  const auto cuts = first + table.expert_cut(0, 0);
  cuts_share_ = most({cuts, cuts + counts.cuts}, ranks);
  for (int l = 0; l < model.num_layers(); ++l) {
    const int window = model.windows[static_cast<size_t>(l)];
    if (window > 0) window_ = window;
    ++layers_[model.shape().mlps[static_cast<size_t>(l)].num_experts > 0][window > 0];
  }
}

double StepModel::product(double bytes, double products) const {
  return std::max(bytes / (cluster_.memory_bandwidth * cluster_.efficiency.memory),
                  2 * products / (cluster_.matrix_flops * cluster_.efficiency.matrix));
}

// Of the rank that has so much of the heads and of the KV heads.
double StepModel::attention(const Work& w, double heads_share, double keys_share, bool windowed) const {
  const double projections_bytes = model_.heads.bytes * heads_share + model_.keys.bytes * keys_share;
  const double projections = model_.heads.products * heads_share + model_.keys.products * keys_share;
  const double kv_bytes = model_.kv_token_bytes * model_.shape().num_kv_heads * keys_share;
  return product(projections_bytes, w.rows * projections) +
         product((windowed ? w.window_kv_tokens : w.kv_tokens) * kv_bytes,
                 (windowed ? w.window_attended : w.attended) * model_.pair_products * heads_share) +
         product(2.0 * kPasses * w.rows * model_.shape().hidden, 0);
}

// all: of every home; most: of the rank that waits for nobody, which in TP has the rows of all.
StepSeconds StepModel::layer(Layout layout, bool sparse, bool windowed, const Work& all, const Work& most) const {
  const bool tp = layout == Layout::kTp;
  const double hidden = model_.shape().hidden, sums = cluster_.sum_bytes * hidden, top_k = model_.config.top_k;
  const double cut = tp ? cuts_share_ : 1;
  StepSeconds t;
  t.launches = cluster_.launch_s * kKernels[tp ? 0 : 1];
  t.attention = tp ? attention(all, heads_share_, keys_share_, windowed) : attention(most, 1, 1, windowed);
  if (tp) t.exchange += exchanges_.all_reduce(all.rows * sums);
  const Work& own = tp ? all : most;
  if (!sparse) {
    t.experts += product(model_.dense.bytes * cut, own.rows * model_.dense.products * cut);
    if (tp) t.exchange += exchanges_.all_reduce(all.rows * sums);
    return t;
  }
  t.experts += product(model_.router.bytes, own.rows * model_.router.products);
  if (model_.shared.bytes > 0) t.experts += product(model_.shared.bytes * cut, own.rows * model_.shared.products * cut);
  const Reached reached = routing_.at(all.rows);
  if (tp) {
    t.experts += product(reached.experts * model_.expert.bytes * cut, all.rows * top_k * model_.expert.products * cut);
    t.exchange += exchanges_.all_reduce(all.rows * sums);
    return t;
  }
  t.experts += product(reached.busiest * model_.expert.bytes, reached.busiest_rows * model_.expert.products);
  const double row = 2 * hidden + 8 * top_k;
  if (cluster_.all_to_all_s > 0) {
    // A row is sent once to each other rank that has one of its experts; the busiest rank gets more than its share.
    const double others = (ranks_ - 1) * (1 - std::pow(1 - 1.0 / ranks_, top_k)), skew = reached.busiest_rows * ranks_ / (all.rows * top_k);
    const double copies = std::max(most.rows, all.rows / ranks_ * skew) * others;
    t.exchange += exchanges_.all_to_all(0) + exchanges_.all_to_all(copies * row) + exchanges_.all_to_all(copies * sums);  // how many, rows, sums
  } else {
    const double least = std::max(0.0, (all.rows - most.rows) / std::max(1, ranks_ - 1));  // of some other home
    t.exchange += exchanges_.collect((all.rows - least) * row) + exchanges_.collect(most.rows * (ranks_ - 1) * sums);
  }
  return t;
}

StepSeconds StepModel::step(Layout layout, const StepWork& work) const {
  Work all, most;
  for (const Work& w : work) {
    all += w;
    most.rows = std::max(most.rows, w.rows);
    most.kv_tokens = std::max(most.kv_tokens, w.kv_tokens);
    most.attended = std::max(most.attended, w.attended);
    most.window_kv_tokens = std::max(most.window_kv_tokens, w.window_kv_tokens);
    most.window_attended = std::max(most.window_attended, w.window_attended);
  }
  StepSeconds t;
  if (all.rows == 0) return t;
  for (int sparse : {0, 1})
    for (int windowed : {0, 1}) {
      if (layers_[sparse][windowed] == 0) continue;
      const double n = layers_[sparse][windowed];
      const StepSeconds one = layer(layout, sparse != 0, windowed != 0, all, most);
      t.attention += n * one.attention;
      t.experts += n * one.experts;
      t.exchange += n * one.exchange;
      t.launches += n * one.launches;
    }
  // Divided by vocabulary in both layouts; in EP its rows are gathered first.
  if (layout == Layout::kEp) t.exchange += exchanges_.collect((all.rows - most.rows) * 2 * model_.shape().hidden);
  t.head = all.logit_rows > 0 ? product(model_.lm_head.bytes / ranks_, all.logit_rows * model_.lm_head.products / ranks_) : 0;
  t.launches += kKernelsOfStep * cluster_.launch_s;
  return t;
}

// `rows` rows of one sequence, the first of which has `first` tokens before it.
void StepModel::add_rows(Work& w, double first, double rows) const {
  const StepLoad load = StepLoad::of(first, rows);
  w.StepLoad::operator+=(load);
  const double window = window_ > 0 ? window_ : INFINITY;
  w.window_kv_tokens += std::min(load.kv_tokens, rows + window);
  w.window_attended += std::min(load.attended, rows * window);
}

StepWork StepModel::evenly(double requests, double first, double rows) const {
  StepWork work(static_cast<size_t>(ranks_));
  double left = requests;
  for (int h = 0; h < ranks_; ++h) {
    const double n = std::min(left, std::ceil(requests / ranks_));
    left -= n;
    Work one;
    add_rows(one, first, rows);
    one.logit_rows = 1;
    work[static_cast<size_t>(h)] = n * one;
  }
  return work;
}

StepWork StepModel::prefill(double first, double tokens) const {
  StepWork work(static_cast<size_t>(ranks_));
  add_rows(work[0], first, tokens);
  work[0].logit_rows = 1;
  return work;
}

// In TP the plan has all chunks under its first home.
StepWork StepModel::of(const StepPlan& plan, bool dealt) const {
  StepWork work(plan.shape.homes.size());
  for (size_t h = 0; h < work.size(); ++h)
    for (int64_t c = plan.shape.chunks_of_home[h].begin; c < plan.shape.chunks_of_home[h].end; ++c) {
      const ScheduledChunk& chunk = plan.chunks[static_cast<size_t>(c)];
      Work& home = work[dealt ? chunk.sequence->arrival % work.size() : h];
      add_rows(home, static_cast<double>(chunk.sequence->computed), chunk.num_rows);
      home.logit_rows += chunk.samples;
    }
  return work;
}

}  // namespace moebius::plan
