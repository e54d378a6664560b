// Which slices a model has and who owns them.
#include <array>
#include <bit>

#include "lib/base/error.h"
#include "tests/catch.h"

#include "tests/unit/layout/cases.h"

namespace moebius::layout_test {
namespace {

// first[ranks + 1]: the run of head groups of each rank; fails where owners are no runs.
std::vector<int> runs(const SliceTable& table, const Owners& tp) {
  std::vector<int> first{0};
  const auto owner = [&](int a) { return tp.slices[0][static_cast<size_t>(table.attention(a))]; };
  for (int a = 0; a < table.counts().head_groups; ++a) {
    REQUIRE(std::popcount(owner(a)) == 1);
    const int rank = std::countr_zero(owner(a));
    const int current = static_cast<int>(first.size()) - 1;
    REQUIRE((rank == current || (rank == current + 1 && a > 0)));
    if (rank > current) first.push_back(a);
  }
  first.push_back(table.counts().head_groups);
  return first;
}

struct Fullest {
  int kv_heads = 0, groups = 0;
  bool operator==(const Fullest&) const = default;
};

int kv_heads_in(const SliceTable& t, int begin, int end) { return t.kv_head_of_group(end - 1) - t.kv_head_of_group(begin) + 1; }

Fullest fullest(const SliceTable& t, const std::vector<int>& first) {
  Fullest f;
  for (size_t r = 0; r + 1 < first.size(); ++r) {
    f.kv_heads = std::max(f.kv_heads, kv_heads_in(t, first[r], first[r + 1]));
    f.groups = std::max(f.groups, first[r + 1] - first[r]);
  }
  return f;
}

// Whether any deal into non-empty runs keeps both limits: tries every bound.
bool possible(const SliceTable& t, int ranks, Fullest limits) {
  const int groups = t.counts().head_groups;
  std::vector<bool> reached(static_cast<size_t>(groups) + 1, false);
  reached[0] = true;
  for (int r = 0; r < ranks; ++r) {
    std::vector<bool> next(reached.size(), false);
    for (int begin = 0; begin < groups; ++begin)
      for (int end = begin + 1; reached[static_cast<size_t>(begin)] && end <= std::min(groups, begin + limits.groups); ++end)
        if (kv_heads_in(t, begin, end) <= limits.kv_heads) next[static_cast<size_t>(end)] = true;
    reached = next;
  }
  return reached.back();
}

Fullest best(const SliceTable& t, int ranks) {
  Fullest limits{1, t.counts().head_groups};
  while (!possible(t, ranks, limits)) ++limits.kv_heads;
  limits.groups = 1;
  while (!possible(t, ranks, limits)) ++limits.groups;
  return limits;
}

}  // namespace

TEST_CASE("cuts and head groups follow from the model and one setting") {
  const auto counts = [](std::vector<MlpShape> mlps, int heads, int kv, int setting = 0) {
    const SliceCounts c = slice_counts(model_of(128, heads, kv, 32, std::move(mlps)), setting);
    return std::array<int, 2>{c.cuts, c.head_groups};
  };
  using Pair = std::array<int, 2>;
  CHECK(counts({{16, 128}}, 8, 2) == Pair{4, 4});
  CHECK(counts({{16, 512}}, 16, 4) == Pair{4, 4});
  CHECK(counts({{16, 760}}, 32, 4) == Pair{4, 4});  // 8 would leave 95 neurons
  CHECK(counts({{16, 768}}, 32, 4) == Pair{8, 8});
  CHECK(counts({{16, 1536}}, 64, 4) == Pair{8, 8});
  CHECK(counts({{8, 14336}}, 32, 8) == Pair{8, 8});
  CHECK(counts({{16, 80}}, 6, 3) == Pair{4, 6});  // 3 groups are fewer than 4
  CHECK(counts({{16, 6}}, 8, 8) == Pair{2, 8});
  CHECK(counts({{16, 7}}, 8, 4) == Pair{1, 4});
  CHECK(counts({{16, 1004}}, 8, 4) == Pair{4, 4});  // 8 does not divide it
  CHECK(counts({{16, 768}, {0, 6144}}, 32, 4) == Pair{8, 8});
  CHECK(counts({{16, 768}, {0, 512}}, 32, 4) == Pair{4, 4});   // the narrowest MLP decides
  CHECK(counts({{16, 768}, {0, 1026}}, 32, 4) == Pair{2, 4});  // 2 is the most that divides both
  CHECK(counts({{16, 128}}, 8, 2, 8) == Pair{8, 8});
  CHECK(counts({{16, 128}}, 4, 2, 8) == Pair{8, 4});
  CHECK(counts({{16, 768}}, 24, 4, 6) == Pair{6, 8});
  CHECK_THROWS_WITH(counts({{16, 128}, {16, 80}}, 6, 3, 32), Catch::Contains("32") && Catch::Contains("80") && Catch::Contains("layer 1"));
  CHECK_THROWS_WITH(counts({{16, 128}}, 8, 2, -4), Catch::Contains("-4"));
  CHECK_THROWS_WITH(counts({{16, 0}}, 8, 2), Catch::Contains(" 0 neurons"));
  CHECK_THROWS_WITH(counts({{16, 128}}, 8, 3), Catch::Contains("8 query heads") && Catch::Contains("3 KV heads"));
  CHECK_THROWS_AS(counts({{16, 128}}, 0, 1), Error);
}

TEST_CASE("too many ranks are refused with the three numbers and the setting that helps") {
  const auto refusal = [](const ModelShape& model, SliceCounts counts, int ranks) {
    try {
      check_ranks(model, counts, ranks);
    } catch (const Error& e) {
      CHECK(e.code() == Code::kInvalidArgument);
      return std::string(e.what());
    }
    return std::string();
  };
  using Catch::Contains;
  const ModelShape model = model_of(128, 8, 2, 32, {{16, 128}, {0, 96}});
  for (int ranks = 1; ranks <= 4; ++ranks) CHECK(refusal(model, {4, 4}, ranks).empty());
  CHECK_THAT(refusal(model, {4, 4}, 5), Contains("4 slices") && Contains("4 head groups") && Contains("16 experts") &&
                                            Contains("at most 4") && Contains("slices_per_expert 8 allows"));
  CHECK(refusal(model, slice_counts(model, 8), 5).empty());
  CHECK_THAT(refusal(model, {4, 4}, 9), Contains("9 ranks") && Contains("no slices_per_expert"));  // 8 query heads
  CHECK_THAT(refusal(model_of(128, 8, 2, 32, {{3, 128}}), {4, 4}, 4), Contains("3 experts") && Contains("at most 3"));
  CHECK(refusal(model_of(128, 8, 2, 32, {{0, 128}}), {4, 4}, 4).empty());  // no experts, no limit
  CHECK_THAT(refusal(model_of(128, 8, 2, 32, {{0, 128}}), {4, 4}, 5), Contains("no experts"));
  CHECK_THAT(refusal(model, {4, 4}, 0), Contains("at least 1"));
  const ModelShape wide = model_of(128, 128, 8, 32, {{128, 128}});
  CHECK(refusal(wide, slice_counts(wide, 128), 64).empty());
  CHECK_THAT(refusal(wide, slice_counts(wide, 128), 65), Contains("at most 64"));
}

TEST_CASE("the helpers of a slice table lead to the slice they name, of the bytes that kernels expect") {
  const SliceTable table(model_of(128, 8, 2, 32, {{16, 128}, {0, 256}, {3, 8}}), {4, 4});
  for (int l = 0; l < table.num_layers(); ++l) {
    const MlpShape mlp = table.model().mlps[static_cast<size_t>(l)];
    const auto require = [&](int place, SliceKind kind, int index, int cut, int64_t bytes) {
      const Slice& s = table.layer(l)[static_cast<size_t>(place)];
      CHECK((s.kind == kind && s.layer == l && s.index == index && s.cut == cut && s.bytes == bytes && s.bytes % 64 == 0));
    };
    for (int a = 0; a < 4; ++a) require(table.attention(a), SliceKind::kAttentionGroup, a, 0, AttentionGroup{2, 32, 128}.bytes());
    for (int h = 0; h < 2; ++h) require(table.kv_projection(h), SliceKind::kKvProjection, h, 0, KvProjection{32, 128}.bytes());
    const int64_t cut = MlpCut{mlp.intermediate / 4, 128}.bytes();
    for (int s = 0; s < 4; ++s) {
      if (mlp.num_experts == 0) require(table.dense_cut(s), SliceKind::kDenseCut, 0, s, cut);
      for (int e = 0; e < mlp.num_experts; ++e) require(table.expert_cut(e, s), SliceKind::kExpertCut, e, s, cut);
    }
    CHECK(table.layer(l).size() == static_cast<size_t>(4 + 2 + std::max(1, mlp.num_experts) * 4));
  }
}

TEST_CASE("owners are taken by floor, K/V by every rank whose groups read it") {
  const SliceTable table(model_of(128, 8, 2, 32, {{16, 128}, {0, 256}}), {8, 8});
  for (int ranks = 1; ranks <= 8; ++ranks) {
    const Owners tp = tp_owners(table, ranks), ep = ep_owners(table, ranks);
    const RankSet all = (RankSet{1} << ranks) - 1;
    for (int s = 0; s < 8; ++s) {
      CHECK(tp.slices[0][static_cast<size_t>(table.expert_cut(5, s))] == RankSet{1} << (s * ranks / 8));
      CHECK(tp.slices[1][static_cast<size_t>(table.dense_cut(s))] == RankSet{1} << (s * ranks / 8));
      CHECK(ep.slices[1][static_cast<size_t>(table.dense_cut(s))] == all);
      CHECK(ep.slices[0][static_cast<size_t>(table.attention(s))] == all);
    }
    for (int e = 0; e < 16; ++e) CHECK(ep.slices[0][static_cast<size_t>(table.expert_cut(e, 2))] == RankSet{1} << (e * ranks / 16));
    for (int h = 0; h < 2; ++h) {
      RankSet readers = 0;
      for (int a = 4 * h; a < 4 * h + 4; ++a) readers |= tp.slices[0][static_cast<size_t>(table.attention(a))];
      CHECK(tp.kv_heads[static_cast<size_t>(h)] == readers);
      CHECK(tp.slices[1][static_cast<size_t>(table.kv_projection(h))] == readers);
      CHECK(ep.kv_heads[static_cast<size_t>(h)] == all);
      CHECK(ep.slices[1][static_cast<size_t>(table.kv_projection(h))] == all);
    }
  }
  CHECK(tp_owners(table, 8).kv_heads == std::vector<RankSet>{0x0f, 0xf0});  // more ranks than KV heads: replicas
  CHECK(tp_owners(table, 2).kv_heads == std::vector<RankSet>{1, 2});
}

TEST_CASE("sixty-four ranks have sixty-four bits") {
  const SliceTable table(model_of(64, 64, 8, 2, {{64, 64}, {0, 64}}), {64, 64});
  CHECK(ep_owners(table, 64).kv_heads[0] == ~RankSet{0});
  CHECK(tp_owners(table, 64).kv_heads[7] == RankSet{0xff} << 56);
  const ArenaPlan arena =
      plan_arena(table, tp_owners(table, 64), ep_owners(table, 64), KvSlice{16, 2}.bytes(), 2, std::vector<int64_t>(64, 1));
  CHECK(plan_transfer(arena, Layout::kTp).num_slices > 0);
}

TEST_CASE("a placement is followed, and one that is not of the model is refused") {
  const SliceTable table(model_of(128, 8, 2, 32, {{3, 128}, {0, 256}, {2, 128}}), {4, 4});
  const Owners ep = ep_owners(table, 2, {{1, 0, 1}, {}, {0, 0}});  // one rank may have no expert of a layer
  for (int s = 0; s < 4; ++s) {
    CHECK(ep.slices[0][static_cast<size_t>(table.expert_cut(0, s))] == 2);
    CHECK(ep.slices[0][static_cast<size_t>(table.expert_cut(1, s))] == 1);
    CHECK(ep.slices[2][static_cast<size_t>(table.expert_cut(1, s))] == 1);
    CHECK(ep.slices[1][static_cast<size_t>(table.dense_cut(s))] == 3);
  }
  CHECK_THROWS_WITH(ep_owners(table, 2, {{1, 0, 1}, {}}), Catch::Contains("2 layers"));
  CHECK_THROWS_WITH(ep_owners(table, 2, {{1, 0}, {}, {0, 0}}), Catch::Contains("layer 0") && Catch::Contains("2 experts"));
  CHECK_THROWS_WITH(ep_owners(table, 2, {{1, 0, 2}, {}, {0, 0}}), Catch::Contains("expert 2") && Catch::Contains("rank 2 of 2"));
  CHECK_THROWS_WITH(ep_owners(table, 2, {{1, 0, -1}, {}, {0, 0}}), Catch::Contains("rank -1"));
}

TEST_CASE("head groups are dealt in runs with the fewest KV heads, then the fewest groups, on the fullest rank") {
  int other_than_floor = 0;
  for (int kv = 1; kv <= 8; ++kv)
    for (int per_kv = 1; kv * per_kv <= 32; ++per_kv)
      for (int cuts : {4, 6, 8, 16, 32}) {
        const ModelShape model = model_of(16, kv * per_kv, kv, 2, {{0, cuts}});
        const SliceTable table(model, slice_counts(model, cuts));
        const int groups = table.counts().head_groups;
        for (int ranks = 1; ranks <= std::min(groups, cuts); ++ranks) {
          INFO(kv << " KV heads, " << groups << " groups, " << ranks << " ranks");
          const std::vector<int> first = runs(table, tp_owners(table, ranks));
          REQUIRE(first.size() == static_cast<size_t>(ranks) + 1);
          const Fullest wanted = best(table, ranks);
          REQUIRE(fullest(table, first) == wanted);
          std::vector<int> by_floor{0};
          for (int a = 1; a < groups; ++a)
            if (a * ranks / groups != (a - 1) * ranks / groups) by_floor.push_back(a);
          by_floor.push_back(groups);
          if (fullest(table, by_floor).kv_heads == wanted.kv_heads) REQUIRE(first == by_floor);
          other_than_floor += first != by_floor;
        }
      }
  CHECK(other_than_floor > 100);
}

}  // namespace moebius::layout_test
