// A block of KV in both layouts.
#pragma once

#include <cstdint>

namespace moebius {

// The page of all ranks in TP, and the page of its home in EP.
struct PagePair {
  int32_t tp_page = -1;
  int32_t home = -1;
  int32_t ep_page = -1;
};

// Who gives a KV head to rank `dst` of an EP home, of the ranks that have it in TP (bits): itself if it is one, else they take turns by page.
constexpr int kv_source(uint64_t owners, int dst, int32_t tp_page) {
  if (owners >> dst & 1) return dst;
  int count = 0;
  for (uint64_t left = owners; left != 0; left &= left - 1) ++count;
  int turn = tp_page % count, source = 0;
  for (uint64_t left = owners;; left >>= 1, ++source)
    if ((left & 1) != 0 && turn-- == 0) return source;
}

}  // namespace moebius
