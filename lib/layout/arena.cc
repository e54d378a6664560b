#include "lib/layout/arena.h"

#include <algorithm>
#include <limits>

#include "lib/base/error.h"
#include "lib/layout/transfer.h"
#include "lib/layout/verify.h"

namespace moebius {
namespace {

constexpr int64_t kSliceAlignment = 64;  // a cache line; slices are multiples of it
constexpr int64_t kPoolAlignment = 4096;

bool owns(const Owners& owners, int layer, size_t slice, int rank) {
  return (owners.slices[static_cast<size_t>(layer)][slice] >> rank & 1) != 0;
}

std::vector<int> heads_of(const Owners& owners, int rank) {
  std::vector<int> heads;
  for (size_t h = 0; h < owners.kv_heads.size(); ++h)
    if (owners.kv_heads[h] >> rank & 1) heads.push_back(static_cast<int>(h));
  return heads;
}

// Bytes of the moving weights of one layer on a rank, in one layout.
int64_t moving_bytes(const SliceTable& table, const Owners& mine, const Owners& other, int layer, int rank) {
  int64_t bytes = 0;
  for (size_t i = 0; i < table.layer(layer).size(); ++i)
    if (owns(mine, layer, i, rank) && !owns(other, layer, i, rank)) bytes += table.layer(layer)[i].bytes;
  return bytes;
}

int64_t item_bytes(int64_t weights, int64_t pages, int64_t page_bytes) {
  return round_up(weights, kPoolAlignment) + round_up(pages * page_bytes, kPoolAlignment);
}

// What fixes a rank's arena, but for the numbers of pages.
struct RankSizes {
  int64_t kept = 0;
  std::vector<int64_t> weights[2];  // [Layout][layer]
  int64_t page_bytes[2] = {};       // [Layout]

  int64_t arena_bytes(int64_t tp_pages, int64_t ep_pages) const {
    std::vector<int64_t> sizes[2];
    for (int layout : {0, 1})
      for (int64_t w : weights[layout]) sizes[layout].push_back(item_bytes(w, layout == 0 ? tp_pages : ep_pages, page_bytes[layout]));
    return kept + lay_out_stream(sizes[0], sizes[1]).bytes;
  }
};

RankSizes sizes_of(const SliceTable& table, const Owners& tp, const Owners& ep, int64_t kv_slice_bytes, int rank) {
  RankSizes s;
  for (int l = 0; l < table.num_layers(); ++l) {
    for (size_t i = 0; i < table.layer(l).size(); ++i)
      if (owns(tp, l, i, rank) && owns(ep, l, i, rank)) s.kept += table.layer(l)[i].bytes;
    s.weights[0].push_back(moving_bytes(table, tp, ep, l, rank));
    s.weights[1].push_back(moving_bytes(table, ep, tp, l, rank));
  }
  s.kept = round_up(s.kept, kPoolAlignment);
  s.page_bytes[0] = kv_slice_bytes * static_cast<int64_t>(heads_of(tp, rank).size());
  s.page_bytes[1] = kv_slice_bytes * static_cast<int64_t>(heads_of(ep, rank).size());
  return s;
}

// The largest n ≥ 0 with fits(n), which is monotone; −1 when even 0 does not.
template <class F>
int64_t largest(F&& fits) {
  if (!fits(0)) return -1;
  int64_t low = 0, high = 1;
  while (high < (int64_t{1} << 40) && fits(high)) low = high, high *= 2;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

}  // namespace

StreamLayout lay_out_stream(const std::vector<int64_t>& tp_bytes, const std::vector<int64_t>& ep_bytes) {
  MOEBIUS_ASSERT(tp_bytes.size() == ep_bytes.size());
  StreamLayout s;
  int64_t tp_end = 0, ep_begin = 0;
  for (size_t i = 0; i < tp_bytes.size(); ++i) {
    tp_end += tp_bytes[i];
    s.lead = std::max(s.lead, tp_end - ep_begin);  // Σ_{j≤i} b[j] − Σ_{j<i} a[j]
    ep_begin += ep_bytes[i];
  }
  int64_t tp = 0, ep = s.lead;
  for (size_t i = 0; i < tp_bytes.size(); ++i) {
    s.tp.push_back({tp, tp + tp_bytes[i]});
    s.ep.push_back({ep, ep + ep_bytes[i]});
    tp += tp_bytes[i];
    ep += ep_bytes[i];
  }
  s.bytes = std::max(tp, ep);
  return s;
}

ArenaPlan plan_arena(const SliceTable& table, const Owners& tp, const Owners& ep, int64_t kv_slice_bytes, int64_t tp_pages,
                     const std::vector<int64_t>& ep_pages) {
  MOEBIUS_ASSERT(tp.ranks == ep.ranks && static_cast<int>(ep_pages.size()) == ep.ranks && kv_slice_bytes % kSliceAlignment == 0);
  ArenaPlan plan(table, tp, ep);
  plan.kv_slice_bytes_ = kv_slice_bytes;
  plan.tp_pages_ = tp_pages;
  plan.ep_pages_ = ep_pages;
  for (int r = 0; r < tp.ranks; ++r) {
    ArenaPlan::Rank rank;
    const RankSizes sizes = sizes_of(table, tp, ep, kv_slice_bytes, r);
    std::vector<int64_t> item_sizes[2];
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      const size_t w = ArenaPlan::index(layout);
      rank.kv_heads[w] = heads_of(layout == Layout::kTp ? tp : ep, r);
      const int64_t pages = layout == Layout::kTp ? tp_pages : ep_pages[static_cast<size_t>(r)];
      for (int64_t weights : sizes.weights[w]) item_sizes[w].push_back(item_bytes(weights, pages, sizes.page_bytes[w]));
    }
    const StreamLayout stream = lay_out_stream(item_sizes[0], item_sizes[1]);
    rank.kept_bytes = sizes.kept;
    rank.lead = stream.lead;
    rank.bytes = sizes.kept + stream.bytes;

    int64_t kept = 0;
    for (int l = 0; l < table.num_layers(); ++l) {
      const size_t num = table.layer(l).size();
      std::vector<int64_t> kept_offsets(num, -1);
      for (size_t i = 0; i < num; ++i)
        if (owns(tp, l, i, r) && owns(ep, l, i, r)) {
          kept_offsets[i] = kept;
          kept += table.layer(l)[i].bytes;
        }
      for (Layout layout : {Layout::kTp, Layout::kEp}) {
        const size_t w = ArenaPlan::index(layout);
        const Owners& mine = layout == Layout::kTp ? tp : ep;
        const Range item = layout == Layout::kTp ? stream.tp[static_cast<size_t>(l)] : stream.ep[static_cast<size_t>(l)];
        rank.items[w].push_back({sizes.kept + item.begin, sizes.kept + item.end});
        std::vector<int64_t>& offsets = rank.offsets[w].emplace_back(kept_offsets);
        int64_t at = rank.items[w].back().begin;
        for (size_t i = 0; i < num; ++i)
          if (owns(mine, l, i, r) && offsets[i] < 0) {
            offsets[i] = at;
            at += table.layer(l)[i].bytes;
          }
        rank.kv[w].push_back(round_up(at, kPoolAlignment));
      }
    }
    plan.ranks_.push_back(std::move(rank));
  }
  verify_arena(plan);
  return plan;
}

Capacity plan_capacity(const SliceTable& table, const Owners& tp, const Owners& ep, int64_t kv_slice_bytes,
                       const std::vector<int64_t>& memory_bytes) {
  const int ranks = tp.ranks;
  std::vector<RankSizes> sizes;
  for (int r = 0; r < ranks; ++r) sizes.push_back(sizes_of(table, tp, ep, kv_slice_bytes, r));
  for (int r = 0; r < ranks; ++r)
    if (const int64_t least = sizes[static_cast<size_t>(r)].arena_bytes(1, 1); least > memory_bytes[static_cast<size_t>(r)])
      fail(Code::kDoesNotFit, "rank {} needs {} bytes for its weights and one KV page, {} bytes are given to it: {} bytes short", r,
           least, memory_bytes[static_cast<size_t>(r)], least - memory_bytes[static_cast<size_t>(r)]);

  // TP: as many pages as the poorest rank holds beside an EP layout whose items are as large (then the lead, about one item,
  // is the only loss, and neither layout is starved for the other).
  Capacity out{std::numeric_limits<int64_t>::max(), {}};
  for (int r = 0; r < ranks; ++r) {
    const RankSizes& s = sizes[static_cast<size_t>(r)];
    int64_t moving[2] = {};
    for (int layout : {0, 1})
      for (int64_t w : s.weights[layout]) moving[layout] += w;
    const auto ep_beside = [&](int64_t tp_pages) {  // EP pages that make both streams equally long
      const int64_t stream = moving[0] + tp_pages * s.page_bytes[0] * table.num_layers();
      return std::max<int64_t>(1, (stream - moving[1]) / (s.page_bytes[1] * table.num_layers()));
    };
    const int64_t pages = largest([&](int64_t n) { return s.arena_bytes(n + 1, ep_beside(n + 1)) <= memory_bytes[static_cast<size_t>(r)]; });
    out.tp_pages = std::min(out.tp_pages, pages + 1);
  }
  out.tp_pages = std::max<int64_t>(1, out.tp_pages);
  for (int r = 0; r < ranks; ++r) {
    const RankSizes& s = sizes[static_cast<size_t>(r)];
    out.ep_pages.push_back(1 + largest([&](int64_t n) { return s.arena_bytes(out.tp_pages, n + 1) <= memory_bytes[static_cast<size_t>(r)]; }));
    if (out.ep_pages.back() < 1) fail(Code::kDoesNotFit, "rank {}: no EP page fits beside {} TP pages", r, out.tp_pages);
  }
  return out;
}

}  // namespace moebius
