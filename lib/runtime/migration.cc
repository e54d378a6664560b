#include "lib/runtime/migration.h"

#include "lib/base/error.h"
#include "lib/layout/verify.h"

namespace moebius {
namespace {

ArenaPlan plan(const MigrationSpec& spec, const SliceTable& table, const Owners& tp, const Owners& ep) {
  const auto ranks = static_cast<size_t>(spec.ranks);
  if (spec.tp_pages > 0 || spec.ep_pages > 0 || spec.kv_slice_bytes == 0) {
    ArenaPlan arena = plan_arena(table, tp, ep, spec.kv_slice_bytes, spec.tp_pages, std::vector<int64_t>(ranks, spec.ep_pages));
    for (int r = 0; r < spec.ranks && spec.memory_bytes > 0; ++r)
      if (arena.arena_bytes(r) > spec.memory_bytes)
        fail(Code::kDoesNotFit, "rank {} needs an arena of {} bytes, memory_bytes is {}: {} bytes short", r, arena.arena_bytes(r),
             spec.memory_bytes, arena.arena_bytes(r) - spec.memory_bytes);
    return arena;
  }
  if (spec.memory_bytes == 0) fail(Code::kInvalidArgument, "tp_pages, ep_pages and memory_bytes are 0: one of them must say how much KV there is");
  const Capacity most = plan_capacity(table, tp, ep, spec.kv_slice_bytes, std::vector<int64_t>(ranks, spec.memory_bytes));
  return plan_arena(table, tp, ep, spec.kv_slice_bytes, most.tp_pages, most.ep_pages);
}

}  // namespace

Migration::Migration(const MigrationSpec& spec, std::unique_ptr<Device> device)
    : Migration(spec, SliceTable(spec.model, spec.counts, spec.bytes), std::move(device)) {}

Migration::Migration(const MigrationSpec& spec, const SliceTable& table, std::unique_ptr<Device> device)
    : device_(std::move(device)),
      arena_(plan(spec, table, tp_owners(table, spec.ranks), ep_owners(table, spec.ranks, spec.placement))),
      to_tp_(plan_transfer(arena_, Layout::kEp)),
      to_ep_(plan_transfer(arena_, Layout::kTp)),
      seam_(spec.start == Layout::kTp ? arena_.num_layers() : 0) {}

void Migration::verify() const {
  verify_arena(arena_);
  verify_transfer(arena_, to_tp_);
  verify_transfer(arena_, to_ep_);
}

void Migration::check_pairs(Layout to, std::span<const PagePair> pairs) const {
  try {
    PageVerifier(arena_.tp_pages(), arena_.ep_pages()).verify(pairs, to);
  } catch (const Error& e) {  // the host's pages, not a mistake of ours
    throw Error(Code::kInvalidArgument, e.what());
  }
}

int Migration::next_layer(Layout to) const {
  const int layer = to == Layout::kTp ? seam_ : seam_ - 1;
  if (layer < 0 || layer >= arena_.num_layers()) fail(Code::kInvalidState, "all {} layers are in {} already", arena_.num_layers(), name_of(to));
  return layer;
}

void Migration::copy_next(Layout to, int rank, std::span<std::byte* const> arenas, std::span<const PagePair> pairs) {
  const int layer = next_layer(to);
  std::byte* const own = arenas[static_cast<size_t>(rank)];
  const CallersDevice caller(*device_);
  const DrainOnError drain(*device_, rank);
  for_each_copy(to, layer, rank, pairs, [&](const BlockCopy& c) {
    device_->copy_block(rank, own + c.dst_offset, c.src_rank, arenas[static_cast<size_t>(c.src_rank)] + c.src_offset, c.bytes);
  });
  device_->finish_blocks(rank);
  while (!device_->idle(rank)) {
  }
}

void Migration::advance(Layout to) {
  next_layer(to);
  seam_ += to == Layout::kTp ? 1 : -1;
}

}  // namespace moebius
