#include "lib/layout/transfer.h"

#include "lib/layout/verify.h"

namespace moebius {

TransferPlan plan_transfer(const ArenaPlan& arena, Layout from) {
  TransferPlan plan;
  plan.from = from;
  plan.to = other(from);
  const SliceTable& table = arena.table();
  const Owners& old_owners = arena.owners(from);
  const Owners& new_owners = arena.owners(plan.to);
  for (int l = 0; l < arena.num_layers(); ++l) {
    ItemTransfer& item = plan.items.emplace_back();
    item.to.resize(static_cast<size_t>(arena.ranks()));
    std::vector<int64_t> read(static_cast<size_t>(arena.ranks()), 0);  // bytes taken from each rank: the least busy owner gives
    for (size_t i = 0; i < table.layer(l).size(); ++i) {
      const Slice& slice = table.layer(l)[i];
      const RankSet had = old_owners.slices[static_cast<size_t>(l)][i];
      for (RankSet gains = new_owners.slices[static_cast<size_t>(l)][i] & ~had; gains != 0; gains &= gains - 1) {
        const int dst = std::countr_zero(gains);
        int src = -1;
        for (RankSet s = had; s != 0; s &= s - 1)
          if (const int r = std::countr_zero(s); src < 0 || read[static_cast<size_t>(r)] < read[static_cast<size_t>(src)]) src = r;
        MOEBIUS_ASSERT(src >= 0);
        read[static_cast<size_t>(src)] += slice.bytes;
        const BlockCopy copy{src, arena.slice_offset(src, from, l, static_cast<int>(i)),
                             arena.slice_offset(dst, plan.to, l, static_cast<int>(i)), slice.bytes};
        std::vector<BlockCopy>& list = item.to[static_cast<size_t>(dst)];
        if (!list.empty() && list.back().src_rank == src && list.back().src_offset + list.back().bytes == copy.src_offset &&
            list.back().dst_offset + list.back().bytes == copy.dst_offset)
          list.back().bytes += copy.bytes;
        else
          list.push_back(copy);
        plan.bytes += copy.bytes;
        ++plan.num_slices;
      }
    }
  }
  verify_transfer(arena, plan);
  return plan;
}

}  // namespace moebius
