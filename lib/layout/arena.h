// The arena: where every slice of both layouts lies in a rank's one allocation, so that a switch allocates nothing.
//
// Kept slices (owned in both layouts) have one place each, in a zone of their own. What moves is a sequence of items, one a
// layer: its moving weights and its KV. TP regions lie forward from the start of the stream, EP regions too, shifted up by a
// lead per rank, so that  end_TP(i) ≤ start_EP(i)  for every item i (the arena rule). Then at every seam k the TP regions of
// items before k and the EP regions of items from k on are disjoint (design.md §3).
#pragma once

#include <cstdint>
#include <vector>

#include "lib/base/numbers.h"
#include "lib/layout/owners.h"

namespace moebius {

inline constexpr int64_t kSliceAlignment = 64;   // a cache line; the bytes of slices are multiples of it
inline constexpr int64_t kPoolAlignment = 4096;  // a page of memory: KV pools and regions begin on one

// The rule alone, for one rank: sizes of items in TP and EP → their regions (relative to the stream) and the lead.
struct StreamLayout {
  std::vector<Range> tp, ep;  // [items]
  int64_t lead = 0, bytes = 0;
};
StreamLayout lay_out_stream(const std::vector<int64_t>& tp_bytes, const std::vector<int64_t>& ep_bytes);

class ArenaPlan {
 public:
  int ranks() const { return tp_.ranks; }
  int num_layers() const { return table_.num_layers(); }
  const SliceTable& table() const { return table_; }
  const Owners& owners(Layout layout) const { return layout == Layout::kTp ? tp_ : ep_; }

  // Byte offset of a slice in the rank's arena; −1: not owned in that layout.
  int64_t slice_offset(int rank, Layout layout, int layer, int slice) const {
    return of(rank).offsets[index(layout)][static_cast<size_t>(layer)][static_cast<size_t>(slice)];
  }
  bool kept(int rank, int layer, int slice) const {
    const RankSet both = tp_.slices[static_cast<size_t>(layer)][static_cast<size_t>(slice)] &
                         ep_.slices[static_cast<size_t>(layer)][static_cast<size_t>(slice)];
    return (both >> rank & 1) != 0;
  }
  // Start of a layer's KV pool: page p of the j-th local head at + (p·heads + j)·kv_slice_bytes.
  int64_t kv_offset(int rank, Layout layout, int layer) const { return of(rank).kv[index(layout)][static_cast<size_t>(layer)]; }
  const std::vector<int>& local_kv_heads(int rank, Layout layout) const { return of(rank).kv_heads[index(layout)]; }
  int64_t kv_slice_bytes() const { return kv_slice_bytes_; }
  int64_t kv_page_bytes(int rank, Layout layout) const {
    return kv_slice_bytes_ * static_cast<int64_t>(local_kv_heads(rank, layout).size());
  }
  int64_t tp_pages() const { return tp_pages_; }
  const std::vector<int64_t>& ep_pages() const { return ep_pages_; }
  int64_t pages(int rank, Layout layout) const { return layout == Layout::kTp ? tp_pages_ : ep_pages_[static_cast<size_t>(rank)]; }

  Range item_range(int rank, Layout layout, int layer) const { return of(rank).items[index(layout)][static_cast<size_t>(layer)]; }
  int64_t kept_bytes(int rank) const { return of(rank).kept_bytes; }
  int64_t lead(int rank) const { return of(rank).lead; }
  int64_t arena_bytes(int rank) const { return of(rank).bytes; }

 private:
  friend ArenaPlan plan_arena(const SliceTable&, const Owners&, const Owners&, int64_t, int64_t, const std::vector<int64_t>&);
  friend struct ArenaSabotage;  // tests: makes wrong plans for the verifier
  struct Rank {
    std::vector<std::vector<int64_t>> offsets[2];  // [Layout][layer][slice]
    std::vector<int64_t> kv[2];                    // [Layout][layer]
    std::vector<Range> items[2];                   // [Layout][layer]
    std::vector<int> kv_heads[2];
    int64_t kept_bytes = 0, lead = 0, bytes = 0;
  };
  void place(int rank, const StreamLayout& stream, int64_t kept_bytes);
  ArenaPlan(const SliceTable& table, const Owners& tp, const Owners& ep) : table_(table), tp_(tp), ep_(ep) {}
  static size_t index(Layout layout) { return static_cast<size_t>(layout); }
  const Rank& of(int rank) const { return ranks_[static_cast<size_t>(rank)]; }

  SliceTable table_;
  Owners tp_, ep_;
  int64_t kv_slice_bytes_ = 0, tp_pages_ = 0;
  std::vector<int64_t> ep_pages_;
  std::vector<Rank> ranks_;
};

// kv_slice_bytes: K and V of one page for one head in one layer. tp_pages: one number for all ranks; ep_pages: [rank].
// The plan has passed the verifier (verify.h). Throws kDoesNotFit when its size has no 64-bit number.
ArenaPlan plan_arena(const SliceTable& table, const Owners& tp, const Owners& ep, int64_t kv_slice_bytes, int64_t tp_pages,
                     const std::vector<int64_t>& ep_pages);

struct Capacity {
  int64_t tp_pages = 0;
  std::vector<int64_t> ep_pages;  // [rank]
};

// The most pages that fit arenas of memory_bytes [rank], both layouts using the stream to the full. Throws kDoesNotFit with
// the shortage when weights and one page in each layout do not fit.
Capacity plan_capacity(const SliceTable& table, const Owners& tp, const Owners& ep, int64_t kv_slice_bytes,
                       const std::vector<int64_t>& memory_bytes);

}  // namespace moebius
