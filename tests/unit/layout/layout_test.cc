#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "lib/base/error.h"
#include "lib/layout/verify.h"
#include "lib/tensor/packed.h"
#include "tests/catch.h"

namespace moebius {

// Makes plans that the planner would never make.
struct ArenaSabotage {
  ArenaPlan& plan;
  void shift_ep(int rank, int layer, int64_t by) {  // an item's whole EP region
    auto& r = plan.ranks_[static_cast<size_t>(rank)];
    Range& item = r.items[1][static_cast<size_t>(layer)];
    const Range before = item;
    item = {item.begin + by, item.end + by};
    r.kv[1][static_cast<size_t>(layer)] += by;
    for (int64_t& at : r.offsets[1][static_cast<size_t>(layer)])
      if (at >= before.begin && at < before.end) at += by;
  }
  void wrong_lead(int rank, int64_t by) {
    for (int l = 0; l < plan.num_layers(); ++l) shift_ep(rank, l, by);
  }
  int64_t& offset(int rank, Layout layout, int layer, int slice) {
    return plan.ranks_[static_cast<size_t>(rank)].offsets[static_cast<size_t>(layout)][static_cast<size_t>(layer)][static_cast<size_t>(slice)];
  }
};

namespace {

ModelShape model_of(int hidden, int heads, int kv, int dim, std::vector<MlpShape> mlps) { return {hidden, heads, kv, dim, std::move(mlps)}; }

uint64_t first_seed() {
  const char* text = std::getenv("MOEBIUS_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device{}();
}

struct Random {
  std::mt19937_64 engine;
  int below(int n) { return static_cast<int>(engine() % static_cast<uint64_t>(n)); }
  int from(int low, int high) { return low + below(high - low + 1); }
};

struct Case {
  ModelShape model;
  SliceCounts counts;
  int ranks = 1;
  std::vector<std::vector<int>> placement;
  int64_t kv_slice = 0, tp_pages = 0;
  std::vector<int64_t> ep_pages;
};

Case random_case(Random& random) {
  Case c;
  const int kv = 1 << random.below(4), heads = kv * random.from(1, 6), cuts = 1 << random.below(4);
  const int experts = random.from(1, 12), layers = random.from(1, 9);
  std::vector<MlpShape> mlps;
  for (int l = 0; l < layers; ++l) {
    const bool dense = random.below(4) == 0;
    mlps.push_back({dense ? 0 : experts, cuts * random.from(1, 40)});
  }
  c.model = model_of(2 * random.from(1, 40), heads, kv, 2 * random.from(1, 12), mlps);
  c.counts = slice_counts(c.model, cuts);
  bool sparse = false;
  for (const MlpShape& m : mlps) sparse |= m.num_experts > 0;
  int most = std::min(c.counts.cuts, c.counts.head_groups);
  if (sparse) most = std::min(most, experts);
  c.ranks = random.from(1, most);
  if (random.below(3) == 0)
    for (const MlpShape& m : mlps) {
      c.placement.emplace_back();
      for (int e = 0; e < m.num_experts; ++e) c.placement.back().push_back(random.below(c.ranks));
    }
  c.kv_slice = KvSlice{16 * random.from(1, 3), c.model.head_dim}.bytes();
  c.tp_pages = random.below(30);
  for (int r = 0; r < c.ranks; ++r) c.ep_pages.push_back(random.below(30));
  return c;
}

ArenaPlan arena_of(const Case& c) {
  const SliceTable table(c.model, c.counts);
  return plan_arena(table, tp_owners(table, c.ranks), ep_owners(table, c.ranks, c.placement), c.kv_slice, c.tp_pages, c.ep_pages);
}

// A world whose bytes are names: 4-byte words that say which slice (or which KV) they belong to.
class Simulation {
 public:
  Simulation(const Case& c, Layout start) : arena_(arena_of(c)), seam_(start == Layout::kTp ? arena_.num_layers() : 0) {
    for (int r = 0; r < arena_.ranks(); ++r) memory_.emplace_back(static_cast<size_t>(arena_.arena_bytes(r)), std::byte{0xee});
    for (int64_t p = 0, used = 0; p < c.tp_pages && used < 12; ++p, ++used) {  // some blocks with a page in both layouts
      const int home = static_cast<int>(p) % arena_.ranks();
      const auto page = static_cast<int32_t>(p / arena_.ranks());
      if (page < c.ep_pages[static_cast<size_t>(home)]) pairs_.push_back({static_cast<int32_t>(p), home, page});
    }
    for (int l = 0; l < arena_.num_layers(); ++l) fill(l, start);
  }

  int seam() const { return seam_; }
  int num_layers() const { return arena_.num_layers(); }

  // Copies a part of the next item, as copying ahead does, without moving the seam.
  void copy_ahead(Layout to, Random& random) {
    const int l = to == Layout::kTp ? seam_ : seam_ - 1;
    copy(l, to, [&] { return random.below(2) == 0; });
  }
  void move(Layout to) {
    const int l = to == Layout::kTp ? seam_ : seam_ - 1;
    copy(l, to, [] { return true; });
    seam_ += to == Layout::kTp ? 1 : -1;
  }
  // Every layer finds all its slices and KV, in its own layout.
  void check() const {
    for (int l = 0; l < arena_.num_layers(); ++l) visit(l, l < seam_ ? Layout::kTp : Layout::kEp, [&](int r, int64_t at, int64_t bytes, uint32_t name) {
      for (int64_t i = 0; i < bytes; i += 4) {
        uint32_t word;
        std::memcpy(&word, memory_[static_cast<size_t>(r)].data() + at + i, 4);
        if (word != name + static_cast<uint32_t>(i)) FAIL("seam " << seam_ << ": layer " << l << " rank " << r << " byte " << at + i << " is lost");
      }
    });
  }

 private:
  template <class F>
  void visit(int l, Layout layout, F&& f) const {
    for (int r = 0; r < arena_.ranks(); ++r) {
      for (size_t s = 0; s < arena_.table().layer(l).size(); ++s)
        if (const int64_t at = arena_.slice_offset(r, layout, l, static_cast<int>(s)); at >= 0)
          f(r, at, arena_.table().layer(l)[s].bytes, static_cast<uint32_t>((l * 4096 + static_cast<int>(s)) * 2654435761u));
      const std::vector<int>& heads = arena_.local_kv_heads(r, layout);
      for (const PagePair& p : pairs_)
        for (size_t j = 0; j < heads.size(); ++j) {
          if (layout == Layout::kEp && p.home != r) continue;
          const int64_t page = layout == Layout::kTp ? p.tp_page : p.ep_page;
          const int64_t at = arena_.kv_offset(r, layout, l) + (page * static_cast<int64_t>(heads.size()) + static_cast<int64_t>(j)) * arena_.kv_slice_bytes();
          f(r, at, arena_.kv_slice_bytes(), static_cast<uint32_t>(((l * 4096 + p.tp_page) * 64 + heads[j]) * 40503u + 7));
        }
    }
  }
  void fill(int l, Layout layout) {
    visit(l, layout, [&](int r, int64_t at, int64_t bytes, uint32_t name) {
      for (int64_t i = 0; i < bytes; i += 4) {
        const uint32_t word = name + static_cast<uint32_t>(i);
        std::memcpy(memory_[static_cast<size_t>(r)].data() + at + i, &word, 4);
      }
    });
  }
  template <class Wanted>
  void copy(int l, Layout to, Wanted&& wanted) {
    const TransferPlan plan = plan_transfer(arena_, other(to));
    const auto block = [&](int r, const BlockCopy& c) {
      if (wanted())
        std::memcpy(memory_[static_cast<size_t>(r)].data() + c.dst_offset, memory_[static_cast<size_t>(c.src_rank)].data() + c.src_offset,
                    static_cast<size_t>(c.bytes));
    };
    for (int r = 0; r < arena_.ranks(); ++r) {
      for (const BlockCopy& c : plan.items[static_cast<size_t>(l)].to[static_cast<size_t>(r)]) block(r, c);
      for (const PagePair& p : pairs_) for_each_kv_block(arena_, to, l, r, p, [&](const BlockCopy& c, bool) { block(r, c); });
    }
  }

  ArenaPlan arena_;
  int seam_;
  std::vector<std::vector<std::byte>> memory_;
  std::vector<PagePair> pairs_;
};

Case plain_case() {
  Case c;
  c.model = model_of(64, 8, 2, 16, {{4, 64}, {4, 64}, {0, 128}, {4, 64}});
  c.counts = slice_counts(c.model, 4);
  c.ranks = 2;
  c.kv_slice = KvSlice{16, 16}.bytes();
  c.tp_pages = 7;
  c.ep_pages = {4, 5};
  return c;
}

}  // namespace

TEST_CASE("cuts and head groups follow from the model and one setting") {
  const auto counts = [](int intermediate, int heads, int kv, int setting = 0) {
    const SliceCounts c = slice_counts(model_of(128, heads, kv, 32, {{16, intermediate}}), setting);
    return std::array<int, 2>{c.cuts, c.head_groups};
  };
  using Pair = std::array<int, 2>;
  CHECK(counts(128, 8, 2) == Pair{4, 4});
  CHECK(counts(512, 16, 4) == Pair{4, 4});
  CHECK(counts(768, 32, 4) == Pair{8, 8});
  CHECK(counts(1536, 64, 4) == Pair{8, 8});
  CHECK(counts(80, 6, 3) == Pair{4, 6});
  CHECK(counts(6, 8, 8) == Pair{2, 8});
  CHECK(counts(7, 8, 4) == Pair{1, 4});
  CHECK(counts(128, 8, 2, 8) == Pair{8, 8});
  CHECK(counts(128, 4, 2, 8) == Pair{8, 4});
  CHECK_THROWS_WITH(counts(80, 6, 3, 32), Catch::Contains("80"));
}

TEST_CASE("too many ranks are refused with the three numbers and the setting that helps") {
  const SliceTable table(model_of(128, 8, 2, 32, {{16, 128}}), {4, 4});
  CHECK_THROWS_WITH(tp_owners(table, 5), Catch::Contains("4 slices") && Catch::Contains("4 head groups") && Catch::Contains("16 experts") &&
                                             Catch::Contains("slices_per_expert"));
  CHECK_THROWS_AS(tp_owners(table, 0), Error);
}

TEST_CASE("owners are taken by floor, K/V by every rank whose groups read it") {
  const SliceTable table(model_of(128, 8, 2, 32, {{16, 128}, {0, 256}}), {8, 8});
  const Owners tp = tp_owners(table, 3), ep = ep_owners(table, 3);
  for (int s = 0; s < 8; ++s) CHECK(tp.slices[0][static_cast<size_t>(table.expert_cut(0, 5, s))] == RankSet{1} << (s * 3 / 8));
  for (int e = 0; e < 16; ++e) CHECK(ep.slices[0][static_cast<size_t>(table.expert_cut(0, e, 2))] == RankSet{1} << (e * 3 / 16));
  CHECK(ep.slices[1][static_cast<size_t>(table.dense_cut(1, 3))] == 0b111);
  CHECK(ep.slices[0][static_cast<size_t>(table.attention(0, 3))] == 0b111);
  const Owners wide = tp_owners(table, 8);  // more ranks than KV heads: replicas
  CHECK(wide.kv_heads[0] == 0x0f);
  CHECK(wide.kv_heads[1] == 0xf0);
  CHECK(tp_owners(table, 2).kv_heads == std::vector<RankSet>{1, 2});
}

TEST_CASE("head groups are dealt so that the most KV heads on a rank are fewest") {
  const SliceTable table(model_of(128, 8, 2, 32, {{16, 128}}), {8, 8});
  const Owners tp = tp_owners(table, 3);  // by floor rank 1 would hold both KV heads
  for (int r = 0; r < 3; ++r) CHECK(((tp.kv_heads[0] >> r & 1) + (tp.kv_heads[1] >> r & 1)) == 1);
  int groups = 0;
  for (int r = 0; r < 3; ++r) {
    int mine = 0;
    for (int a = 0; a < 8; ++a) mine += static_cast<int>(tp.slices[0][static_cast<size_t>(table.attention(0, a))] >> r & 1);
    CHECK(mine >= 1);
    groups += mine;
  }
  CHECK(groups == 8);
}

TEST_CASE("a plan copies exactly the slices that gained a rank, once per new owner, and moves no kept one") {
  Random random{std::mt19937_64(first_seed())};
  for (int i = 0; i < 300; ++i) {
    const Case c = random_case(random);
    const ArenaPlan arena = arena_of(c);
    for (Layout from : {Layout::kTp, Layout::kEp}) {
      const TransferPlan plan = plan_transfer(arena, from);
      int64_t slices = 0, bytes = 0;
      for (int l = 0; l < arena.num_layers(); ++l)
        for (size_t s = 0; s < arena.table().layer(l).size(); ++s) {
          const RankSet gained = arena.owners(plan.to).slices[static_cast<size_t>(l)][s] & ~arena.owners(from).slices[static_cast<size_t>(l)][s];
          slices += std::popcount(gained);
          bytes += std::popcount(gained) * arena.table().layer(l)[s].bytes;
        }
      REQUIRE(plan.num_slices == slices);
      REQUIRE(plan.bytes == bytes);
      REQUIRE(plan.local_bytes == 0);
      for (const ItemTransfer& item : plan.items)
        for (int r = 0; r < arena.ranks(); ++r)
          for (const BlockCopy& copy : item.to[static_cast<size_t>(r)]) REQUIRE(copy.dst_offset >= arena.kept_bytes(r));  // the kept zone is never written
    }
  }
}

TEST_CASE("the arena rule holds for any sizes, also empty ones") {
  Random random{std::mt19937_64(first_seed())};
  for (int i = 0; i < 10000; ++i) {
    std::vector<int64_t> tp, ep;
    for (int n = random.from(1, 12); n > 0; --n) {
      tp.push_back(random.below(3) ? random.below(1000) : 0);
      ep.push_back(random.below(3) ? random.below(1000) : 0);
    }
    const StreamLayout s = lay_out_stream(tp, ep);
    bool tight = s.lead == 0;
    for (size_t k = 0; k < tp.size(); ++k) {
      REQUIRE(s.tp[k].end <= s.ep[k].begin);
      tight |= s.tp[k].end == s.ep[k].begin;
      REQUIRE(s.ep[k].end <= s.bytes);
      REQUIRE(s.tp[k].end <= s.bytes);
    }
    REQUIRE(tight);  // no byte of the lead is wasted
  }
}

TEST_CASE("ten thousand random plans pass the verifier, at every seam") {
  const uint64_t seed = first_seed();
  INFO("MOEBIUS_SEED=" << seed);
  Random random{std::mt19937_64(seed)};
  for (int i = 0; i < 10000; ++i) {
    const ArenaPlan arena = arena_of(random_case(random));  // verified when made
    if (i % 4 == 0) {
      plan_transfer(arena, Layout::kTp);
      plan_transfer(arena, Layout::kEp);
    }
  }
  SUCCEED();
}

TEST_CASE("moving real bytes, with copying ahead, turns and pauses, loses none at any seam") {
  const uint64_t seed = first_seed();
  INFO("MOEBIUS_SEED=" << seed);
  Random random{std::mt19937_64(seed)};
  for (int i = 0; i < 150; ++i) {
    Simulation world(random_case(random), random.below(2) ? Layout::kTp : Layout::kEp);
    Layout to = world.seam() == 0 ? Layout::kTp : Layout::kEp;
    for (int move = 0; move < 3 * world.num_layers(); ++move) {
      if (world.seam() == 0) to = Layout::kTp;
      else if (world.seam() == world.num_layers()) to = Layout::kEp;
      else if (random.below(4) == 0) to = other(to);  // a turn: what was copied ahead is forgotten
      if (random.below(2)) world.copy_ahead(to, random), world.check();
      if (random.below(3) == 0) continue;             // a step without a move: what was copied ahead stays harmless
      world.move(to);
      world.check();
    }
  }
}

TEST_CASE("the verifier catches a lead that is 64 bytes short, on any rank") {
  for (int rank : {0, 1}) {
    ArenaPlan arena = arena_of(plain_case());
    ArenaSabotage{arena}.wrong_lead(rank, -64);
    CHECK_THROWS_WITH(verify_arena(arena), Catch::Contains("overlaps") && Catch::Contains("rank " + std::to_string(rank)));
  }
}

TEST_CASE("the verifier catches overlapping slices, misplaced ones and regions outside the arena") {
  const Case c = plain_case();
  const SliceTable table(c.model, c.counts);
  {
    ArenaPlan arena = arena_of(c);  // two moving slices of rank 0 in EP at one place: expert 0's cuts 2 and 3 belong to rank 1 in TP
    ArenaSabotage{arena}.offset(0, Layout::kEp, 1, table.expert_cut(1, 0, 3)) = arena.slice_offset(0, Layout::kEp, 1, table.expert_cut(1, 0, 2));
    CHECK_THROWS_AS(verify_arena(arena), Error);
  }
  {
    ArenaPlan arena = arena_of(c);  // swapped with its neighbour: disjoint, but the transfer no longer leads there
    const TransferPlan plan = plan_transfer(arena, Layout::kTp);
    ArenaSabotage s{arena};
    std::swap(s.offset(0, Layout::kEp, 1, table.expert_cut(1, 0, 2)), s.offset(0, Layout::kEp, 1, table.expert_cut(1, 0, 3)));
    verify_arena(arena);
    CHECK_THROWS_AS(verify_transfer(arena, plan), Error);
  }
  {
    ArenaPlan arena = arena_of(c);
    ArenaSabotage{arena}.shift_ep(1, 3, arena.arena_bytes(1));
    CHECK_THROWS_AS(verify_arena(arena), Error);
  }
  {
    ArenaPlan arena = arena_of(c);  // a kept slice with two places
    ArenaSabotage{arena}.offset(0, Layout::kEp, 0, table.attention(0, 0)) += 64;
    CHECK_THROWS_AS(verify_arena(arena), Error);
  }
  {
    const ArenaPlan arena = arena_of(c);
    TransferPlan plan = plan_transfer(arena, Layout::kEp);
    plan.items[0].to[0].pop_back();  // a slice is forgotten
    CHECK_THROWS_WITH(verify_transfer(arena, plan), Catch::Contains("gains"));
  }
}

TEST_CASE("page lists are checked for range and for pages that would be written twice") {
  const std::vector<int64_t> ep = {4, 4};
  const std::vector<PagePair> shared = {{1, 0, 0}, {1, 1, 0}};  // one TP page, a copy in each home
  verify_pages(shared, Layout::kEp, 4, ep);
  CHECK_THROWS_WITH(verify_pages(shared, Layout::kTp, 4, ep), Catch::Contains("twice"));
  const std::vector<PagePair> twice = {{1, 0, 2}, {2, 0, 2}};
  CHECK_THROWS_WITH(verify_pages(twice, Layout::kEp, 4, ep), Catch::Contains("twice"));
  const std::vector<PagePair> outside = {{1, 0, 4}};
  CHECK_THROWS_WITH(verify_pages(outside, Layout::kEp, 4, ep), Catch::Contains("out of range"));
}

TEST_CASE("replicated KV is read from its owners in turn, by page") {
  Case c = plain_case();
  c.model = model_of(64, 8, 2, 16, {{8, 64}});
  c.counts = slice_counts(c.model, 8);
  c.ranks = 8;
  c.ep_pages.assign(8, 4);
  const ArenaPlan arena = arena_of(c);
  std::map<int, int> reads;
  for (int32_t page = 0; page < 4; ++page)  // home 7 owns a replica of head 1 only
    for_each_kv_block(arena, Layout::kEp, 0, 7, {page, 7, page}, [&](const BlockCopy& copy, bool local) {
      ++reads[copy.src_rank];
      CHECK(local == (copy.src_rank == 7));
    });
  CHECK(reads == std::map<int, int>{{0, 1}, {1, 1}, {2, 1}, {3, 1}, {7, 4}});
}

TEST_CASE("capacity fills both layouts and says what is missing when weights do not fit") {
  const Case c = plain_case();
  const SliceTable table(c.model, c.counts);
  const Owners tp = tp_owners(table, 2), ep = ep_owners(table, 2);
  const int64_t memory = 4 << 20;
  const Capacity capacity = plan_capacity(table, tp, ep, c.kv_slice, {memory, memory});
  const ArenaPlan arena = plan_arena(table, tp, ep, c.kv_slice, capacity.tp_pages, capacity.ep_pages);
  for (int r = 0; r < 2; ++r) {
    CHECK(arena.arena_bytes(r) <= memory);
    Capacity more = capacity;
    ++more.ep_pages[static_cast<size_t>(r)];
    const int64_t grown = plan_arena(table, tp, ep, c.kv_slice, more.tp_pages, more.ep_pages).arena_bytes(r);
    CHECK((grown > memory || grown == arena.arena_bytes(r)));
  }
  CHECK_THROWS_WITH(plan_capacity(table, tp, ep, c.kv_slice, {memory, 1000}), Catch::Contains("rank 1") && Catch::Contains("short"));
}

TEST_CASE("published models on 8 ranks: the lead is about one item, capacities as planned") {
  struct Expected {
    ModelShape model;
    double lead_mib, ep_tokens, tp_tokens;
  };
  // 130 GiB a rank, pages of 16 tokens, before workspace (design figures; ours differ by the alignment of regions).
  const Expected big{model_of(4096, 64, 4, 128, std::vector<MlpShape>(94, {128, 1536})), 1312, 353387, 1655215};
  const SliceTable table(big.model, slice_counts(big.model, 0));
  const Owners tp = tp_owners(table, 8), ep = ep_owners(table, 8);
  const std::vector<int64_t> memory(8, int64_t{130} << 30);
  const int64_t slice = KvSlice{16, 128}.bytes();
  const Capacity capacity = plan_capacity(table, tp, ep, slice, memory);
  const ArenaPlan arena = plan_arena(table, tp, ep, slice, capacity.tp_pages, capacity.ep_pages);
  CHECK(static_cast<double>(arena.lead(0)) / (1 << 20) == Approx(big.lead_mib).epsilon(0.03));
  CHECK(static_cast<double>(capacity.ep_pages[0]) * 16 == Approx(big.ep_tokens).epsilon(0.03));
  CHECK(static_cast<double>(capacity.tp_pages) * 16 == Approx(big.tp_tokens).epsilon(0.03));
  CHECK(static_cast<double>(arena.lead(0)) <= 0.024 * static_cast<double>(memory[0]));
}

}  // namespace moebius
