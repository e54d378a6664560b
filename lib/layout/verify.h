// The interval verifier: proves of a finished plan, by its intervals and nothing else, that no write of a switch lands on
// bytes somebody still needs. It runs on every plan ever made and trusts no formula.
#pragma once

#include <span>
#include <vector>

#include "lib/layout/arena.h"
#include "lib/layout/transfer.h"

namespace moebius {

// At every seam: kept zone, TP regions of items before it and EP regions from it on are disjoint and inside the arena, also
// while the next item's new region (either direction) is being filled ahead; every owned slice and KV pool lies aligned in its
// item's region, or in the kept zone at one place for both layouts, and none overlaps another. Every slice has an owner in
// both layouts, and who has a head group has its KV head. Throws Error(kInternal) naming rank, item and intervals.
void verify_arena(const ArenaPlan& arena);

// Every copy of the plan reads whole slices that its source owns in the old layout, writes each to its place in the new one,
// inside the destination's new region of the same item, writes nothing twice, touches no source of the same item, and together
// they bring each gained slice once, and nothing else.
void verify_transfer(const ArenaPlan& arena, const TransferPlan& plan);

// Pages in range, and no destination page of a move to `to` written twice (a bitmap). Allocates only when it is made.
class PageVerifier {
 public:
  PageVerifier(int64_t tp_pages, const std::vector<int64_t>& ep_pages);
  void verify(std::span<const PagePair> pairs, Layout to);  // throws Error(kInternal)

 private:
  int64_t tp_pages_;
  std::vector<int64_t> first_;  // [homes + 1] of each home's pages among all EP pages
  std::vector<bool> written_;
};

}  // namespace moebius
