#include "lib/layout/arena.h"

#include <algorithm>
#include <limits>

#include "lib/base/error.h"
#include "lib/layout/transfer.h"
#include "lib/layout/verify.h"

namespace moebius {
namespace {

constexpr int64_t kMaxBytes = int64_t{1} << 60;  // KV of a rank, and memory given to it: no sum of such numbers overflows
constexpr int64_t kMaxPages = std::numeric_limits<int32_t>::max();  // pages are numbered by int32_t (PagePair)

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

  StreamLayout stream(int64_t tp_pages, int64_t ep_pages) const {
    const int64_t pages[2] = {tp_pages, ep_pages};
    std::vector<int64_t> items[2];
    for (int layout : {0, 1})
      for (int64_t w : weights[layout]) items[layout].push_back(item_bytes(w, pages[layout], page_bytes[layout]));
    return lay_out_stream(items[0], items[1]);
  }
  int64_t arena_bytes(int64_t tp_pages, int64_t ep_pages) const { return kept + stream(tp_pages, ep_pages).bytes; }
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

// The largest n in [0, limit) with fits(n), which is monotone; −1 when even 0 does not.
template <class F>
int64_t largest(int64_t limit, F&& fits) {
  int64_t low = -1, high = 1;  // fits(low), and high may not fit
  while (high < limit && fits(high)) low = high, high *= 2;
  high = std::min(high, limit);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

void check_pages(int rank, int64_t pages, int64_t page_bytes, int layers) {
  uint64_t bytes = 0;
  if (pages < 0 || !checked_mul(static_cast<uint64_t>(pages), static_cast<uint64_t>(page_bytes * layers), &bytes) ||
      bytes > static_cast<uint64_t>(kMaxBytes))
    fail(Code::kDoesNotFit, "rank {}: {} KV pages of {} bytes in {} layers fit no arena", rank, pages, page_bytes, layers);
}

// The most TP pages of a rank beside an EP layout whose items are as large: then the lead, about one item, is the only loss,
// and neither layout is starved for the other.
int64_t most_tp_pages(const RankSizes& s, int64_t memory_bytes) {
  const auto layers = static_cast<int64_t>(s.weights[0].size());
  int64_t moving[2] = {};
  for (int layout : {0, 1})
    for (int64_t w : s.weights[layout]) moving[layout] += w;
  const auto ep_beside = [&](int64_t tp_pages) {  // EP pages that make both streams equally long
    return std::max<int64_t>(1, (moving[0] + tp_pages * s.page_bytes[0] * layers - moving[1]) / (s.page_bytes[1] * layers));
  };
  return 1 + largest(kMaxPages, [&](int64_t n) { return s.arena_bytes(n + 1, ep_beside(n + 1)) <= memory_bytes; });
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

// Kept slices from 0 on, then the stream; inside an item its slices in order, then its KV pool.
void ArenaPlan::place(int r, const StreamLayout& stream, int64_t kept_bytes) {
  Rank rank;
  rank.kept_bytes = kept_bytes;
  rank.lead = stream.lead;
  rank.bytes = kept_bytes + stream.bytes;
  int64_t kept_at = 0;
  for (int l = 0; l < num_layers(); ++l) {
    const std::span<const Slice> slices = table_.layer(l);
    std::vector<int64_t> kept_offsets(slices.size(), -1);
    for (size_t i = 0; i < slices.size(); ++i)
      if (owns(tp_, l, i, r) && owns(ep_, l, i, r)) {
        kept_offsets[i] = kept_at;
        kept_at += slices[i].bytes;
      }
    for (Layout layout : {Layout::kTp, Layout::kEp}) {
      const Range item = (layout == Layout::kTp ? stream.tp : stream.ep)[static_cast<size_t>(l)];
      rank.items[index(layout)].push_back({kept_bytes + item.begin, kept_bytes + item.end});
      std::vector<int64_t>& offsets = rank.offsets[index(layout)].emplace_back(kept_offsets);
      int64_t at = kept_bytes + item.begin;
      for (size_t i = 0; i < slices.size(); ++i)
        if (owns(owners(layout), l, i, r) && offsets[i] < 0) {
          offsets[i] = at;
          at += slices[i].bytes;
        }
      rank.kv[index(layout)].push_back(round_up(at, kPoolAlignment));
    }
  }
  for (Layout layout : {Layout::kTp, Layout::kEp}) rank.kv_heads[index(layout)] = heads_of(owners(layout), r);
  ranks_.push_back(std::move(rank));
}

ArenaPlan plan_arena(const SliceTable& table, const Owners& tp, const Owners& ep, int64_t kv_slice_bytes, int64_t tp_pages,
                     const std::vector<int64_t>& ep_pages) {
  MOEBIUS_ASSERT(tp.ranks == ep.ranks && static_cast<int>(ep_pages.size()) == ep.ranks && kv_slice_bytes % kSliceAlignment == 0);
  ArenaPlan plan(table, tp, ep);
  plan.kv_slice_bytes_ = kv_slice_bytes;
  plan.tp_pages_ = tp_pages;
  plan.ep_pages_ = ep_pages;
  for (int r = 0; r < tp.ranks; ++r) {
    const RankSizes sizes = sizes_of(table, tp, ep, kv_slice_bytes, r);
    const int64_t pages[2] = {tp_pages, ep_pages[static_cast<size_t>(r)]};
    for (int layout : {0, 1}) check_pages(r, pages[layout], sizes.page_bytes[layout], table.num_layers());
    plan.place(r, sizes.stream(pages[0], pages[1]), sizes.kept);
  }
  verify_arena(plan);
  return plan;
}

Capacity plan_capacity(const SliceTable& table, const Owners& tp, const Owners& ep, int64_t kv_slice_bytes,
                       const std::vector<int64_t>& memory_bytes) {
  const int ranks = tp.ranks;
  MOEBIUS_ASSERT(ep.ranks == ranks && static_cast<int>(memory_bytes.size()) == ranks && table.num_layers() > 0);
  std::vector<RankSizes> sizes;
  for (int r = 0; r < ranks; ++r) sizes.push_back(sizes_of(table, tp, ep, kv_slice_bytes, r));
  const auto memory = [&](int r) { return std::min(memory_bytes[static_cast<size_t>(r)], kMaxBytes); };
  for (int r = 0; r < ranks; ++r)
    if (const int64_t least = sizes[static_cast<size_t>(r)].arena_bytes(1, 1); least > memory(r))
      fail(Code::kDoesNotFit, "rank {} needs {} bytes for its weights and one KV page, {} bytes are left for it: {} bytes short", r, least,
           std::max<int64_t>(0, memory_bytes[static_cast<size_t>(r)]), least - memory_bytes[static_cast<size_t>(r)]);

  Capacity out{kMaxPages, {}};
  for (int r = 0; r < ranks; ++r) out.tp_pages = std::min(out.tp_pages, most_tp_pages(sizes[static_cast<size_t>(r)], memory(r)));
  out.tp_pages = std::max<int64_t>(1, out.tp_pages);
  for (int r = 0; r < ranks; ++r) {
    const RankSizes& s = sizes[static_cast<size_t>(r)];
    const auto fits = [&](int64_t n) { return s.arena_bytes(out.tp_pages, n + 1) <= memory(r); };
    out.ep_pages.push_back(1 + largest(kMaxPages, fits));
    MOEBIUS_ASSERT(out.ep_pages.back() >= 1);  // tp_pages fits beside one EP page or more on every rank
  }
  return out;
}

}  // namespace moebius
