#include "lib/layout/verify.h"

#include <algorithm>
#include <string>

#include "lib/base/error.h"

namespace moebius {
namespace {

struct Interval {
  int64_t begin, end;
  int item;  // −1: kept zone
  int what;  // slice number, −1: KV pool or a whole region
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

RankSet ranks_of(const Owners& owners) { return owners.ranks == 64 ? ~RankSet{0} : (RankSet{1} << owners.ranks) - 1; }

// A slice without an owner would be lost in a switch; a rank with query heads needs their K/V projection and KV.
void verify_owners(const SliceTable& table, const Owners& owners) {
  const auto require = [&](bool holds, int layer, int slice, RankSet set) {
    if (!holds)
      fail(Code::kInternal, "owners in {} of layer {} slice {} are {:#x} of {} ranks", name_of(owners.layout), layer, slice, set,
           owners.ranks);
  };
  MOEBIUS_ASSERT(static_cast<int>(owners.slices.size()) == table.num_layers());
  MOEBIUS_ASSERT(static_cast<int>(owners.kv_heads.size()) == table.model().num_kv_heads);
  for (int l = 0; l < table.num_layers(); ++l) {
    const std::vector<RankSet>& sets = owners.slices[static_cast<size_t>(l)];
    MOEBIUS_ASSERT(sets.size() == table.layer(l).size());
    for (size_t i = 0; i < sets.size(); ++i) require(sets[i] != 0 && (sets[i] & ~ranks_of(owners)) == 0, l, static_cast<int>(i), sets[i]);
    for (int a = 0; a < table.counts().head_groups; ++a) {
      const int head = table.kv_head_of_group(a);
      const RankSet readers = sets[static_cast<size_t>(table.attention(a))];
      require((readers & ~owners.kv_heads[static_cast<size_t>(head)]) == 0, l, table.attention(a), readers);
      require((readers & ~sets[static_cast<size_t>(table.kv_projection(head))]) == 0, l, table.attention(a), readers);
    }
  }
}

// Local heads in ascending order; in EP all of them, so that a global head is its own local number (for_each_kv_block).
void verify_kv_heads(const ArenaPlan& arena, int rank, Layout layout) {
  const std::vector<int>& heads = arena.local_kv_heads(rank, layout);
  const std::vector<RankSet>& owners = arena.owners(layout).kv_heads;
  size_t j = 0;
  for (size_t h = 0; h < owners.size(); ++h) {
    if ((owners[h] >> rank & 1) == 0 && layout == Layout::kTp) continue;
    if (j >= heads.size() || heads[j] != static_cast<int>(h))
      fail(Code::kInternal, "rank {} should hold KV head {} in {} as its {}-th", rank, h, name_of(layout), j);
    ++j;
  }
  if (j != heads.size()) fail(Code::kInternal, "rank {} holds {} KV heads in {}, owns {}", rank, heads.size(), name_of(layout), j);
}

void require_aligned(int rank, const Interval& part, int64_t alignment) {
  if (part.begin % alignment != 0)
    fail(Code::kInternal, "arena of rank {}: item {} (part {}) at [{}, {}) is not aligned to {}", rank, part.item, part.what, part.begin,
         part.end, alignment);
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
    require_aligned(rank, part, kSliceAlignment);
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
  require_aligned(rank, parts.back(), kPoolAlignment);
  require_inside(rank, parts.back(), region, "region of its item");
  require_disjoint(parts, rank, "inside an item");
}

// Regions of whole items. Live at seam k: TP regions [0, k) and EP regions [k, n). Filled meanwhile, in either direction: the
// TP region of item k or the EP region of item k − 1, which must miss everything live. So TP(i) and EP(j) are disjoint for all
// i ≤ j, and regions of one layout always.
void verify_regions(const ArenaPlan& arena, int rank) {
  const int n = arena.num_layers();
  const Range stream{arena.kept_bytes(rank), arena.arena_bytes(rank)};
  std::vector<Interval> regions[2];
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    std::vector<Interval>& list = regions[static_cast<size_t>(layout)];
    for (int l = 0; l < n; ++l) {
      const Range range = arena.item_range(rank, layout, l);
      list.push_back({range.begin, range.end, l, static_cast<int>(layout)});
      require_inside(rank, list.back(), stream, "stream");
    }
    std::vector<Interval> sorted = list;
    require_disjoint(sorted, rank, "within one layout");
  }
  int64_t highest = 0;  // the furthest end among TP(0 … j)
  for (int j = 0; j < n; ++j) {
    const Interval& ep = regions[1][static_cast<size_t>(j)];
    highest = std::max(highest, regions[0][static_cast<size_t>(j)].end);
    if (ep.end <= ep.begin || ep.begin >= highest) continue;
    for (int i = 0; i <= j; ++i) {  // only a plan that is not the planner's comes here: look exactly
      const Interval& tp = regions[0][static_cast<size_t>(i)];
      if (tp.begin < tp.end && tp.begin < ep.end && ep.begin < tp.end) overlap(rank, ("at seam " + std::to_string(j)).c_str(), tp, ep);
    }
  }
}

// What a rank owns of one layer in one layout, by offset.
std::vector<Interval> owned_slices(const ArenaPlan& arena, int rank, Layout layout, int layer) {
  const std::span<const Slice> slices = arena.table().layer(layer);
  std::vector<Interval> owned;
  for (size_t i = 0; i < slices.size(); ++i)
    if (const int64_t at = arena.slice_offset(rank, layout, layer, static_cast<int>(i)); at >= 0)
      owned.push_back({at, at + slices[i].bytes, layer, static_cast<int>(i)});
  std::sort(owned.begin(), owned.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  return owned;
}

// Cuts a block at the boundaries of the slices that its source owns; appends what each writes. A block is whole slices that dst
// gains, each to its place.
void cut_block(const ArenaPlan& arena, Layout to, int dst, const BlockCopy& c, const std::vector<Interval>& source, int layer,
               std::vector<Interval>& writes) {
  auto it = std::lower_bound(source.begin(), source.end(), c.src_offset, [](const Interval& i, int64_t at) { return i.begin < at; });
  for (int64_t done = 0; done < c.bytes; ++it) {
    const int64_t from = c.src_offset + done, at = c.dst_offset + done;
    if (it == source.end() || it->begin != from || it->end > c.src_offset + c.bytes)
      fail(Code::kInternal, "layer {}: rank {} reads [{}, {}) of rank {}, which is not whole slices of it", layer, dst, c.src_offset,
           c.src_offset + c.bytes, c.src_rank);
    if (arena.slice_offset(dst, to, layer, it->what) != at)
      fail(Code::kInternal, "layer {}: slice {} is written to {} of rank {}, its place is {}", layer, it->what, at, dst,
           arena.slice_offset(dst, to, layer, it->what));
    if (arena.slice_offset(dst, other(to), layer, it->what) >= 0)
      fail(Code::kInternal, "layer {}: rank {} copies slice {} to [{}, {}), which it had before", layer, dst, it->what, at,
           at + it->end - it->begin);
    writes.push_back({at, at + it->end - it->begin, layer, it->what});
    done += it->end - it->begin;
  }
}

struct Totals {
  int64_t slices = 0, bytes = 0;
};

void verify_item_transfer(const ArenaPlan& arena, const TransferPlan& plan, int layer, Totals& totals) {
  const ItemTransfer& item = plan.items[static_cast<size_t>(layer)];
  const auto ranks = static_cast<size_t>(arena.ranks());
  MOEBIUS_ASSERT(item.to.size() == ranks);
  std::vector<std::vector<Interval>> old_owned, reads(ranks);
  for (int r = 0; r < arena.ranks(); ++r) old_owned.push_back(owned_slices(arena, r, plan.from, layer));
  for (int dst = 0; dst < arena.ranks(); ++dst) {
    std::vector<Interval> writes;
    for (const BlockCopy& c : item.to[static_cast<size_t>(dst)]) {
      if (c.src_rank == dst) fail(Code::kInternal, "layer {}: rank {} copies weights to itself", layer, dst);
      if (c.src_rank < 0 || c.src_rank >= arena.ranks() || c.bytes <= 0)
        fail(Code::kInternal, "layer {}: rank {} copies {} bytes from rank {} of {}", layer, dst, c.bytes, c.src_rank, arena.ranks());
      cut_block(arena, plan.to, dst, c, old_owned[static_cast<size_t>(c.src_rank)], layer, writes);
      reads[static_cast<size_t>(c.src_rank)].push_back({c.src_offset, c.src_offset + c.bytes, layer, -1});
    }
    size_t gained = 0;
    for (size_t i = 0; i < arena.table().layer(layer).size(); ++i)
      gained += arena.slice_offset(dst, plan.to, layer, static_cast<int>(i)) >= 0 &&
                arena.slice_offset(dst, plan.from, layer, static_cast<int>(i)) < 0;
    if (gained != writes.size())
      fail(Code::kInternal, "layer {}: rank {} gains {} slices, {} are copied", layer, dst, gained, writes.size());
    require_disjoint(writes, dst, "among the writes of an item");
    totals.slices += static_cast<int64_t>(writes.size());
    for (const Interval& w : writes) totals.bytes += w.end - w.begin;
  }
  for (int r = 0; r < arena.ranks(); ++r) {  // sources of the item stay intact while it is written
    const Range new_region = arena.item_range(r, plan.to, layer);
    if (new_region.empty()) continue;
    const Range old_region = arena.item_range(r, plan.from, layer);  // its KV, whose pages are chosen later
    reads[static_cast<size_t>(r)].push_back({old_region.begin, old_region.end, layer, -1});
    for (const Interval& read : reads[static_cast<size_t>(r)])
      if (read.begin < read.end && read.begin < new_region.end && new_region.begin < read.end)
        overlap(r, "between a read and the writes of an item", read, {new_region.begin, new_region.end, layer, 1});
  }
}

}  // namespace

void verify_arena(const ArenaPlan& arena) {
  for (Layout layout : {Layout::kTp, Layout::kEp}) verify_owners(arena.table(), arena.owners(layout));
  for (int r = 0; r < arena.ranks(); ++r) {
    verify_regions(arena, r);
    std::vector<Interval> kept;
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      verify_kv_heads(arena, r, layout);
      for (int l = 0; l < arena.num_layers(); ++l) verify_item(arena, r, layout, l, kept);
    }
    require_disjoint(kept, r, "in the kept zone");
  }
}

void verify_transfer(const ArenaPlan& arena, const TransferPlan& plan) {
  MOEBIUS_ASSERT(plan.to == other(plan.from) && static_cast<int>(plan.items.size()) == arena.num_layers());
  Totals totals;
  for (int l = 0; l < arena.num_layers(); ++l) verify_item_transfer(arena, plan, l, totals);
  if (totals.slices != plan.num_slices || totals.bytes != plan.bytes)
    fail(Code::kInternal, "the plan counts {} slices of {} bytes, it copies {} of {}", plan.num_slices, plan.bytes, totals.slices,
         totals.bytes);
}

PageVerifier::PageVerifier(int64_t tp_pages, const std::vector<int64_t>& ep_pages) : tp_pages_(tp_pages), first_(ep_pages.size() + 1, 0) {
  for (size_t r = 0; r < ep_pages.size(); ++r) first_[r + 1] = first_[r] + ep_pages[r];
  written_.resize(static_cast<size_t>(std::max(tp_pages, first_.back())));
}

void PageVerifier::verify(std::span<const PagePair> pairs, Layout to) {
  written_.assign(written_.size(), false);
  for (const PagePair& p : pairs) {
    const bool known = p.home >= 0 && p.home + 1 < static_cast<int>(first_.size());
    const auto home = static_cast<size_t>(known ? p.home : 0);
    if (!known || p.tp_page < 0 || p.tp_page >= tp_pages_ || p.ep_page < 0 || p.ep_page >= first_[home + 1] - first_[home])
      fail(Code::kInternal, "page pair (tp {}, home {}, ep {}) is out of range: {} TP pages, {} homes, {} EP pages {}", p.tp_page, p.home, p.ep_page,
           tp_pages_, first_.size() - 1, first_[home + 1] - first_[home], known ? "there" : "on the first");
    const auto page = static_cast<size_t>(to == Layout::kTp ? p.tp_page : first_[home] + p.ep_page);
    if (written_[page]) fail(Code::kInternal, "page (tp {}, home {}, ep {}) would be written twice", p.tp_page, p.home, p.ep_page);
    written_[page] = true;
  }
}

}  // namespace moebius
