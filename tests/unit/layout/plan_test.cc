// Arenas and transfers as they are planned: the rule, minimal bytes, capacities.
#include <bit>
#include <map>
#include <numeric>

#include "lib/base/error.h"
#include "tests/catch.h"

#include "tests/unit/layout/cases.h"

namespace moebius::layout_test {
namespace {

// Slices that gained a rank, once per new owner, and their bytes.
std::pair<int64_t, int64_t> gains(const ArenaPlan& arena, Layout to) {
  int64_t slices = 0, bytes = 0;
  for (size_t l = 0; l < static_cast<size_t>(arena.num_layers()); ++l)
    for (size_t s = 0; s < arena.table().layer(static_cast<int>(l)).size(); ++s) {
      const RankSet gained = arena.owners(to).slices[l][s] & ~arena.owners(other(to)).slices[l][s];
      slices += std::popcount(gained);
      bytes += std::popcount(gained) * arena.table().layer(static_cast<int>(l))[s].bytes;
    }
  return {slices, bytes};
}

void require_minimal(const ArenaPlan& arena, Layout from) {
  const TransferPlan plan = plan_transfer(arena, from);
  const auto [slices, bytes] = gains(arena, plan.to);
  REQUIRE(plan.num_slices == slices);
  REQUIRE(plan.bytes == bytes);
  int64_t listed = 0;
  for (size_t l = 0; l < plan.items.size(); ++l)
    for (int dst = 0; dst < arena.ranks(); ++dst)
      for (const BlockCopy& copy : plan.items[l].to[static_cast<size_t>(dst)]) {
        const Range item = arena.item_range(dst, plan.to, static_cast<int>(l));
        REQUIRE(copy.src_rank != dst);                      // no weight is relocated inside its rank
        REQUIRE(copy.dst_offset >= arena.kept_bytes(dst));  // no kept slice is written
        REQUIRE((copy.dst_offset >= item.begin && copy.dst_offset + copy.bytes <= item.end));
        listed += copy.bytes;
      }
  REQUIRE(listed == bytes);
}

struct Published {
  ModelShape model;
  SliceTable table{model, slice_counts(model, 0)};
  Owners tp = tp_owners(table, 8), ep = ep_owners(table, 8);
  int64_t memory = int64_t{130} << 30, slice = KvSlice{16, 128}.bytes();
  Capacity capacity = plan_capacity(table, tp, ep, slice, std::vector<int64_t>(8, memory));
  ArenaPlan arena = plan_arena(table, tp, ep, slice, capacity.tp_pages, capacity.ep_pages);
};

}  // namespace

TEST_CASE("the arena rule holds for any sizes, also empty ones, with the least lead") {
  repeat(10000, [](Random& random) {
    std::vector<int64_t> tp, ep;
    for (int n = random.from(0, 12); n > 0; --n) {
      tp.push_back(random.below(3) ? random.below(1000) : 0);
      ep.push_back(random.below(3) ? random.below(1000) : 0);
    }
    const StreamLayout s = lay_out_stream(tp, ep);
    bool tight = s.lead == 0;
    for (size_t k = 0; k < tp.size(); ++k) {
      REQUIRE((s.tp[k].size() == tp[k] && s.ep[k].size() == ep[k]));
      REQUIRE(s.tp[k].begin == (k == 0 ? 0 : s.tp[k - 1].end));
      REQUIRE(s.ep[k].begin == (k == 0 ? s.lead : s.ep[k - 1].end));
      REQUIRE(s.tp[k].end <= s.ep[k].begin);
      REQUIRE((s.ep[k].end <= s.bytes && s.tp[k].end <= s.bytes));
      tight |= s.tp[k].end == s.ep[k].begin;
    }
    REQUIRE(tight);
  });
}

TEST_CASE("ten thousand random plans pass the verifier and copy exactly the slices that gained a rank") {
  int replicated = 0, unequal = 0, placed = 0;
  repeat(10000, [&](Random& random) {
    const Case c = random_case(random);
    const ArenaPlan arena = arena_of(c);  // verified when made, as are transfers
    for (Layout from : {Layout::kTp, Layout::kEp}) require_minimal(arena, from);
    replicated += c.ranks > c.model.num_kv_heads;
    unequal += c.counts.cuts % c.ranks != 0 || c.counts.head_groups % c.ranks != 0;
    placed += !c.placement.empty();
  });
  CHECK(std::min({replicated, unequal, placed}) > 500 / kThinned);  // the cases are what they should be
}

TEST_CASE("with one rank nothing moves") {
  Case c = plain_case();
  c.ranks = 1;
  c.ep_pages = {7};
  const ArenaPlan arena = arena_of(c);
  CHECK(plan_transfer(arena, Layout::kTp).bytes == 0);
  CHECK(plan_transfer(arena, Layout::kEp).bytes == 0);
}

TEST_CASE("adjacent slices are copied as one block") {
  const ArenaPlan arena = arena_of(plain_case());  // each rank has two of four cuts: a pair per expert
  const TransferPlan plan = plan_transfer(arena, Layout::kTp);
  size_t blocks = 0;
  for (const ItemTransfer& item : plan.items)
    for (const auto& list : item.to) blocks += list.size();
  CHECK(static_cast<int64_t>(blocks) < plan.num_slices);
}

TEST_CASE("a slice with several old owners is read from them evenly") {
  const ArenaPlan arena = arena_of(replicated_case());
  const TransferPlan plan = plan_transfer(arena, Layout::kTp);
  for (const ItemTransfer& item : plan.items) {
    std::vector<int64_t> read(8, 0);
    for (const auto& list : item.to)
      for (const BlockCopy& copy : list) read[static_cast<size_t>(copy.src_rank)] += copy.bytes;
    const auto [least, most] = std::minmax_element(read.begin(), read.end());
    CHECK(*most - *least <= arena.table().layer(0)[static_cast<size_t>(arena.table().kv_projection(0))].bytes);
  }
}

TEST_CASE("replicated KV is read from its owners in turn, by page, and by an owner from itself") {
  const ArenaPlan arena = arena_of(replicated_case());
  std::map<int, int> reads;
  for (int32_t page = 0; page < 4; ++page)  // home 7 owns a replica of head 1 only
    for_each_kv_block(arena, Layout::kEp, 0, 7, {page, 7, page}, [&](const BlockCopy& copy, bool local) {
      ++reads[copy.src_rank];
      CHECK(local == (copy.src_rank == 7));
    });
  CHECK(reads == std::map<int, int>{{0, 1}, {1, 1}, {2, 1}, {3, 1}, {7, 4}});
  for (int dst = 0; dst < 8; ++dst) {  // back: each rank its own head, from the home
    int copies = 0;
    for_each_kv_block(arena, Layout::kTp, 0, dst, {1, 7, 2}, [&](const BlockCopy& copy, bool local) {
      ++copies;
      CHECK(copy.src_rank == 7);
      CHECK(copy.bytes == arena.kv_slice_bytes());
      CHECK(copy.src_offset == arena.kv_offset(7, Layout::kEp, 0) + (2 * 2 + dst / 4) * arena.kv_slice_bytes());
      CHECK(copy.dst_offset == arena.kv_offset(dst, Layout::kTp, 0) + 1 * arena.kv_slice_bytes());
      CHECK(local == (dst == 7));
    });
    CHECK(copies == 1);
  }
  for_each_kv_block(arena, Layout::kEp, 0, 6, {1, 7, 1}, [](const BlockCopy&, bool) { FAIL("only the home takes an EP page"); });
}

TEST_CASE("capacity takes the last page that fits, and says how many bytes are missing for the first") {
  repeat(300, [](Random& random) {
    Case c = random_case(random);
    const SliceTable table = c.table();
    const Owners tp = tp_owners(table, c.ranks), ep = ep_owners(table, c.ranks, c.placement);
    c.tp_pages = 1;
    c.ep_pages.assign(static_cast<size_t>(c.ranks), 1);
    const ArenaPlan least = arena_of(c);
    std::vector<int64_t> memory;
    for (int r = 0; r < c.ranks; ++r) memory.push_back(least.arena_bytes(r) + random.below(random.once_in(4) ? 1 : 2000000));
    const Capacity capacity = plan_capacity(table, tp, ep, c.kv_slice, memory);
    const ArenaPlan arena = plan_arena(table, tp, ep, c.kv_slice, capacity.tp_pages, capacity.ep_pages);
    Capacity more = capacity;
    for (int64_t& pages : more.ep_pages) ++pages;
    const ArenaPlan larger = plan_arena(table, tp, ep, c.kv_slice, more.tp_pages, more.ep_pages);
    for (int r = 0; r < c.ranks; ++r) {
      REQUIRE((capacity.tp_pages >= 1 && capacity.ep_pages[static_cast<size_t>(r)] >= 1));
      REQUIRE(arena.arena_bytes(r) <= memory[static_cast<size_t>(r)]);
      REQUIRE(larger.arena_bytes(r) > memory[static_cast<size_t>(r)]);
    }
    const int poor = random.below(c.ranks);
    const int shortage = random.from(1, 5000);
    memory[static_cast<size_t>(poor)] = least.arena_bytes(poor) - shortage;
    REQUIRE_THROWS_WITH(plan_capacity(table, tp, ep, c.kv_slice, memory),
                        Catch::Contains(fmt::format("rank {} ", poor)) && Catch::Contains(fmt::format(" {} bytes short", shortage)));
  });
}

TEST_CASE("numbers of pages that no arena holds are refused before they overflow") {
  const Case c = plain_case();
  const SliceTable table = c.table();
  const auto plan = [&](int64_t tp_pages, int64_t ep_pages) {
    plan_arena(table, tp_owners(table, 2), ep_owners(table, 2), c.kv_slice, tp_pages, {1, ep_pages});
  };
  plan(int64_t{1} << 40, 1);
  CHECK_THROWS_AS(plan(INT64_MAX / 2, 1), Error);
  CHECK_THROWS_WITH(plan(1, INT64_MAX), Catch::Contains("rank 1") && Catch::Contains(std::to_string(INT64_MAX)));
  CHECK_THROWS_AS(plan(-1, 1), Error);
  const Capacity boundless = plan_capacity(table, tp_owners(table, 2), ep_owners(table, 2), c.kv_slice, {INT64_MAX, INT64_MAX});
  CHECK(boundless.tp_pages <= INT32_MAX);
  CHECK(boundless.ep_pages[1] <= INT32_MAX);
}

// Design figures for 8 ranks of 130 GiB, pages of 16 tokens, before workspace. Tokens come in whole pages; the lead is one item
// (1,312 MiB) and what the TP stream is longer than the EP stream because pages are whole.
TEST_CASE("published models on 8 ranks: lead and capacities are those of the design") {
  SECTION("Qwen3-235B-A22B") {
    const Published p{model_of(4096, 64, 4, 128, std::vector<MlpShape>(94, {128, 1536}))};
    CHECK(p.capacity.ep_pages == std::vector<int64_t>(8, 353387 / 16));
    CHECK(p.capacity.tp_pages == 1655215 / 16);
    CHECK(static_cast<double>(p.arena.lead(0)) / (1 << 20) == Approx(1312).margin(3));
    CHECK(static_cast<double>(p.arena.lead(0)) <= 0.0102 * static_cast<double>(p.memory));
  }
  SECTION("Qwen3-30B-A3B") {
    const Published p{model_of(2048, 32, 4, 128, std::vector<MlpShape>(48, {128, 768}))};
    const double share = static_cast<double>(p.capacity.tp_pages) / (8.0 * static_cast<double>(p.capacity.ep_pages[0]));
    CHECK(share == Approx(0.51).margin(0.005));  // KV heads are held twice in TP
    CHECK(static_cast<double>(p.arena.lead(0)) <= 0.024 * static_cast<double>(p.memory));
  }
}

}  // namespace moebius::layout_test
