// The switch alone: a host's own slices and KV, in its own memory, moved layer by layer.
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "moebius/moebius.hpp"
#include "tests/catch.h"

namespace {

using moebius_cpp::Plan;
using Catch::Contains;

constexpr int32_t kLayers = 5, kExperts = 6, kShared = 2, kSlices = 4, kGroups = 4, kKvHeads = 2;
constexpr int64_t kAttention = 192, kProjection = 128, kExpert = 320, kDense = 448, kKv = 256;
constexpr int64_t kTpPages = 9, kEpPages = 5;
const int32_t kExpertsOfLayer[kLayers] = {6, 0, 6, 4, 6};  // the second is dense

moebius_plan_spec spec_of() {
  moebius_plan_spec s{};
  s.struct_size = sizeof s;
  s.num_layers = kLayers;
  s.num_heads = 8;
  s.num_kv_heads = kKvHeads;
  s.num_experts = kExperts;
  s.slices_per_expert = kSlices;
  s.num_shared_experts = kShared;
  s.attention_bytes = kAttention;
  s.kv_projection_bytes = kProjection;
  s.expert_slice_bytes = kExpert;
  s.dense_slice_bytes = kDense;
  s.kv_slice_bytes = kKv;
  s.tp_pages = kTpPages;
  s.ep_pages = kEpPages;
  s.experts_of_layer = kExpertsOfLayer;
  return s;
}

moebius_cpp::Config config_of(int64_t ranks, const char* layout) {
  moebius_cpp::Config c;
  c.set("ranks", ranks).set("layout", std::string(layout));
  return c;
}

// A host: its arenas hold the name of every slice, and of every page's KV, where the plan says they lie.
class Host {
 public:
  Host(const moebius_plan_spec& spec, int64_t ranks, const char* layout, std::vector<moebius_page_pair> pairs)
      : plan_(spec, config_of(ranks, layout)), pairs_(std::move(pairs)) {
    for (int32_t r = 0; r < plan_.info().ranks; ++r) {
      const auto bytes = static_cast<size_t>(plan_.arena_bytes(r));
      memory_.emplace_back(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), std::free);
      std::memset(memory_.back().get(), 0xee, bytes);
      arenas_.push_back(memory_.back().get());
    }
    for (int32_t l = 0; l < kLayers; ++l) visit(l, layout_of(l), [](char* at, int64_t bytes, int name) { std::memset(at, name, static_cast<size_t>(bytes)); });
  }
  Plan& plan() { return plan_; }
  const std::vector<void*>& arenas() const { return arenas_; }
  const std::vector<moebius_page_pair>& pairs() const { return pairs_; }

  int wrong() const {  // bytes that are not what they should be
    int count = 0;
    for (int32_t l = 0; l < kLayers; ++l)
      visit(l, layout_of(l), [&](const char* at, int64_t bytes, int name) {
        for (int64_t i = 0; i < bytes; ++i) count += at[i] != static_cast<char>(name);
      });
    return count;
  }

 private:
  moebius_layout layout_of(int32_t layer) const { return layer < plan_.info().seam ? MOEBIUS_LAYOUT_TP : MOEBIUS_LAYOUT_EP; }
  static int name_of(int a, int b, int c) { return (a * 131 + b * 31 + c * 7 + 1) & 0x7f; }

  template <class F>
  void visit(int32_t layer, moebius_layout layout, F&& f) const {
    for (int32_t r = 0; r < plan_.info().ranks; ++r) {
      char* const arena = static_cast<char*>(arenas_[static_cast<size_t>(r)]);
      for (const moebius_slice& s : plan_.slices(r, layer)) {
        const int64_t at = layout == MOEBIUS_LAYOUT_TP ? s.tp_offset : s.ep_offset;
        if (at >= 0) f(arena + at, s.bytes, name_of(layer, s.kind * 16 + s.index, s.cut));
      }
      const moebius_kv_pool pool = plan_.kv_pool(layout, r, layer);
      for (const moebius_page_pair& p : pairs_) {
        if (layout == MOEBIUS_LAYOUT_EP && p.home != r) continue;
        const int64_t page = layout == MOEBIUS_LAYOUT_TP ? p.tp_page : p.ep_page;
        for (int32_t h = 0; h < pool.num_heads; ++h)
          f(arena + pool.offset + (page * pool.num_heads + h) * kKv, kKv, name_of(layer, 100 + p.tp_page, pool.first_head + h));
      }
    }
  }

  Plan plan_;
  std::vector<moebius_page_pair> pairs_;
  std::vector<std::unique_ptr<void, decltype(&std::free)>> memory_;
  std::vector<void*> arenas_;
};

const std::vector<moebius_page_pair> kPairs = {{0, 1, 0}, {8, 0, 4}, {3, 1, 2}, {5, 0, 0}};

}  // namespace

TEST_CASE("a host's layers move one by one, down and up, and every slice and page is found at every seam") {
  for (const int64_t ranks : {2, 3, 4}) {
    Host host(spec_of(), ranks, "tp", kPairs);
    const moebius_plan_info info = host.plan().info();
    CHECK(info.seam == kLayers);
    CHECK(info.tp_pages == kTpPages);
    CHECK(info.ep_pages == kEpPages);
    CHECK(info.head_groups == kGroups);
    CHECK(info.to_ep_bytes > 0);
    CHECK(host.wrong() == 0);
    std::mt19937 random(7);
    for (const moebius_layout to : {MOEBIUS_LAYOUT_EP, MOEBIUS_LAYOUT_TP, MOEBIUS_LAYOUT_EP})
      for (int l = 0; l < kLayers; ++l) {
        if (random() % 2 == 0) {
          host.plan().copy_next(to, -1, host.arenas(), host.pairs());
        } else {  // each rank by a thread of its own
          std::vector<std::thread> threads;
          for (int32_t r = 0; r < ranks; ++r) threads.emplace_back([&, r] { host.plan().copy_next(to, r, host.arenas(), host.pairs()); });
          for (std::thread& t : threads) t.join();
        }
        CHECK(host.wrong() == 0);  // nothing that is still in use was written
        host.plan().advance(to);
        CHECK(host.wrong() == 0);
      }
    CHECK(host.plan().info().seam == 0);
    host.plan().verify();
    CHECK_THROWS_WITH(host.plan().copy_next(MOEBIUS_LAYOUT_EP, -1, host.arenas()), Contains("all 5 layers are in ep already"));
    CHECK_THROWS_WITH(host.plan().advance(MOEBIUS_LAYOUT_EP), Contains("all 5 layers"));
  }
}

TEST_CASE("a plan names each slice's kind, index, cut and bytes, and who has it") {
  const Plan plan(spec_of(), config_of(3, "tp"));
  for (int32_t l = 0; l < kLayers; ++l) {
    std::vector<std::array<int64_t, 4>> expected;  // kind, index, cut, bytes
    for (int32_t a = 0; a < kGroups; ++a) expected.push_back({MOEBIUS_SLICE_ATTENTION, a, 0, kAttention});
    for (int32_t h = 0; h < kKvHeads; ++h) expected.push_back({MOEBIUS_SLICE_KV_PROJECTION, h, 0, kProjection});
    const int32_t experts = kExpertsOfLayer[l];
    for (int32_t e = 0; e < (experts == 0 ? 1 : experts + kShared); ++e)
      for (int32_t c = 0; c < kSlices; ++c)
        if (experts == 0) expected.push_back({MOEBIUS_SLICE_DENSE, 0, c, kDense});
        else expected.push_back({e < experts ? MOEBIUS_SLICE_EXPERT : MOEBIUS_SLICE_SHARED_EXPERT, e, c, kExpert});
    std::vector<int> in_tp(expected.size()), in_ep(expected.size());
    for (int32_t r = 0; r < 3; ++r) {
      const std::vector<moebius_slice> slices = plan.slices(r, l);
      REQUIRE(slices.size() == expected.size());
      for (size_t i = 0; i < slices.size(); ++i) {
        const moebius_slice& s = slices[i];
        CHECK(std::array<int64_t, 4>{s.kind, s.index, s.cut, s.bytes} == expected[i]);
        in_tp[i] += s.tp_offset >= 0;
        in_ep[i] += s.ep_offset >= 0;
      }
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      const bool kv = expected[i][0] == MOEBIUS_SLICE_KV_PROJECTION;  // wherever a group reads its head
      CHECK((kv ? in_tp[i] >= 1 : in_tp[i] == 1));
      CHECK(in_ep[i] == (expected[i][0] == MOEBIUS_SLICE_EXPERT ? 1 : 3));
    }
  }
}

TEST_CASE("the copies of a plan, done by the host itself, are the same; a move can be taken back") {
  std::vector<int32_t> placement(kLayers * kExperts);
  for (size_t i = 0; i < placement.size(); ++i) placement[i] = static_cast<int32_t>((i * 5 + i / 7) % 3);
  moebius_plan_spec spec = spec_of();
  spec.expert_ranks = placement.data();
  Host host(spec, 3, "ep", kPairs);
  for (int32_t l = 0; l < kLayers; ++l) {
    int64_t bytes = 0;
    for (const moebius_block_copy& c : host.plan().copies(MOEBIUS_LAYOUT_TP, l, host.pairs())) {
      std::memcpy(static_cast<char*>(host.arenas()[static_cast<size_t>(c.dst_rank)]) + c.dst_offset,
                  static_cast<char*>(host.arenas()[static_cast<size_t>(c.src_rank)]) + c.src_offset, static_cast<size_t>(c.bytes));
      bytes += c.bytes;
    }
    CHECK(bytes > 0);
    host.plan().advance(MOEBIUS_LAYOUT_TP);
    CHECK(host.wrong() == 0);
    if (l == 2) {  // back and there again: the old places are intact
      host.plan().advance(MOEBIUS_LAYOUT_EP);
      CHECK(host.wrong() == 0);
      host.plan().advance(MOEBIUS_LAYOUT_TP);
    }
  }
  CHECK(host.plan().info().seam == kLayers);
  for (int32_t l = 0; l < kLayers; ++l)
    for (int32_t r = 0; r < 3; ++r)
      for (const moebius_slice& s : host.plan().slices(r, l))
        if (s.kind == MOEBIUS_SLICE_EXPERT) CHECK((s.ep_offset >= 0) == (placement[static_cast<size_t>(l * kExperts + s.index)] == r));
}

TEST_CASE("a plan fills the memory it is given, and says by how much it is short") {
  moebius_plan_spec spec = spec_of();
  spec.tp_pages = spec.ep_pages = 0;
  moebius_cpp::Config config = config_of(4, "tp");
  CHECK_THROWS_WITH(Plan(spec, config), Contains("memory_bytes"));
  config.set("memory_bytes", int64_t{1} << 20);
  const Plan plan(spec, config);
  const moebius_plan_info info = plan.info();
  CHECK(info.arena_bytes <= 1 << 20);
  CHECK(info.arena_bytes > (1 << 20) * 9 / 10);
  CHECK(info.ep_pages >= info.tp_pages / 4);
  CHECK(info.lead_bytes < info.arena_bytes / 3);
  config.set("memory_bytes", int64_t{1000});
  CHECK_THROWS_WITH(Plan(spec, config), Contains("bytes short"));
  spec.tp_pages = spec.ep_pages = 1000;
  CHECK_THROWS_WITH(Plan(spec, config), Contains("bytes short"));
  spec.tp_pages = spec.ep_pages = 0;
  spec.kv_slice_bytes = 0;  // weights alone
  config.set("memory_bytes", int64_t{0});
  CHECK(Plan(spec, config).info().tp_pages == 0);
}

TEST_CASE("a description that cannot be is refused with its number") {
  const auto refused = [](auto&& change, const char* text, int64_t ranks = 2) {
    moebius_plan_spec spec = spec_of();
    change(spec);
    CHECK_THROWS_WITH(Plan(spec, config_of(ranks, "tp")), Contains(text));
  };
  refused([](auto& s) { s.num_layers = 0; }, "num_layers is 0");
  refused([](auto& s) { s.slices_per_expert = s.num_experts = s.num_layers = 65536, s.experts_of_layer = nullptr; }, "slices of");
  refused([](auto& s) { s.expert_slice_bytes = int64_t{1} << 60; }, "at most");
  refused([](auto& s) { s.tp_pages = int64_t{1} << 60; }, "at most");
  refused([](auto& s) { s.kv_slice_bytes = int64_t{1} << 61; }, "at most");
  refused([](auto& s) { s.attention_bytes = INT64_MAX / 64 * 64; }, "at most");
  refused([](auto& s) { s.attention_bytes = 0; }, "attention_bytes is 0, must be a multiple of 64 above 0");
  refused([](auto& s) { s.dense_slice_bytes = 0; }, "dense_slice_bytes is 0");
  refused([](auto& s) { s.ep_pages = 0; }, "tp_pages is 9 and ep_pages 0");
  refused([](auto& s) { s.attention_bytes = 100; }, "attention_bytes is 100, must be a multiple of 64");
  refused([](auto& s) { s.head_groups = 3; }, "head_groups is 3");
  refused([](auto& s) { s.num_kv_heads = 3; }, "8 query heads cannot share 3 KV heads");
  refused([](auto& s) { s.num_shared_experts = -1; }, "num_shared_experts is -1");
  refused([](auto&) {}, "5 ranks are too many", 5);
  static const int32_t many[kLayers] = {6, 7, 6, 6, 6};
  refused([](auto& s) { s.experts_of_layer = many; }, "experts_of_layer[1] is 7");
  static const std::vector<int32_t> nowhere(kLayers * kExperts, 2);
  refused([](auto& s) { s.expert_ranks = nowhere.data(); }, "is rank 2 of 2");

  Plan plan(spec_of(), config_of(2, "tp"));
  CHECK_THROWS_WITH(plan.copies(MOEBIUS_LAYOUT_EP, 5), Contains("layer is 5, must be from 0 to 4"));
  CHECK_THROWS_WITH(plan.copies(MOEBIUS_LAYOUT_EP, 0, {{0, 0, 0}, {1, 0, 0}}), Contains("written twice"));
  CHECK_THROWS_WITH(plan.copies(MOEBIUS_LAYOUT_TP, 0, {{kTpPages, 0, 0}}), Contains("out of range"));
  CHECK_THROWS_WITH(plan.slices(2, 0), Contains("rank is 2"));
  alignas(64) char memory[64];
  CHECK_THROWS_WITH(plan.copy_next(MOEBIUS_LAYOUT_EP, -1, {memory, memory + 8}), Contains("arena 1 is NULL or not aligned to 64"));
  CHECK_THROWS_WITH(plan.copy_next(MOEBIUS_LAYOUT_EP, 2, {memory, memory}), Contains("rank is 2"));
  size_t count = 0;
  moebius_slice few[2] = {};
  CHECK(moebius_plan_slices(plan.get(), 0, 0, few, 2, sizeof few[0], &count, nullptr) == MOEBIUS_E_INVALID_ARGUMENT);
  CHECK(count == plan.slices(0, 0).size());
  CHECK(few[0].struct_size == 0);
}
