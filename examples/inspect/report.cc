#include "examples/inspect/report.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

namespace moebius::inspect {

using json = nlohmann::ordered_json;

namespace {

const char* name_of(SliceKind kind) {
  switch (kind) {
    case SliceKind::kExpertCut: return "expert cut";
    case SliceKind::kSharedCut: return "shared cut";
    case SliceKind::kDenseCut: return "dense cut";
    case SliceKind::kAttentionGroup: return "attention group";
    case SliceKind::kKvProjection: return "K/V projection";
  }
  return "";
}

template <class Use>
void for_each_slice(const SliceTable& table, Use&& use) {
  for (int l = 0; l < table.num_layers(); ++l)
    for (size_t i = 0; i < table.layer(l).size(); ++i) use(table.layer(l)[i], l, static_cast<int>(i));
}

json rank_row(const ArenaPlan& arena, int rank, int page_tokens) {
  int64_t moving[2] = {};
  for_each_slice(arena.table(), [&](const Slice& slice, int layer, int i) {
    if (arena.kept(rank, layer, i)) return;
    for (Layout layout : kLayouts)
      if (arena.slice_offset(rank, layout, layer, i) >= 0) moving[static_cast<int>(layout)] += slice.bytes;
  });
  json row = {{"rank", rank}, {"arena_bytes", arena.arena_bytes(rank)}, {"kept_bytes", arena.kept_bytes(rank)}, {"lead_bytes", arena.lead(rank)}};
  for (Layout layout : kLayouts) {
    const int64_t pages = arena.pages(rank, layout);
    const std::string name = moebius::name_of(layout);
    row[name + "_moving_bytes"] = moving[static_cast<int>(layout)];
    row[name + "_kv_bytes"] = pages * arena.kv_page_bytes(rank, layout) * arena.num_layers();
    row[name + "_tokens"] = pages * page_tokens;
  }
  return row;
}

}  // namespace

json slices_by_kind(const SliceTable& table) {
  std::map<std::pair<SliceKind, int64_t>, int64_t> counts;
  for_each_slice(table, [&](const Slice& slice, int, int) { ++counts[{slice.kind, slice.bytes}]; });
  json out = json::array();
  for (const auto& [slice, count] : counts)
    out.push_back({{"kind", name_of(slice.first)}, {"count", count}, {"bytes_each", slice.second}, {"bytes", count * slice.second}});
  return out;
}

json rank_rows(const ArenaPlan& arena, int page_tokens) {
  json rows = json::array();
  for (int r = 0; r < arena.ranks(); ++r) rows.push_back(rank_row(arena, r, page_tokens));
  return rows;
}

json memory_report(const MemoryPlan& plan, const json& ranks) {
  const auto most = [&](const char* key) {
    int64_t out = 0;
    for (const json& row : ranks) out = std::max(out, row[key].get<int64_t>());
    return out;
  };
  int64_t layer = 0, ep_tokens = 0;
  for (int r = 0; r < plan.arena.ranks(); ++r)
    for (int l = 0; l < plan.arena.num_layers(); ++l)
      for (Layout layout : kLayouts) layer = std::max(layer, plan.arena.item_range(r, layout, l).size());
  for (const json& row : ranks) ep_tokens += row["ep_tokens"].get<int64_t>();
  return {{"arena_bytes", most("arena_bytes")},
          {"kept_bytes", most("kept_bytes")},
          {"lead_bytes", most("lead_bytes")},
          {"lead_percent", 100.0 * static_cast<double>(most("lead_bytes")) / static_cast<double>(most("arena_bytes"))},
          {"workspace_bytes", plan.workspace_bytes},
          {"shared_bytes", plan.shared_bytes},
          {"layer_bytes", layer},
          {"tp_tokens", ranks[0]["tp_tokens"]},
          {"ep_tokens", ep_tokens}};
}

json switch_row(const MemoryPlan& plan, Layout to, int page_tokens) {
  const TransferPlan& weights = to == Layout::kTp ? plan.to_tp : plan.to_ep;
  const int ranks = plan.arena.ranks();
  int64_t bytes = 0, changed = 0;
  for (int home = 0; home < ranks; ++home)
    for (int layer = 0; layer < plan.arena.num_layers(); ++layer)
      for (int rank = 0; rank < ranks; ++rank)
        for_each_kv_block(plan.arena, to, layer, rank, PagePair{home, home, 0}, [&](const BlockCopy& copy, bool local) {
          bytes += copy.bytes;
          if (!local) changed += copy.bytes;
        });
  const double tokens = static_cast<double>(ranks) * page_tokens;
  return {{"from", moebius::name_of(other(to))},
          {"to", moebius::name_of(to)},
          {"weight_bytes", weights.bytes},
          {"weight_bytes_changed", weights.bytes},
          {"kv_bytes_per_token", static_cast<double>(bytes) / tokens},
          {"kv_bytes_changed_per_token", static_cast<double>(changed) / tokens}};
}

}  // namespace moebius::inspect
