// A switch's copies where the device makes them from tables of its own: those of the weights are made once, KV's are found by a kernel from the
// pages, which are sent once for as many layers as they stay the same. (On the host, and where ranks exchange, the Switcher lists each copy.)
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "lib/device/device.h"
#include "lib/layout/transfer.h"

namespace moebius {

class ResidentCopies {
 public:
  static bool possible(Device& device) { return device.ops().copy_pages != nullptr && device.collectives() == nullptr; }
  // What it takes of any rank's memory at most.
  static int64_t most_bytes(const Owners& tp, const Owners& ep, int64_t max_pages);
  // arenas: [rank]. At most max_pages pages are copied at once.
  ResidentCopies(Device& device, const ArenaPlan& arena, const TransferPlan& to_tp, const TransferPlan& to_ep,
                 const std::vector<std::byte*>& arenas, int64_t max_pages);

  // By the rank's thread; they queue. Bytes [begin, end) of the item's weight copies laid end to end.
  void copy_weights(int rank, Layout to, int item, int64_t begin, int64_t end);
  // The pages that copy_pages copies from now on, for any item: those of `pairs` that the rank has a part of in the layout.
  void send_pages(int rank, Layout to, std::span<const PagePair> pairs);
  void copy_pages(int rank, Layout to, int item);
  // Bytes that copy_pages writes, and those that another rank had.
  std::pair<int64_t, int64_t> page_bytes(int rank, Layout to) const;

 private:
  struct Rank {
    DeviceBuffer memory;
    PagePair* pairs = nullptr;      // in memory, as what follows
    uint64_t* owners = nullptr;     // [heads]
    int32_t *places = nullptr, *counts = nullptr;  // [ranks, heads], [ranks]
    int table[2] = {};              // [to] of the weights' blocks
    std::vector<int64_t> begins[2];  // [to][item] in the table
    std::vector<PagePair> sent;
    int64_t local_pairs = 0;        // of these: of this home
    std::vector<const std::byte*> pools;
  };
  static int64_t place(Rank& rank, std::byte* base, int64_t ranks, int64_t heads, int64_t max_pages);

  Device& device_;
  const ArenaPlan& arena_;
  std::vector<std::byte*> arenas_;
  int64_t heads_;
  std::vector<Rank> ranks_;
};

}  // namespace moebius
