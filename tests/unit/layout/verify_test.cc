// The verifier refuses every plan that was spoilt, and only those.
#include "lib/layout/verify.h"

#include "lib/base/error.h"
#include "tests/catch.h"

#include "tests/unit/layout/cases.h"

namespace moebius::layout_test {
namespace {

bool overlap(Range a, Range b) { return !a.empty() && !b.empty() && a.begin < b.end && b.begin < a.end; }

// The slow way: every seam, both directions, the new region against everything live, one by one.
bool safe_at_every_seam(const ArenaPlan& arena) {
  const int n = arena.num_layers();
  for (int r = 0; r < arena.ranks(); ++r) {
    const auto region = [&](Layout layout, int l) { return arena.item_range(r, layout, l); };
    for (int seam = 0; seam <= n; ++seam) {
      std::vector<Range> live{{0, arena.kept_bytes(r)}};
      for (int l = 0; l < n; ++l) live.push_back(region(l < seam ? Layout::kTp : Layout::kEp, l));
      for (size_t i = 0; i < live.size(); ++i) {
        if (i > 0 && (live[i].begin < arena.kept_bytes(r) || live[i].end > arena.arena_bytes(r))) return false;  // empty ones too
        for (size_t j = 0; j < i; ++j)
          if (overlap(live[i], live[j])) return false;
        if (seam < n && overlap(live[i], region(Layout::kTp, seam))) return false;
        if (seam > 0 && overlap(live[i], region(Layout::kEp, seam - 1))) return false;
      }
    }
  }
  return true;
}

bool accepted(const ArenaPlan& arena) {
  try {
    verify_arena(arena);
  } catch (const Error& e) {
    REQUIRE(e.code() == Code::kInternal);
    return false;
  }
  return true;
}

}  // namespace

TEST_CASE("the verifier says of any displaced region what trying every seam says") {
  int spoilt = 0, harmless = 0;
  repeat(4000, [&](Random& random) {
    const Case c = random_case(random);
    ArenaPlan arena = arena_of(c);
    REQUIRE(safe_at_every_seam(arena));
    const int rank = random.below(c.ranks), layer = random.below(arena.num_layers());
    const int64_t by = kPoolAlignment * random.from(-6, 6);
    if (random.once_in(3)) ArenaSabotage{arena}.arena_bytes(rank) += 4 * kPoolAlignment;  // room to move
    if (random.once_in(4))
      ArenaSabotage{arena}.wrong_lead(rank, by);
    else
      ArenaSabotage{arena}.shift(rank, random.below(2) ? Layout::kTp : Layout::kEp, layer, by);
    const bool safe = safe_at_every_seam(arena);
    REQUIRE(accepted(arena) == safe);
    ++(safe ? harmless : spoilt);
  });
  CHECK(spoilt > 500 / kThinned);
  CHECK(harmless > 200 / kThinned);
}

TEST_CASE("the verifier catches a lead that is 64 bytes short, on any rank") {
  for (int rank : {0, 1}) {
    ArenaPlan arena = arena_of(plain_case());
    ArenaSabotage{arena}.wrong_lead(rank, -64);
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("overlaps") && Catch::Contains("rank " + std::to_string(rank)));
  }
  repeat(500, [](Random& random) {
    const Case c = random_case(random);
    ArenaPlan arena = arena_of(c);
    const int rank = random.below(c.ranks);
    if (arena.lead(rank) == 0) return;  // both layouts of every item are the same, or nothing moves in TP
    ArenaSabotage{arena}.wrong_lead(rank, -64);
    REQUIRE_FALSE(accepted(arena));
  });
}

TEST_CASE("the verifier catches parts of an item that overlap, lie outside it or are not aligned") {
  const Case c = plain_case();
  const SliceTable table = c.table();
  ArenaPlan arena = arena_of(c);
  ArenaSabotage s{arena};
  const int cut2 = table.expert_cut(0, 2), cut3 = table.expert_cut(0, 3);  // moving: rank 1's in TP, rank 0's in EP
  SECTION("two slices at one place") {
    s.offset(0, Layout::kEp, 1, cut3) = arena.slice_offset(0, Layout::kEp, 1, cut2);
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("overlaps") && Catch::Contains("item 1"));
  }
  SECTION("two slices overlapping by a cache line") {
    s.offset(0, Layout::kEp, 1, cut3) -= 64;
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("overlaps"));
  }
  SECTION("a slice in the region of another item") {
    s.offset(0, Layout::kEp, 1, cut2) = arena.item_range(0, Layout::kEp, 0).begin;
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("outside"));
  }
  SECTION("a slice between cache lines") {
    s.offset(0, Layout::kEp, 1, cut2) += 32;
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("aligned"));
  }
  SECTION("a KV pool over the weights") {
    s.kv_offset(1, Layout::kTp, 1) -= kPoolAlignment;
    CHECK_THROWS_AS(verify_arena(arena), Error);
  }
  SECTION("a KV pool beyond its item") {
    s.kv_offset(1, Layout::kTp, 1) += kPoolAlignment;
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("outside"));
  }
  SECTION("a KV pool that is not aligned") {
    s.kv_offset(1, Layout::kTp, 1) += 64;
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("aligned"));
  }
  SECTION("a region outside the arena") {
    s.shift(1, Layout::kEp, 3, arena.arena_bytes(1));
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("outside"));
  }
  SECTION("a kept slice with two places") {
    s.offset(0, Layout::kEp, 0, table.attention(0)) = arena.kept_bytes(0) - 64;
    CHECK_THROWS_AS(verify_arena(arena), Error);
  }
  SECTION("a kept slice moved onto another") {
    for (Layout layout : {Layout::kTp, Layout::kEp})
      s.offset(0, layout, 0, table.attention(0)) = arena.slice_offset(0, layout, 0, table.attention(1));
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("kept zone") && Catch::Contains("overlaps"));
  }
  SECTION("a slice that is owned and has no place") {
    s.offset(0, Layout::kEp, 1, cut2) = -1;
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("owned"));
  }
  SECTION("a KV head that is owned and not held") {
    s.kv_heads(0, Layout::kTp).clear();
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("KV head 0"));
  }
}

TEST_CASE("owners under which a slice would be lost are refused") {
  const Case c = plain_case();
  const SliceTable table = c.table();
  const auto plan = [&](const Owners& tp, const Owners& ep) { plan_arena(table, tp, ep, c.kv_slice, c.tp_pages, c.ep_pages); };
  const Owners tp = tp_owners(table, 2), ep = ep_owners(table, 2);
  plan(tp, ep);
  Owners spoilt = ep;
  spoilt.slices[1][static_cast<size_t>(table.expert_cut(2, 0))] = 0;
  CHECK_THROWS_WITH(plan(tp, spoilt), Catch::Contains("layer 1") && Catch::Contains("0x0"));
  spoilt = ep;
  spoilt.slices[1][static_cast<size_t>(table.expert_cut(2, 0))] = 4;  // a third rank
  CHECK_THROWS_AS(plan(tp, spoilt), Error);
  spoilt = tp;
  spoilt.slices[0][static_cast<size_t>(table.attention(0))] = 2;  // its KV head lies with rank 0
  CHECK_THROWS_AS(plan(spoilt, ep), Error);
}

TEST_CASE("the verifier catches a transfer that does not bring each gained slice once to its place") {
  const Case c = plain_case();
  const SliceTable table = c.table();
  ArenaPlan arena = arena_of(c);
  TransferPlan plan = plan_transfer(arena, Layout::kEp);
  verify_transfer(arena, plan);
  std::vector<BlockCopy>& list = plan.items[0].to[0];
  REQUIRE_FALSE(list.empty());
  SECTION("a block forgotten") {
    list.pop_back();
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("gains"));
  }
  SECTION("a block twice") {
    list.push_back(list.back());
    CHECK_THROWS_AS(verify_transfer(arena, plan), Error);
  }
  SECTION("one slice twice and another not at all") {
    REQUIRE(list.size() == 1);
    const int64_t bytes = table.layer(0)[static_cast<size_t>(table.expert_cut(2, 0))].bytes;
    BlockCopy first = list[0];
    first.bytes = bytes;
    list[0].bytes -= bytes;
    list.push_back(first);
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("overlaps"));
  }
  SECTION("a block 64 bytes short") {
    list.back().bytes -= 64;
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("whole slices"));
  }
  SECTION("a block 64 bytes long") {
    list.back().bytes += 64;
    CHECK_THROWS_AS(verify_transfer(arena, plan), Error);
  }
  SECTION("a source 64 bytes off") {
    list.back().src_offset += 64;
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("whole slices"));
  }
  SECTION("a destination 64 bytes off") {
    list.back().dst_offset += 64;
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("its place is"));
  }
  SECTION("a source that never had the slice") {
    list.back().src_rank = 0;
    CHECK_THROWS_AS(verify_transfer(arena, plan), Error);
  }
  SECTION("a rank that does not exist") {
    list.back().src_rank = 2;
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("rank 2 of 2"));
  }
  SECTION("a kept slice instead of a gained one") {
    const int group = table.attention(0);  // rank 0 has it in both layouts, rank 1 in EP
    list.back() = {1, arena.slice_offset(1, Layout::kEp, 0, group), arena.slice_offset(0, Layout::kTp, 0, group),
                   table.layer(0)[static_cast<size_t>(group)].bytes};
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("had before"));
  }
  SECTION("a wrong total") {
    plan.bytes += 64;
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("counts"));
  }
  SECTION("an item too many") {
    plan.items.push_back(plan.items.back());
    CHECK_THROWS_AS(verify_transfer(arena, plan), Error);
  }
  SECTION("an arena changed since: two offsets swapped, disjoint as before") {
    plan = plan_transfer(arena, Layout::kTp);
    ArenaSabotage s{arena};
    std::swap(s.offset(0, Layout::kEp, 1, table.expert_cut(0, 2)), s.offset(0, Layout::kEp, 1, table.expert_cut(0, 3)));
    verify_arena(arena);
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("its place is"));
  }
}

TEST_CASE("page lists are checked for range and for pages that would be written twice") {
  const std::vector<int64_t> ep = {4, 0, 3};
  const auto refused = [&](const std::vector<PagePair>& pairs, Layout to) {
    try {
      PageVerifier(5, ep).verify(pairs, to);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const std::vector<PagePair> shared = {{1, 0, 0}, {1, 2, 0}};  // one TP page, a copy in each home
  CHECK(refused(shared, Layout::kEp).empty());
  CHECK_THAT(refused(shared, Layout::kTp), Catch::Contains("twice"));
  CHECK(refused({{4, 0, 3}, {0, 2, 2}}, Layout::kTp).empty());  // last pages
  CHECK(refused({{4, 0, 3}, {4, 2, 2}}, Layout::kEp).empty());
  CHECK(refused({}, Layout::kTp).empty());
  CHECK_THAT(refused({{1, 0, 2}, {2, 0, 2}}, Layout::kEp), Catch::Contains("twice"));
  CHECK(refused({{1, 0, 2}, {2, 0, 2}}, Layout::kTp).empty());  // two TP pages from one EP page write nothing twice
  for (const PagePair outside : {PagePair{1, 0, 4}, {5, 0, 0}, {-1, 0, 0}, {1, -1, 0}, {1, 3, 0}, {1, 1, 0}, {1, 0, -1}, {1, 2, 3}})
    for (Layout to : {Layout::kTp, Layout::kEp}) CHECK_THAT(refused({outside}, to), Catch::Contains("out of range"));
}

}  // namespace moebius::layout_test
