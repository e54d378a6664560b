#include "lib/layout/verify.h"

#include <algorithm>
#include <string>

#include "lib/base/error.h"

namespace moebius {
namespace {

struct Interval {
  int64_t begin, end;
  int item;     // −1: kept zone
  int what;     // slice number, −1: KV pool or a whole region
};

[[noreturn]] void overlap(int rank, const char* when, const Interval& a, const Interval& b) {
  fail(Code::kInternal, "arena of rank {} {}: item {} (part {}) at [{}, {}) overlaps item {} (part {}) at [{}, {})", rank, when, a.item,
       a.what, a.begin, a.end, b.item, b.what, b.begin, b.end);
}

// Sorts and looks at neighbours; empty intervals overlap nothing.
void require_disjoint(std::vector<Interval>& list, int rank, const char* when) {
  std::erase_if(list, [](const Interval& i) { return i.end <= i.begin; });
  std::sort(list.begin(), list.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < list.size(); ++i)
    if (list[i].begin < list[i - 1].end) overlap(rank, when, list[i - 1], list[i]);
}

void require_inside(int rank, const Interval& part, Range region, const char* of) {
  if (part.begin < region.begin || part.end > region.end)
    fail(Code::kInternal, "arena of rank {}: item {} (part {}) at [{}, {}) is outside the {} at [{}, {})", rank, part.item, part.what,
         part.begin, part.end, of, region.begin, region.end);
}

// Parts of one item of one layout: inside their region, disjoint, kept ones in the kept zone at the same place in both.
void verify_item(const ArenaPlan& arena, int rank, Layout layout, int layer, std::vector<Interval>& kept) {
  const Range region = arena.item_range(rank, layout, layer);
  const Range zone{0, arena.kept_bytes(rank)};
  std::vector<Interval> parts;
  for (size_t i = 0; i < arena.table().layer(layer).size(); ++i) {
    const int slice = static_cast<int>(i);
    const int64_t at = arena.slice_offset(rank, layout, layer, slice);
    const bool owned = (arena.owners(layout).slices[static_cast<size_t>(layer)][i] >> rank & 1) != 0;
    if (owned != (at >= 0)) fail(Code::kInternal, "rank {} layer {} slice {}: owned {} but offset {}", rank, layer, slice, owned, at);
    if (!owned) continue;
    const Interval part{at, at + arena.table().layer(layer)[i].bytes, layer, slice};
    if (arena.kept(rank, layer, slice)) {
      require_inside(rank, part, zone, "kept zone");
      if (at != arena.slice_offset(rank, other(layout), layer, slice))
        fail(Code::kInternal, "rank {} layer {}: kept slice {} has two places", rank, layer, slice);
      if (layout == Layout::kTp) kept.push_back(part);
    } else {
      require_inside(rank, part, region, "region of its item");
      parts.push_back(part);
    }
  }
  const int64_t kv = arena.kv_offset(rank, layout, layer);
  parts.push_back({kv, kv + arena.pages(rank, layout) * arena.kv_page_bytes(rank, layout), layer, -1});
  require_inside(rank, parts.back(), region, "region of its item");
  require_disjoint(parts, rank, "inside an item");
}

}  // namespace

void verify_arena(const ArenaPlan& arena) {
  const int n = arena.num_layers();
  for (int r = 0; r < arena.ranks(); ++r) {
    std::vector<Interval> kept;
    for (int l = 0; l < n; ++l)
      for (Layout layout : {Layout::kTp, Layout::kEp}) verify_item(arena, r, layout, l, kept);
    require_disjoint(kept, r, "in the kept zone");

    const auto region = [&](Layout layout, int l) {
      const Range range = arena.item_range(r, layout, l);
      require_inside(r, {range.begin, range.end, l, -1}, {arena.kept_bytes(r), arena.arena_bytes(r)}, "stream");
      return Interval{range.begin, range.end, l, static_cast<int>(layout)};
    };
    // Live at seam k: TP regions [0, k) and EP regions [k, n). Filled meanwhile, in either direction: the TP region of item k
    // or the EP region of item k − 1, which must miss everything live. So region TP(i) meets EP(j) for all i ≤ j, and
    // regions of one layout never meet.
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      std::vector<Interval> all;
      for (int l = 0; l < n; ++l) all.push_back(region(layout, l));
      require_disjoint(all, r, "within one layout");
    }
    Interval highest{0, 0, -1, 0};  // the furthest end among TP(0 … j)
    for (int j = 0; j < n; ++j) {
      const Interval tp = region(Layout::kTp, j), ep = region(Layout::kEp, j);
      if (tp.end > highest.end) highest = tp;
      if (ep.end <= ep.begin) continue;
      if (ep.begin >= highest.end) continue;
      for (int i = 0; i <= j; ++i) {  // only a plan that is not the planner's comes here: look exactly
        const Interval other_tp = region(Layout::kTp, i);
        if (other_tp.begin < other_tp.end && other_tp.begin < ep.end && ep.begin < other_tp.end)
          overlap(r, ("at seam " + std::to_string(j)).c_str(), other_tp, ep);
      }
    }
  }
}

void verify_transfer(const ArenaPlan& arena, const TransferPlan& plan) {
  for (int l = 0; l < arena.num_layers(); ++l) {
    const auto& slices = arena.table().layer(l);
    std::vector<std::vector<Interval>> reads(static_cast<size_t>(arena.ranks()));
    std::vector<std::vector<Interval>> owned(static_cast<size_t>(arena.ranks()));  // slices in the old layout
    for (int r = 0; r < arena.ranks(); ++r) {
      for (size_t i = 0; i < slices.size(); ++i)
        if (const int64_t at = arena.slice_offset(r, plan.from, l, static_cast<int>(i)); at >= 0)
          owned[static_cast<size_t>(r)].push_back({at, at + slices[i].bytes, l, static_cast<int>(i)});
      std::sort(owned[static_cast<size_t>(r)].begin(), owned[static_cast<size_t>(r)].end(),
                [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
    }
    for (int dst = 0; dst < arena.ranks(); ++dst) {
      // The slices that the copies bring: each source block is cut at the source's slice boundaries.
      std::vector<Interval> writes;
      for (const BlockCopy& c : plan.items[static_cast<size_t>(l)].to[static_cast<size_t>(dst)]) {
        if (c.src_rank == dst) fail(Code::kInternal, "layer {}: rank {} copies weights to itself", l, dst);
        const auto& from = owned[static_cast<size_t>(c.src_rank)];
        auto it = std::lower_bound(from.begin(), from.end(), c.src_offset, [](const Interval& i, int64_t at) { return i.begin < at; });
        for (int64_t done = 0; done < c.bytes; ++it) {
          if (it == from.end() || it->begin != c.src_offset + done)
            fail(Code::kInternal, "layer {}: rank {} reads [{}, {}) of rank {}, which is not whole slices of it", l, dst, c.src_offset,
                 c.src_offset + c.bytes, c.src_rank);
          const int64_t bytes = it->end - it->begin;
          if (arena.slice_offset(dst, plan.to, l, it->what) != c.dst_offset + done)
            fail(Code::kInternal, "layer {}: slice {} is written to {} of rank {}, its place is {}", l, it->what, c.dst_offset + done, dst,
                 arena.slice_offset(dst, plan.to, l, it->what));
          writes.push_back({c.dst_offset + done, c.dst_offset + done + bytes, l, it->what});
          done += bytes;
        }
        reads[static_cast<size_t>(c.src_rank)].push_back({c.src_offset, c.src_offset + c.bytes, l, -1});
      }
      size_t gained = 0;
      for (size_t i = 0; i < slices.size(); ++i)
        gained += arena.slice_offset(dst, plan.to, l, static_cast<int>(i)) >= 0 && arena.slice_offset(dst, plan.from, l, static_cast<int>(i)) < 0;
      if (gained != writes.size())
        fail(Code::kInternal, "layer {}: rank {} gains {} slices, {} are copied", l, dst, gained, writes.size());
      require_disjoint(writes, dst, "among the writes of an item");
    }
    for (int r = 0; r < arena.ranks(); ++r) {  // sources of the item stay intact while it is written
      const Range old_region = arena.item_range(r, plan.from, l), new_region = arena.item_range(r, plan.to, l);
      if (!old_region.empty() && !new_region.empty() && old_region.begin < new_region.end && new_region.begin < old_region.end)
        overlap(r, "between an item's two places", {old_region.begin, old_region.end, l, 0}, {new_region.begin, new_region.end, l, 1});
      for (const Interval& read : reads[static_cast<size_t>(r)])
        if (read.begin < new_region.end && new_region.begin < read.end && !new_region.empty())
          overlap(r, "between a read and the writes of an item", read, {new_region.begin, new_region.end, l, 1});
    }
  }
}

void verify_pages(std::span<const PagePair> pairs, Layout to, int64_t tp_pages, const std::vector<int64_t>& ep_pages) {
  std::vector<int64_t> first(ep_pages.size() + 1, 0);  // of each home's pages among all destination pages
  for (size_t r = 0; r < ep_pages.size(); ++r) first[r + 1] = first[r] + ep_pages[r];
  std::vector<bool> written(static_cast<size_t>(to == Layout::kTp ? tp_pages : first.back()), false);
  for (const PagePair& p : pairs) {
    if (p.home < 0 || p.home >= static_cast<int>(ep_pages.size()) || p.tp_page < 0 || p.tp_page >= tp_pages || p.ep_page < 0 ||
        p.ep_page >= ep_pages[static_cast<size_t>(p.home)])
      fail(Code::kInternal, "page pair (tp {}, home {}, ep {}) is out of range: {} TP pages", p.tp_page, p.home, p.ep_page, tp_pages);
    const auto page = static_cast<size_t>(to == Layout::kTp ? p.tp_page : first[static_cast<size_t>(p.home)] + p.ep_page);
    if (written[page]) fail(Code::kInternal, "page (tp {}, home {}, ep {}) would be written twice", p.tp_page, p.home, p.ep_page);
    written[page] = true;
  }
}

}  // namespace moebius
