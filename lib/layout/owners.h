// A layout is a function from slices to owners. Here are the two; a new layout is another function.
#pragma once

#include <cstdint>
#include <vector>

#include "lib/layout/slices.h"

namespace moebius {

struct Owners {
  int ranks = 1;
  Layout layout = Layout::kTp;
  std::vector<std::vector<RankSet>> slices;  // [layer][slice]
  std::vector<RankSet> kv_heads;             // [KV heads] who may hold a head's KV; EP: every rank, for its own requests
};

// Expert, shared and dense cut s: rank ⌊s·P/S⌋. Head groups: contiguous runs, dealt so that the largest number of KV heads on a rank
// is smallest, then that of groups (⌊a·P/A⌋ where its KV heads are as few). K/V of a head: every rank whose groups read it.
Owners tp_owners(const SliceTable& table, int ranks);

// placement: [layer][expert] → rank (none in a dense layer), empty for ⌊e·P/E⌋ everywhere. Attention, shared and dense cuts: every rank.
Owners ep_owners(const SliceTable& table, int ranks, const std::vector<std::vector<int>>& placement = {});

}  // namespace moebius
