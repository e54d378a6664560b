#include "lib/layout/slices.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "lib/base/error.h"
#include "lib/tensor/packed.h"

namespace moebius {
namespace {

// Below this a cut's down product is too short for the conversion of its sums (docs/numerics.md).
constexpr int kMinNeuronsOfEight = 96;

bool divides_all(const ModelShape& model, int cuts) {
  return std::all_of(model.mlps.begin(), model.mlps.end(), [&](const MlpShape& m) { return m.intermediate % cuts == 0; });
}

int default_cuts(const ModelShape& model) {
  const bool wide =
      std::all_of(model.mlps.begin(), model.mlps.end(), [](const MlpShape& m) { return m.intermediate / 8 >= kMinNeuronsOfEight; });
  for (int cuts = wide ? 8 : 4; cuts > 1; cuts /= 2)
    if (divides_all(model, cuts)) return cuts;
  return 1;
}

constexpr int kUnlimited = std::numeric_limits<int>::max();

// Of the sparse layers; a model without experts is not limited by them.
int fewest_experts(const ModelShape& model) {
  int fewest = kUnlimited;
  for (const MlpShape& m : model.mlps)
    if (m.num_experts > 0) fewest = std::min(fewest, m.num_experts);
  return fewest;
}

// The smallest setting with S ≥ ranks; A ≥ min(S, query heads) follows.
std::string setting_that_helps(const ModelShape& model, int ranks) {
  int widths = 0;  // what S may divide
  for (const MlpShape& m : model.mlps) widths = std::gcd(widths, m.intermediate);
  const int most = std::min({widths, model.num_heads, fewest_experts(model), kMaxRanks});
  for (int cuts = ranks; ranks <= most && cuts <= widths; ++cuts)
    if (widths % cuts == 0) return fmt::format("slices_per_expert {} allows it", cuts);
  return fmt::format("no slices_per_expert allows them: it must divide MLPs of {} neurons, and {} query heads limit them too", widths,
                     model.num_heads);
}

int head_groups(const ModelShape& model, int cuts) {
  const int least = std::min(cuts, model.num_heads);
  for (int a = model.num_kv_heads; a < model.num_heads; a += model.num_kv_heads)
    if (a >= least && model.num_heads % a == 0) return a;
  return model.num_heads;
}

}  // namespace

SliceCounts slice_counts(const ModelShape& model, int slices_per_expert) {
  if (model.num_kv_heads < 1 || model.num_heads < 1 || model.num_heads % model.num_kv_heads != 0)
    fail(Code::kInvalidArgument, "{} query heads cannot share {} KV heads evenly", model.num_heads, model.num_kv_heads);
  if (slices_per_expert < 0)
    fail(Code::kInvalidArgument, "slices_per_expert is {}, must be 1 or more (0: by the model)", slices_per_expert);
  const int cuts = slices_per_expert > 0 ? slices_per_expert : default_cuts(model);
  for (size_t l = 0; l < model.mlps.size(); ++l)
    if (model.mlps[l].intermediate < 1 || model.mlps[l].intermediate % cuts != 0)
      fail(Code::kInvalidArgument, "slices_per_expert {} does not divide the {} neurons of layer {}", cuts, model.mlps[l].intermediate, l);
  return {cuts, head_groups(model, cuts)};
}

void check_ranks(const ModelShape& model, SliceCounts counts, int ranks) {
  if (ranks < 1) fail(Code::kInvalidArgument, "{} ranks: at least 1 is needed", ranks);
  const int experts = fewest_experts(model);
  const int most = std::min({counts.cuts, counts.head_groups, experts, kMaxRanks});
  if (ranks <= most) return;
  fail(Code::kInvalidArgument,
       "{} ranks are too many: a model with {} slices per expert, {} head groups and {} can be divided over at most {}; {}", ranks,
       counts.cuts, counts.head_groups, experts == kUnlimited ? "no experts" : fmt::format("{} experts", experts), most,
       setting_that_helps(model, ranks));
}

SliceTable::SliceTable(const ModelShape& model, SliceCounts counts) : model_(model), counts_(counts) {
  SliceBytes bytes;
  bytes.attention_group = AttentionGroup{model.num_heads / counts.head_groups, model.head_dim, model.hidden}.bytes();
  bytes.kv_projection = KvProjection{model.head_dim, model.hidden}.bytes();
  for (int l = 0; l < model.num_layers(); ++l) {
    bytes.expert_cut = bytes.dense_cut = MlpCut{model.mlps[static_cast<size_t>(l)].intermediate / counts.cuts, model.hidden}.bytes();
    add_layer(l, bytes);
  }
}

SliceTable::SliceTable(const ModelShape& model, SliceCounts counts, const SliceBytes& bytes) : model_(model), counts_(counts) {
  for (int l = 0; l < model.num_layers(); ++l) add_layer(l, bytes);
}

void SliceTable::add_layer(int l, const SliceBytes& bytes) {
  const MlpShape& mlp = model_.mlps[static_cast<size_t>(l)];
  std::vector<Slice>& slices = layers_.emplace_back();
  for (int a = 0; a < counts_.head_groups; ++a) slices.push_back({SliceKind::kAttentionGroup, l, a, 0, bytes.attention_group});
  for (int h = 0; h < model_.num_kv_heads; ++h) slices.push_back({SliceKind::kKvProjection, l, h, 0, bytes.kv_projection});
  for (int e = 0; e < std::max(1, mlp.all_experts()); ++e) {
    const SliceKind kind = mlp.num_experts == 0 ? SliceKind::kDenseCut : e < mlp.num_experts ? SliceKind::kExpertCut : SliceKind::kSharedCut;
    for (int s = 0; s < counts_.cuts; ++s) slices.push_back({kind, l, e, s, kind == SliceKind::kDenseCut ? bytes.dense_cut : bytes.expert_cut});
  }
  for (const Slice& s : slices) MOEBIUS_ASSERT(s.bytes % 64 == 0);
}

}  // namespace moebius
