// A switch for a server that computes by itself: its slices, both layouts, the arena and the copies, without an engine. The server owns the
// memory and says when a layer moves; this says where everything lies, copies, and keeps the seam.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "lib/device/device.h"
#include "lib/layout/arena.h"
#include "lib/layout/transfer.h"

namespace moebius {

struct MigrationSpec {
  ModelShape model;   // heads, KV heads, experts of each layer
  SliceCounts counts;
  SliceBytes bytes;
  int64_t kv_slice_bytes = 0;                // K and V of a page for one head in one layer, a multiple of 64
  int64_t tp_pages = 0, ep_pages = 0;        // KV pages of every rank; both 0: as many as memory_bytes holds
  int64_t memory_bytes = 0;                  // of a rank's arena
  std::vector<std::vector<int>> placement;   // [layer][expert] → rank in EP; empty: ⌊e·P/E⌋
  int ranks = 1;
  Layout start = Layout::kTp;
};

class Migration {
 public:
  // Plans, and proves the plans (lib/layout/verify.h). Throws kInvalidArgument, kDoesNotFit.
  Migration(const MigrationSpec& spec, std::unique_ptr<Device> device);

  const ArenaPlan& arena() const { return arena_; }
  const TransferPlan& transfer(Layout to) const { return to == Layout::kTp ? to_tp_ : to_ep_; }
  void verify() const;  // once more; throws kInternal
  int seam() const { return seam_; }

  // Throws kInvalidArgument for a page that is written twice by a move to `to`, or is out of range.
  void check_pairs(Layout to, std::span<const PagePair> pairs) const;
  // What a layer's move copies to `rank`: fn(BlockCopy). pairs: the KV blocks in use, checked. Any thread.
  template <class F>
  void for_each_copy(Layout to, int layer, int rank, std::span<const PagePair> pairs, F&& fn) const {
    for (const BlockCopy& c : transfer(to).items[static_cast<size_t>(layer)].to[static_cast<size_t>(rank)]) fn(c);
    for (const PagePair& pair : pairs)
      for_each_kv_block(arena_, to, layer, rank, pair, [&](const BlockCopy& c, bool) { fn(c); });
  }

  // The layer that moves next: from the seam on. Throws kInvalidState when all layers are in that layout.
  int next_layer(Layout to) const;
  // Copies what the next layer's move brings to `rank`, and returns when it is there. arenas [ranks]: each of arena_bytes, aligned to 64;
  // the next layer must not be in use. Different ranks at once by different threads.
  void copy_next(Layout to, int rank, std::span<std::byte* const> arenas, std::span<const PagePair> pairs);
  // The next layer has been copied on every rank: it is in the new layout. Between copies only.
  void advance(Layout to);

 private:
  Migration(const MigrationSpec& spec, const SliceTable& table, std::unique_ptr<Device> device);

  std::unique_ptr<Device> device_;
  ArenaPlan arena_;
  TransferPlan to_tp_, to_ep_;
  int seam_;
};

}  // namespace moebius
