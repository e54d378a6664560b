#include "lib/runtime/resident_copies.h"

#include <algorithm>

namespace moebius {

ResidentCopies::ResidentCopies(Device& device, const ArenaPlan& arena, const TransferPlan& to_tp, const TransferPlan& to_ep,
                               const std::vector<std::byte*>& arenas, int64_t max_pages)
    : device_(device), arena_(arena), arenas_(arenas), heads_(static_cast<int64_t>(arena.local_kv_heads(0, Layout::kEp).size())), ranks_(arenas.size()) {
  const auto ranks = static_cast<int>(arenas.size());
  std::vector<uint64_t> owners;
  for (RankSet of_head : arena.owners(Layout::kTp).kv_heads) owners.push_back(of_head);
  std::vector<int32_t> places(static_cast<size_t>(ranks * heads_), -1), counts;
  for (int r = 0; r < ranks; ++r) {
    const std::vector<int>& local = arena.local_kv_heads(r, Layout::kTp);
    for (size_t j = 0; j < local.size(); ++j) places[static_cast<size_t>(r * heads_ + local[j])] = static_cast<int32_t>(j);
    counts.push_back(static_cast<int32_t>(local.size()));
  }
  const auto send = [&](int r, auto* to, const auto& values) {
    device.write(r, to, values.data(), static_cast<int64_t>(values.size() * sizeof(values[0])));
  };
  for (int r = 0; r < ranks; ++r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    rank.memory = DeviceBuffer(device, r, place(rank, nullptr, ranks, heads_, max_pages));
    place(rank, rank.memory.data(), ranks, heads_, max_pages);
    send(r, rank.owners, owners);
    send(r, rank.places, places);
    send(r, rank.counts, counts);
    rank.sent.reserve(static_cast<size_t>(max_pages));
    rank.pools.resize(static_cast<size_t>(ranks));
    for (Layout to : {Layout::kTp, Layout::kEp}) {
      int64_t at = 0;
      for (const ItemTransfer& item : (to == Layout::kTp ? to_tp : to_ep).items) {
        rank.begins[static_cast<int>(to)].push_back(at);
        for (const BlockCopy& c : item.to[static_cast<size_t>(r)]) {
          device.copy_block(r, arenas[static_cast<size_t>(r)] + c.dst_offset, c.src_rank,
                            arenas[static_cast<size_t>(c.src_rank)] + c.src_offset, c.bytes);
          at += c.bytes;
        }
      }
      rank.table[static_cast<int>(to)] = device.keep_blocks(r);
    }
  }
}

// A block is at least a slice that the rank gains; each table ends with an entry of its own.
int64_t ResidentCopies::most_bytes(const Owners& tp, const Owners& ep, int64_t max_pages) {
  int64_t most = 0;
  for (int r = 0; r < tp.ranks; ++r) {
    int64_t blocks = 2;
    for (size_t l = 0; l < tp.slices.size(); ++l)
      for (size_t i = 0; i < tp.slices[l].size(); ++i) blocks += ((tp.slices[l][i] ^ ep.slices[l][i]) >> r & 1) != 0;
    most = std::max(most, blocks * kKeptBlockBytes);
  }
  Rank none;
  return most + place(none, nullptr, tp.ranks, static_cast<int64_t>(tp.kv_heads.size()), max_pages);
}

// The bytes of the arrays, which stand from `base` on where it is not null.
int64_t ResidentCopies::place(Rank& rank, std::byte* base, int64_t ranks, int64_t heads, int64_t max_pages) {
  int64_t at = 0;
  const auto take = [&]<class T>(T*& pointer, int64_t count) {
    pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  };
  take(rank.pairs, max_pages);
  take(rank.owners, heads);
  take(rank.places, ranks * heads);
  take(rank.counts, ranks);
  return at;
}

void ResidentCopies::copy_weights(int rank, Layout to, int item, int64_t begin, int64_t end) {
  const Rank& r = ranks_[static_cast<size_t>(rank)];
  const int64_t first = r.begins[static_cast<int>(to)][static_cast<size_t>(item)];
  device_.copy_kept(rank, r.table[static_cast<int>(to)], first + begin, first + end);
}

void ResidentCopies::send_pages(int rank, Layout to, std::span<const PagePair> pairs) {
  Rank& r = ranks_[static_cast<size_t>(rank)];
  r.sent.clear();
  r.local_pairs = 0;
  for (const PagePair& pair : pairs) {
    r.local_pairs += pair.home == rank;
    if (to == Layout::kTp || pair.home == rank) r.sent.push_back(pair);
  }
  if (!r.sent.empty()) device_.write(rank, r.pairs, r.sent.data(), static_cast<int64_t>(r.sent.size() * sizeof(PagePair)));
}

void ResidentCopies::copy_pages(int rank, Layout to, int item) {
  Rank& r = ranks_[static_cast<size_t>(rank)];
  for (size_t p = 0; p < r.pools.size(); ++p) r.pools[p] = arenas_[p] + arena_.kv_offset(static_cast<int>(p), other(to), item);
  CopyPagesArgs args;
  args.num = static_cast<int64_t>(r.sent.size());
  args.pairs = r.pairs;
  args.to_tp = to == Layout::kTp;
  args.rank = rank;
  args.num_ranks = static_cast<int32_t>(r.pools.size());
  args.num_kv_heads = static_cast<int32_t>(heads_);
  args.slice_bytes = arena_.kv_slice_bytes();
  args.from = r.pools.data();
  args.to = arenas_[static_cast<size_t>(rank)] + arena_.kv_offset(rank, to, item);
  args.owners = r.owners;
  args.places = r.places;
  args.counts = r.counts;
  device_.ops().copy_pages(args, {0, 1, nullptr, device_.queue(rank)});
}

std::pair<int64_t, int64_t> ResidentCopies::page_bytes(int rank, Layout to) const {
  const Rank& r = ranks_[static_cast<size_t>(rank)];
  const auto own = static_cast<int64_t>(arena_.local_kv_heads(rank, Layout::kTp).size());
  const int64_t all = static_cast<int64_t>(r.sent.size()) * (to == Layout::kTp ? own : heads_);
  return {all * arena_.kv_slice_bytes(), (all - r.local_pairs * own) * arena_.kv_slice_bytes()};
}

}  // namespace moebius
