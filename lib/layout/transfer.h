// What a change of layout copies: each slice, once, to each rank that owns it in the new layout and not in the old.
#pragma once

#include <cstdint>
#include <vector>

#include "lib/base/error.h"
#include "lib/layout/arena.h"
#include "lib/layout/pages.h"

namespace moebius {

struct BlockCopy {
  int32_t src_rank = 0;
  int64_t src_offset = 0, dst_offset = 0, bytes = 0;
};

struct ItemTransfer {
  std::vector<std::vector<BlockCopy>> to;  // [destination rank]
};

// The weights of a switch. KV, whose pages are known only at run time, follows the same rule: for_each_kv_block.
struct TransferPlan {
  Layout from = Layout::kTp, to = Layout::kEp;
  std::vector<ItemTransfer> items;  // [layer]
  int64_t bytes = 0;                // to a new owner
  int64_t num_slices = 0;           // slice copies, before adjacent ones were merged into blocks
};

// The plan has passed the verifier.
TransferPlan plan_transfer(const ArenaPlan& arena, Layout from);

// Calls fn(BlockCopy, local) for each KV slice that dst_rank copies for this pair when `layer` moves to `to`. To TP, every rank
// takes its heads from the home; to EP, the home takes every head from one of its TP owners: itself if it is one, else they
// take turns by page.
template <class F>
void for_each_kv_block(const ArenaPlan& arena, Layout to, int layer, int dst_rank, const PagePair& pair, F&& fn) {
  const int64_t slice = arena.kv_slice_bytes();
  const auto offset = [&](int rank, Layout layout, int64_t page, size_t local_head) {
    const auto heads = static_cast<int64_t>(arena.local_kv_heads(rank, layout).size());
    return arena.kv_offset(rank, layout, layer) + (page * heads + static_cast<int64_t>(local_head)) * slice;
  };
  const auto local_of = [&](int rank, int head) {  // in TP; owners hold few heads
    const std::vector<int>& heads = arena.local_kv_heads(rank, Layout::kTp);
    size_t j = 0;
    while (heads[j] != head) ++j;
    return j;
  };
  if (to == Layout::kTp) {
    const std::vector<int>& heads = arena.local_kv_heads(dst_rank, Layout::kTp);
    for (size_t j = 0; j < heads.size(); ++j)
      fn(BlockCopy{pair.home, offset(pair.home, Layout::kEp, pair.ep_page, static_cast<size_t>(heads[j])),
                   offset(dst_rank, Layout::kTp, pair.tp_page, j), slice},
         pair.home == dst_rank);
    return;
  }
  if (dst_rank != pair.home) return;
  const std::vector<RankSet>& owners = arena.owners(Layout::kTp).kv_heads;
  for (size_t h = 0; h < owners.size(); ++h) {
    const int src = kv_source(owners[h], dst_rank, pair.tp_page);
    fn(BlockCopy{src, offset(src, Layout::kTp, pair.tp_page, local_of(src, static_cast<int>(h))),
                 offset(dst_rank, Layout::kEp, pair.ep_page, h), slice},
       src == dst_rank);
  }
}

}  // namespace moebius
