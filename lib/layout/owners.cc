#include "lib/layout/owners.h"

#include <algorithm>
#include <bit>

#include "lib/base/error.h"

namespace moebius {
namespace {

// First group of each rank, by floor; [ranks + 1].
std::vector<int> floor_bounds(int groups, int ranks) {
  std::vector<int> first(static_cast<size_t>(ranks) + 1, groups);
  for (int a = groups - 1; a >= 0; --a) first[static_cast<size_t>(a * ranks / groups)] = a;
  return first;
}

int kv_heads_in(const SliceTable& t, int begin, int end) {
  return end <= begin ? 0 : t.kv_head_of_group(end - 1) - t.kv_head_of_group(begin) + 1;
}

int most_kv_heads(const SliceTable& t, const std::vector<int>& first) {
  int most = 0;
  for (size_t r = 0; r + 1 < first.size(); ++r) most = std::max(most, kv_heads_in(t, first[r], first[r + 1]));
  return most;
}

// Runs of groups with at most `limit` KV heads each and at least one group; as even as the limit allows. Empty: impossible.
std::vector<int> deal(const SliceTable& t, int groups, int ranks, int limit) {
  std::vector<int> first{0};
  for (int r = 0; r < ranks; ++r) {
    const int begin = first.back(), later = ranks - r - 1;
    int end = begin + 1;
    const int wanted = (r + 1) * groups / ranks;
    while (end < groups - later && kv_heads_in(t, begin, end + 1) <= limit &&
           (end < wanted || (groups - end > 0 && later == 0)))
      ++end;
    // The rest must fit into the later ranks.
    const auto rest_fits = [&](int from) {
      int used = 0;
      for (int at = from; at < groups; ++used) {
        const int start = at;
        while (at < groups && kv_heads_in(t, start, at + 1) <= limit) ++at;
      }
      return used <= later;
    };
    while (!rest_fits(end) && end < groups - later && kv_heads_in(t, begin, end + 1) <= limit) ++end;
    if (!rest_fits(end)) return {};
    first.push_back(end);
  }
  return first;
}

std::vector<int> head_group_bounds(const SliceTable& t, int ranks) {
  const int groups = t.counts().head_groups;
  const std::vector<int> by_floor = floor_bounds(groups, ranks);
  for (int limit = 1; limit < most_kv_heads(t, by_floor); ++limit)
    if (const std::vector<int> better = deal(t, groups, ranks, limit); !better.empty()) return better;
  return by_floor;
}

RankSet all(int ranks) { return ranks == 64 ? ~RankSet{0} : (RankSet{1} << ranks) - 1; }

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
        case SliceKind::kAttentionGroup: owners.push_back(of_group[static_cast<size_t>(s.index)]); break;
        case SliceKind::kKvProjection: owners.push_back(out.kv_heads[static_cast<size_t>(s.index)]); break;
        default: owners.push_back(RankSet{1} << (s.cut * ranks / counts.cuts)); break;
      }
  }
  return out;
}

Owners ep_owners(const SliceTable& table, int ranks, const std::vector<std::vector<int>>& placement) {
  check_ranks(table.model(), table.counts(), ranks);
  Owners out{ranks, Layout::kEp, {}, std::vector<RankSet>(static_cast<size_t>(table.model().num_kv_heads), all(ranks))};
  for (int l = 0; l < table.num_layers(); ++l) {
    const int experts = table.model().mlps[static_cast<size_t>(l)].num_experts;
    const auto rank_of = [&](int e) {
      if (placement.empty()) return e * ranks / experts;
      const std::vector<int>& of_layer = placement[static_cast<size_t>(l)];
      const int rank = static_cast<size_t>(e) < of_layer.size() ? of_layer[static_cast<size_t>(e)] : -1;
      if (rank < 0 || rank >= ranks) fail(Code::kInvalidArgument, "placement of expert {} in layer {} is rank {} of {}", e, l, rank, ranks);
      return rank;
    };
    std::vector<RankSet>& owners = out.slices.emplace_back();
    for (const Slice& s : table.layer(l))
      owners.push_back(s.kind == SliceKind::kExpertCut ? RankSet{1} << rank_of(s.index) : all(ranks));
  }
  return out;
}

}  // namespace moebius
