#include "lib/layout/owners.h"

#include <algorithm>
#include <bit>

#include "lib/base/error.h"
#include "lib/base/numbers.h"

namespace moebius {
namespace {

// Head groups are dealt in runs: rank r gets groups [first[r], first[r + 1]). A rank's limits:
struct Limits {
  int kv_heads, groups;
};

// One past the last group of the longest run that begins at `begin`; never falls as `begin` rises.
int run_end(const SliceTable& t, int begin, Limits limits) {
  const int groups = t.counts().head_groups, groups_per_kv_head = groups / t.model().num_kv_heads;
  if (begin >= groups) return groups;
  return std::min({groups, begin + limits.groups, (t.kv_head_of_group(begin) + limits.kv_heads) * groups_per_kv_head});
}

// first[ranks + 1] within the limits, each rank with a group or more and each bound as near to the floor deal as the limits
// let it be; empty when they cannot be kept.
std::vector<int> deal(const SliceTable& t, int ranks, Limits limits) {
  const int groups = t.counts().head_groups;
  std::vector<int> least(static_cast<size_t>(ranks) + 1, groups);  // the first group from which ranks r … can take all the rest
  for (size_t r = static_cast<size_t>(ranks); r-- > 0;) {
    least[r] = least[r + 1];
    while (least[r] > 0 && run_end(t, least[r] - 1, limits) >= least[r + 1]) --least[r];
  }
  if (least[0] > 0) return {};
  std::vector<int> first{0};
  for (int r = 1; r <= ranks; ++r) {
    const int by_floor = static_cast<int>(div_up(int64_t{r} * groups, ranks));  // the first a with ⌊a·P/A⌋ ≥ r
    const int low = std::max(least[static_cast<size_t>(r)], first.back() + 1);
    const int high = std::min(run_end(t, first.back(), limits), groups - (ranks - r));
    first.push_back(std::clamp(by_floor, low, high));
  }
  return first;
}

// The fewest KV heads on the fullest rank, then the fewest groups. The floor deal has the fewest groups, so it is the result
// wherever its KV heads are as few.
std::vector<int> head_group_bounds(const SliceTable& t, int ranks) {
  const int groups = t.counts().head_groups;
  Limits limits{static_cast<int>(div_up(t.model().num_kv_heads, ranks)), groups};
  while (deal(t, ranks, limits).empty()) ++limits.kv_heads;
  limits.groups = static_cast<int>(div_up(groups, ranks));
  for (;; ++limits.groups)
    if (std::vector<int> first = deal(t, ranks, limits); !first.empty()) return first;
}

RankSet all(int ranks) { return ranks == 64 ? ~RankSet{0} : (RankSet{1} << ranks) - 1; }

void check_placement(const ModelShape& model, int ranks, const std::vector<std::vector<int>>& placement) {
  if (placement.empty()) return;
  if (placement.size() != model.mlps.size())
    fail(Code::kInvalidArgument, "placement has {} layers, the model {}", placement.size(), model.mlps.size());
  for (size_t l = 0; l < placement.size(); ++l) {
    if (placement[l].size() != static_cast<size_t>(model.mlps[l].num_experts))
      fail(Code::kInvalidArgument, "placement of layer {} has {} experts, the model {}", l, placement[l].size(), model.mlps[l].num_experts);
    for (size_t e = 0; e < placement[l].size(); ++e)
      if (placement[l][e] < 0 || placement[l][e] >= ranks)
        fail(Code::kInvalidArgument, "placement of expert {} in layer {} is rank {} of {}", e, l, placement[l][e], ranks);
  }
}

}  // namespace

Owners tp_owners(const SliceTable& table, int ranks) {
  check_ranks(table.model(), table.counts(), ranks);
  const SliceCounts counts = table.counts();
  Owners out{ranks, Layout::kTp, {}, std::vector<RankSet>(static_cast<size_t>(table.model().num_kv_heads), 0)};
  std::vector<RankSet> of_group(static_cast<size_t>(counts.head_groups));
  const std::vector<int> first = head_group_bounds(table, ranks);
  for (int r = 0; r < ranks; ++r)
    for (int a = first[static_cast<size_t>(r)]; a < first[static_cast<size_t>(r) + 1]; ++a) {
      of_group[static_cast<size_t>(a)] = RankSet{1} << r;
      out.kv_heads[static_cast<size_t>(table.kv_head_of_group(a))] |= RankSet{1} << r;
    }
  for (int l = 0; l < table.num_layers(); ++l) {
    std::vector<RankSet>& owners = out.slices.emplace_back();
    for (const Slice& s : table.layer(l)) switch (s.kind) {
        case SliceKind::kAttentionGroup:
          owners.push_back(of_group[static_cast<size_t>(s.index)]);
          break;
        case SliceKind::kKvProjection:
          owners.push_back(out.kv_heads[static_cast<size_t>(s.index)]);
          break;
        default:
          owners.push_back(RankSet{1} << (s.cut * ranks / counts.cuts));
          break;
      }
  }
  return out;
}

Owners ep_owners(const SliceTable& table, int ranks, const std::vector<std::vector<int>>& placement) {
  check_ranks(table.model(), table.counts(), ranks);
  Owners out{ranks, Layout::kEp, {}, std::vector<RankSet>(static_cast<size_t>(table.model().num_kv_heads), all(ranks))};
  check_placement(table.model(), ranks, placement);
  for (int l = 0; l < table.num_layers(); ++l) {
    const int experts = table.model().mlps[static_cast<size_t>(l)].num_experts;
    const auto rank_of = [&](int e) {
      return placement.empty() ? e * ranks / experts : placement[static_cast<size_t>(l)][static_cast<size_t>(e)];
    };
    std::vector<RankSet>& owners = out.slices.emplace_back();
    for (const Slice& s : table.layer(l)) owners.push_back(s.kind == SliceKind::kExpertCut ? RankSet{1} << rank_of(s.index) : all(ranks));
  }
  return out;
}

}  // namespace moebius
