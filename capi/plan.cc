#include <algorithm>
#include <span>
#include <vector>

#include "capi/config.h"
#include "capi/guarded.h"
#include "capi/layouts.h"
#include "lib/runtime/backend.h"
#include "lib/runtime/migration.h"

struct moebius_plan {
  moebius::Migration migration;
};

namespace {

using moebius::ArenaPlan;
using moebius::Code;
using moebius::fail;
using moebius::Layout;
using moebius::MigrationSpec;
using moebius::PagePair;
using moebius::capi::check_length;
using moebius::capi::check_stride;
using moebius::capi::check_struct;
using moebius::capi::fill_struct;
using moebius::capi::guarded;
using moebius::capi::layout_of;
using moebius::capi::not_null;

// Sizes of the structs as version 0.1 had them.
constexpr size_t kSpecV1 = 104, kInfoV1 = 72, kSliceV1 = 40, kPoolV1 = 32, kCopyV1 = 40;
static_assert(sizeof(moebius_plan_spec) == kSpecV1 && sizeof(moebius_plan_info) == kInfoV1 && sizeof(moebius_slice) == kSliceV1 &&
              sizeof(moebius_kv_pool) == kPoolV1 && sizeof(moebius_block_copy) == kCopyV1);
static_assert(sizeof(PagePair) == sizeof(moebius_page_pair) && offsetof(PagePair, home) == offsetof(moebius_page_pair, home) &&
              offsetof(PagePair, ep_page) == offsetof(moebius_page_pair, ep_page));

// So many slices that their list would be the problem, or bytes that no number holds.
void check_size(const moebius_plan_spec& s) {
  constexpr double kMostSlices = 1 << 25, kMostBytes = 1e18;
  const double of_layer = std::max(1, s.num_experts + s.num_shared_experts) * static_cast<double>(s.slices_per_expert);
  const double attention = s.num_heads, pages = static_cast<double>(std::max(s.tp_pages, s.ep_pages));
  const double slices = s.num_layers * (of_layer + 2 * attention);
  const double bytes = s.num_layers * (of_layer * static_cast<double>(std::max(s.expert_slice_bytes, s.dense_slice_bytes)) +
                                       attention * (static_cast<double>(s.attention_bytes) + static_cast<double>(s.kv_projection_bytes)) +
                                       s.num_kv_heads * std::max(1.0, pages) * static_cast<double>(s.kv_slice_bytes));
  if (slices > kMostSlices || bytes > kMostBytes)
    fail(Code::kDoesNotFit, "some {:.0f} slices of {:.0f} bytes in all: at most {:.0f} of {:.0f} bytes are planned", slices, bytes, kMostSlices,
         kMostBytes);
}

moebius_plan_spec copy_spec(const moebius_plan_spec& given) {
  check_struct(&given, given.struct_size, kSpecV1);
  moebius_plan_spec s{};
  std::memcpy(&s, &given, std::min<size_t>(given.struct_size, sizeof s));
  const auto in_range = [](const char* name, int64_t value, int64_t lowest, int64_t highest) {
    if (value < lowest || value > highest) fail(Code::kInvalidArgument, "{} is {}, must be from {} to {}", name, value, lowest, highest);
  };
  constexpr int64_t kMost = 65536;
  in_range("num_layers", s.num_layers, 1, kMost);
  in_range("num_heads", s.num_heads, 1, kMost);
  in_range("num_kv_heads", s.num_kv_heads, 1, kMost);
  in_range("num_experts", s.num_experts, 0, kMost);
  in_range("num_shared_experts", s.num_shared_experts, 0, kMost);
  in_range("slices_per_expert", s.slices_per_expert, 1, kMost);
  in_range("head_groups", s.head_groups, 0, kMost);
  in_range("tp_pages", s.tp_pages, 0, INT64_MAX);
  in_range("ep_pages", s.ep_pages, 0, INT64_MAX);
  if ((s.tp_pages > 0) != (s.ep_pages > 0))
    fail(Code::kInvalidArgument, "tp_pages is {} and ep_pages {}: both are given or both are 0", s.tp_pages, s.ep_pages);
  if (std::max(s.tp_pages, s.ep_pages) > INT32_MAX)
    fail(Code::kInvalidArgument, "tp_pages is {} and ep_pages {}, at most {} are taken", s.tp_pages, s.ep_pages, INT32_MAX);
  if (s.tp_pages > 0 && s.kv_slice_bytes == 0) fail(Code::kInvalidArgument, "kv_slice_bytes is 0, with tp_pages and ep_pages it must be above");
  bool sparse = false, dense = false;
  for (int l = 0; l < s.num_layers; ++l) ((s.experts_of_layer != nullptr ? s.experts_of_layer[l] : s.num_experts) > 0 ? sparse : dense) = true;
  struct Bytes {
    const char* name;
    int64_t bytes;
    bool needed;
  };
  for (const Bytes& b : {Bytes{"attention_bytes", s.attention_bytes, true}, Bytes{"kv_projection_bytes", s.kv_projection_bytes, true},
                         Bytes{"expert_slice_bytes", s.expert_slice_bytes, sparse}, Bytes{"dense_slice_bytes", s.dense_slice_bytes, dense},
                         Bytes{"kv_slice_bytes", s.kv_slice_bytes, false}})
    if (b.bytes < (b.needed ? moebius::kSliceAlignment : 0) || b.bytes % moebius::kSliceAlignment != 0)
      fail(Code::kInvalidArgument, "{} is {}, must be a multiple of {}{}", b.name, b.bytes, moebius::kSliceAlignment, b.needed ? " above 0" : "");
  check_size(s);
  return s;
}

MigrationSpec spec_of(const moebius_plan_spec& s, const moebius::EngineConfig& config) {
  if (config.memory_bytes < 0) fail(Code::kInvalidArgument, "memory_bytes is {}, must be at least 0 (0: no bound)", config.memory_bytes);
  MigrationSpec spec;
  spec.ranks = config.ranks;
  spec.start = config.layout;
  spec.memory_bytes = config.memory_bytes;
  spec.model.num_heads = s.num_heads;
  spec.model.num_kv_heads = s.num_kv_heads;
  for (int l = 0; l < s.num_layers; ++l) {
    const int32_t experts = s.experts_of_layer != nullptr ? s.experts_of_layer[l] : s.num_experts;
    if (experts < 0 || experts > s.num_experts)
      fail(Code::kInvalidArgument, "experts_of_layer[{}] is {}, must be from 0 to num_experts, {}", l, experts, s.num_experts);
    spec.model.mlps.push_back({experts, s.slices_per_expert, experts > 0 ? s.num_shared_experts : 0});  // of a slice's neurons nothing is asked but that they are as many
  }
  spec.counts = slice_counts(spec.model, s.slices_per_expert);
  if (s.head_groups > 0) {
    if (s.head_groups % s.num_kv_heads != 0 || s.num_heads % s.head_groups != 0)
      fail(Code::kInvalidArgument, "head_groups is {}, must be a multiple of {} KV heads that divides {} query heads", s.head_groups,
           s.num_kv_heads, s.num_heads);
    spec.counts.head_groups = s.head_groups;
  }
  spec.bytes = {s.attention_bytes, s.kv_projection_bytes, s.expert_slice_bytes, s.dense_slice_bytes};
  spec.kv_slice_bytes = s.kv_slice_bytes;
  spec.tp_pages = s.tp_pages;
  spec.ep_pages = s.ep_pages;
  if (s.expert_ranks != nullptr)
    for (int l = 0; l < s.num_layers; ++l) {
      const int32_t* const of_layer = s.expert_ranks + static_cast<size_t>(l) * static_cast<size_t>(s.num_experts);
      spec.placement.emplace_back(of_layer, of_layer + spec.model.mlps[static_cast<size_t>(l)].num_experts);
    }
  return spec;
}

void check_index(const char* name, int32_t index, int32_t limit) {
  if (index < 0 || index >= limit) fail(Code::kInvalidArgument, "{} is {}, must be from 0 to {}", name, index, limit - 1);
}

std::span<const PagePair> pairs_of(const moebius::Migration& m, Layout to, const moebius_page_pair* pairs, size_t num) {
  check_length("num_pairs", num);
  if (num > 0) not_null(pairs, "pairs");
  const std::span<const PagePair> out(reinterpret_cast<const PagePair*>(pairs), num);
  m.check_pairs(to, out);
  return out;
}

// An array of structs for the caller, whose elements are `stride` bytes apart: the count always, the elements when they fit.
template <class T>
void fill_array(const std::vector<T>& values, T* out, const char* name, size_t capacity, size_t stride, size_t first_size, size_t* out_count) {
  if (out_count != nullptr) *out_count = values.size();
  if (out == nullptr && capacity == 0) return;
  not_null(out, name);
  check_stride(stride, first_size);
  if (capacity < values.size()) fail(Code::kInvalidArgument, "capacity is {}, there are {}", capacity, values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    auto* const element = reinterpret_cast<T*>(reinterpret_cast<char*>(out) + i * stride);
    std::memset(static_cast<void*>(element), 0, stride);
    fill_struct(element, static_cast<uint32_t>(stride), first_size, values[i]);
  }
}

int32_t kind_of(const moebius::Slice& s) {
  using moebius::SliceKind;
  switch (s.kind) {
    case SliceKind::kExpertCut: return MOEBIUS_SLICE_EXPERT;
    case SliceKind::kSharedCut: return MOEBIUS_SLICE_SHARED_EXPERT;
    case SliceKind::kDenseCut: return MOEBIUS_SLICE_DENSE;
    case SliceKind::kAttentionGroup: return MOEBIUS_SLICE_ATTENTION;
    case SliceKind::kKvProjection: return MOEBIUS_SLICE_KV_PROJECTION;
  }
  fail(Code::kInternal, "a slice is of kind {}", static_cast<int>(s.kind));
}

}  // namespace

extern "C" {

moebius_status moebius_plan_create(const moebius_plan_spec* spec, const moebius_config* config, moebius_plan** out_plan, moebius_error** err) {
  return guarded(err, [&] {
    const moebius_plan_spec s = copy_spec(not_null(spec, "spec"));
    not_null(out_plan, "out_plan");
    const moebius::EngineConfig c = config != nullptr ? config->engine : moebius::EngineConfig{};
    if (c.communicator != "peer" || c.rank_processes) fail(Code::kUnsupported, "a plan copies between ranks that read each other's memory");
    const MigrationSpec described = spec_of(s, c);
    check_ranks(described.model, described.counts, c.ranks);
    *out_plan = new moebius_plan{moebius::Migration(described, moebius::open_device(c))};
  });
}

void moebius_plan_destroy(moebius_plan* plan) { delete plan; }

moebius_status moebius_plan_get_info(const moebius_plan* plan, moebius_plan_info* out_info, moebius_error** err) {
  return guarded(err, [&] {
    const moebius::Migration& m = not_null(plan, "plan").migration;
    not_null(out_info, "out_info");
    const ArenaPlan& arena = m.arena();
    moebius_plan_info info{};
    info.ranks = arena.ranks();
    info.num_layers = arena.num_layers();
    info.seam = m.seam();
    info.slices_per_expert = arena.table().counts().cuts;
    info.head_groups = arena.table().counts().head_groups;
    info.tp_pages = arena.tp_pages();
    info.ep_pages = *std::min_element(arena.ep_pages().begin(), arena.ep_pages().end());
    for (int r = 0; r < arena.ranks(); ++r) {
      info.arena_bytes = std::max(info.arena_bytes, arena.arena_bytes(r));
      info.lead_bytes = std::max(info.lead_bytes, arena.lead(r));
    }
    info.to_tp_bytes = m.transfer(Layout::kTp).bytes;
    info.to_ep_bytes = m.transfer(Layout::kEp).bytes;
    fill_struct(out_info, out_info->struct_size, kInfoV1, info);
  });
}

moebius_status moebius_plan_arena_bytes(const moebius_plan* plan, int32_t rank, int64_t* out_bytes, moebius_error** err) {
  return guarded(err, [&] {
    const ArenaPlan& arena = not_null(plan, "plan").migration.arena();
    not_null(out_bytes, "out_bytes");
    check_index("rank", rank, arena.ranks());
    *out_bytes = arena.arena_bytes(rank);
  });
}

moebius_status moebius_plan_verify(const moebius_plan* plan, moebius_error** err) {
  return guarded(err, [&] { not_null(plan, "plan").migration.verify(); });
}

moebius_status moebius_plan_slices(const moebius_plan* plan, int32_t rank, int32_t layer, moebius_slice* out_slices, size_t capacity,
                                   size_t stride, size_t* out_count, moebius_error** err) {
  return guarded(err, [&] {
    const ArenaPlan& arena = not_null(plan, "plan").migration.arena();
    check_index("rank", rank, arena.ranks());
    check_index("layer", layer, arena.num_layers());
    std::vector<moebius_slice> slices;
    for (const moebius::Slice& s : arena.table().layer(layer)) {
      const auto i = static_cast<int>(slices.size());
      slices.push_back({0, kind_of(s), s.index, s.cut, s.bytes, arena.slice_offset(rank, Layout::kTp, layer, i),
                        arena.slice_offset(rank, Layout::kEp, layer, i)});
    }
    fill_array(slices, out_slices, "out_slices", capacity, stride, kSliceV1, out_count);
  });
}

moebius_status moebius_plan_kv_pool(const moebius_plan* plan, moebius_layout layout, int32_t rank, int32_t layer, moebius_kv_pool* out_pool,
                                    moebius_error** err) {
  return guarded(err, [&] {
    const ArenaPlan& arena = not_null(plan, "plan").migration.arena();
    not_null(out_pool, "out_pool");
    const Layout of = layout_of(layout);
    check_index("rank", rank, arena.ranks());
    check_index("layer", layer, arena.num_layers());
    const std::vector<int>& heads = arena.local_kv_heads(rank, of);
    fill_struct(out_pool, out_pool->struct_size, kPoolV1,
                moebius_kv_pool{0, heads.front(), static_cast<int32_t>(heads.size()), 0, arena.kv_offset(rank, of, layer), arena.pages(rank, of)});
  });
}

moebius_status moebius_plan_copies(const moebius_plan* plan, moebius_layout to, int32_t layer, const moebius_page_pair* pairs, size_t num_pairs,
                                   moebius_block_copy* out_copies, size_t capacity, size_t stride, size_t* out_count, moebius_error** err) {
  return guarded(err, [&] {
    const moebius::Migration& m = not_null(plan, "plan").migration;
    const Layout target = layout_of(to);
    check_index("layer", layer, m.arena().num_layers());
    const std::span<const PagePair> blocks = pairs_of(m, target, pairs, num_pairs);
    std::vector<moebius_block_copy> copies;
    for (int r = 0; r < m.arena().ranks(); ++r)
      m.for_each_copy(target, layer, r, blocks, [&](const moebius::BlockCopy& c) {
        copies.push_back({0, c.src_rank, r, 0, c.src_offset, c.dst_offset, c.bytes});
      });
    fill_array(copies, out_copies, "out_copies", capacity, stride, kCopyV1, out_count);
  });
}

moebius_status moebius_plan_copy_next(moebius_plan* plan, moebius_layout to, int32_t rank, void* const* arenas, const moebius_page_pair* pairs,
                                      size_t num_pairs, moebius_error** err) {
  return guarded(err, [&] {
    moebius::Migration& m = not_null(plan, "plan").migration;
    const Layout target = layout_of(to);
    const int32_t ranks = m.arena().ranks();
    if (rank != -1) check_index("rank", rank, ranks);
    not_null(arenas, "arenas");
    std::vector<std::byte*> bases;
    for (int r = 0; r < ranks; ++r) {
      bases.push_back(static_cast<std::byte*>(arenas[r]));
      if (bases.back() == nullptr || reinterpret_cast<uintptr_t>(bases.back()) % moebius::kSliceAlignment != 0)
        fail(Code::kInvalidArgument, "arena {} is NULL or not aligned to {} bytes", r, moebius::kSliceAlignment);
    }
    const std::span<const PagePair> blocks = pairs_of(m, target, pairs, num_pairs);
    for (int r = 0; r < ranks; ++r)
      if (rank == -1 || rank == r) m.copy_next(target, r, bases, blocks);
  });
}

moebius_status moebius_plan_advance(moebius_plan* plan, moebius_layout to, moebius_error** err) {
  return guarded(err, [&] { not_null(plan, "plan").migration.advance(layout_of(to)); });
}

}  // extern "C"
