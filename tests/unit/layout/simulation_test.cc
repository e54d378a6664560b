// Switches that move real bytes: memory is filled with the names of what lies there, and every layer must find its own.
#include <cstddef>
#include <cstring>
#include <optional>
#include <set>

#include "tests/catch.h"

#include "tests/unit/layout/cases.h"

namespace moebius::layout_test {
namespace {

// A world whose 4-byte words say which slice, or which KV, they belong to.
class Simulation {
 public:
  Simulation(ArenaPlan arena, TransferPlan to_tp, TransferPlan to_ep, Layout start, Random& random)
      : arena_(std::move(arena)),
        to_tp_(std::move(to_tp)),
        to_ep_(std::move(to_ep)),
        random_(random),
        seam_(start == Layout::kTp ? arena_.num_layers() : 0) {
    for (int r = 0; r < arena_.ranks(); ++r) memory_.emplace_back(static_cast<size_t>(arena_.arena_bytes(r)), std::byte{0xee});
    take_pages();
    for (int l = 0; l < arena_.num_layers(); ++l) fill(l, start);
  }

  int seam() const { return seam_; }
  int num_layers() const { return arena_.num_layers(); }

  // Copies a part of the next item, in any order, without moving the seam.
  void copy_ahead(Layout to) { copy(next(to), to, false); }
  void move(Layout to) {
    copy(next(to), to, true);
    seam_ += to == Layout::kTp ? 1 : -1;
  }
  // Every layer finds all its slices and KV, in its own layout.
  std::optional<std::string> lost() const {
    for (int l = 0; l < arena_.num_layers(); ++l)
      if (auto what = lost(l, l < seam_ ? Layout::kTp : Layout::kEp)) return what;
    return std::nullopt;
  }
  // After a move to `to`, its sources: until the next item is written, undoing it is free.
  std::optional<std::string> lost_sources(Layout to) const { return lost(to == Layout::kTp ? seam_ - 1 : seam_, other(to)); }

 private:
  int next(Layout to) const { return to == Layout::kTp ? seam_ : seam_ - 1; }

  // Blocks with a page in both layouts, the last pages among them; some shared by several homes.
  void take_pages() {
    std::set<std::pair<int, int>> taken;
    const auto any_page = [&](int64_t pages) {
      return static_cast<int32_t>(random_.once_in(3) ? pages - 1 : random_.below(static_cast<int>(pages)));
    };
    std::set<int32_t> tp_taken;
    for (int i = 0; i < 10 && arena_.tp_pages() > 0; ++i) {
      const int32_t tp_page = any_page(arena_.tp_pages());
      if (tp_taken.count(tp_page)) continue;
      for (int copies = random_.once_in(3) ? 3 : 1; copies > 0; --copies) {
        const int home = random_.below(arena_.ranks());
        if (arena_.pages(home, Layout::kEp) == 0) continue;
        const int32_t ep_page = any_page(arena_.pages(home, Layout::kEp));
        if (!taken.insert({home, ep_page}).second) continue;
        pairs_.push_back({tp_page, home, ep_page});
        if (tp_taken.insert(tp_page).second) leading_.push_back(pairs_.back());
      }
    }
  }
  // Destinations are unique: to TP, one of the homes that share a page gives it.
  const std::vector<PagePair>& pairs(Layout to) const { return to == Layout::kTp ? leading_ : pairs_; }

  // f(rank, offset, bytes, name) for everything a layer has in a layout.
  template <class F>
  void visit(int l, Layout layout, F&& f) const {
    for (int r = 0; r < arena_.ranks(); ++r) {
      for (size_t s = 0; s < arena_.table().layer(l).size(); ++s)
        if (const int64_t at = arena_.slice_offset(r, layout, l, static_cast<int>(s)); at >= 0)
          f(r, at, arena_.table().layer(l)[s].bytes, static_cast<uint32_t>(l * 4096 + static_cast<int>(s)) * 2654435761u);
      const std::vector<int>& heads = arena_.local_kv_heads(r, layout);
      for (const PagePair& p : pairs(layout))
        for (size_t j = 0; j < heads.size(); ++j) {
          if (layout == Layout::kEp && p.home != r) continue;
          const int64_t slot =
              (layout == Layout::kTp ? p.tp_page : p.ep_page) * static_cast<int64_t>(heads.size()) + static_cast<int64_t>(j);
          f(r, arena_.kv_offset(r, layout, l) + slot * arena_.kv_slice_bytes(), arena_.kv_slice_bytes(),
            static_cast<uint32_t>((l * 4096 + p.tp_page) * 64 + heads[j]) * 40503u + 7);
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
  std::optional<std::string> lost(int l, Layout layout) const {
    std::optional<std::string> what;
    visit(l, layout, [&](int r, int64_t at, int64_t bytes, uint32_t name) {
      for (int64_t i = 0; i < bytes && !what; i += 4) {
        uint32_t word;
        std::memcpy(&word, memory_[static_cast<size_t>(r)].data() + at + i, 4);
        if (word != name + static_cast<uint32_t>(i))
          what = fmt::format("seam {}: layer {} in {}, rank {}: byte {} is lost", seam_, l, name_of(layout), r, at + i);
      }
    });
    return what;
  }
  // All ranks at once: their copies in any order.
  void copy(int l, Layout to, bool whole) {
    std::vector<std::pair<int, BlockCopy>> copies;
    for (int r = 0; r < arena_.ranks(); ++r) {
      for (const BlockCopy& c : (to == Layout::kTp ? to_tp_ : to_ep_).items[static_cast<size_t>(l)].to[static_cast<size_t>(r)])
        copies.emplace_back(r, c);
      for (const PagePair& p : pairs(to))
        for_each_kv_block(arena_, to, l, r, p, [&](const BlockCopy& c, bool) { copies.emplace_back(r, c); });
    }
    std::shuffle(copies.begin(), copies.end(), random_.engine);
    if (!whole) copies.resize(static_cast<size_t>(random_.below(static_cast<int>(copies.size()) + 1)));
    for (const auto& [dst, c] : copies)
      std::memcpy(memory_[static_cast<size_t>(dst)].data() + c.dst_offset, memory_[static_cast<size_t>(c.src_rank)].data() + c.src_offset,
                  static_cast<size_t>(c.bytes));
  }

  ArenaPlan arena_;
  TransferPlan to_tp_, to_ep_;
  Random& random_;
  int seam_;
  std::vector<std::vector<std::byte>> memory_;
  std::vector<PagePair> pairs_, leading_;
};

Simulation simulate(const ArenaPlan& arena, Layout start, Random& random) {
  return Simulation(arena, plan_transfer(arena, Layout::kEp), plan_transfer(arena, Layout::kTp), start, random);
}

}  // namespace

TEST_CASE("moving real bytes, with copying ahead, turns, pauses and undoing, loses none at any seam") {
  repeat(400, [](Random& random) {
    const Layout start = random.below(2) ? Layout::kTp : Layout::kEp;
    Simulation world = simulate(arena_of(random_case(random)), start, random);
    Layout to = other(start);
    REQUIRE(world.lost() == std::nullopt);
    for (int step = 0; step < 3 * world.num_layers(); ++step) {
      if (world.seam() == 0)
        to = Layout::kTp;
      else if (world.seam() == world.num_layers())
        to = Layout::kEp;
      else if (random.once_in(4))
        to = other(to);  // a turn: what was copied ahead is forgotten
      if (random.below(2)) {
        world.copy_ahead(to);
        REQUIRE(world.lost() == std::nullopt);
      }
      if (random.once_in(3)) continue;  // a step without a move: what was copied ahead stays harmless
      world.move(to);
      REQUIRE(world.lost() == std::nullopt);
      REQUIRE(world.lost_sources(to) == std::nullopt);
    }
  });
}

TEST_CASE("whole switches there and back leave every byte as it was") {
  repeat(100, [](Random& random) {
    Simulation world = simulate(arena_of(random_case(random)), Layout::kTp, random);
    for (int round = 0; round < 2; ++round) {
      while (world.seam() > 0) world.move(Layout::kEp);
      REQUIRE(world.lost() == std::nullopt);
      while (world.seam() < world.num_layers()) world.move(Layout::kTp);
      REQUIRE(world.lost() == std::nullopt);
    }
  });
}

TEST_CASE("the simulation loses bytes when EP lies too low, so its silence means something") {
  Random random{std::mt19937_64(seed())};
  Case c = plain_case();
  c.tp_pages = 0;  // weights alone: no byte of a region is free
  c.ep_pages = {0, 0};
  ArenaPlan arena = arena_of(c);
  TransferPlan to_tp = plan_transfer(arena, Layout::kEp), to_ep = plan_transfer(arena, Layout::kTp);
  const int64_t by = -arena.item_range(0, Layout::kTp, 0).size() / 2 / kPoolAlignment * kPoolAlignment;
  ArenaSabotage{arena}.wrong_lead(0, by);
  for (size_t l = 0; l < to_ep.items.size(); ++l) {  // transfers that follow the displaced arena; planned ones would be refused
    for (BlockCopy& copy : to_ep.items[l].to[0]) copy.dst_offset += by;
    for (BlockCopy& copy : to_tp.items[l].to[1])
      if (copy.src_rank == 0 && copy.src_offset >= arena.kept_bytes(0)) copy.src_offset += by;
  }
  Simulation world(arena, to_tp, to_ep, Layout::kTp, random);
  bool sources_lost = false;  // an item's EP region begins inside its TP region: whether a copy suffers depends on their order
  while (world.seam() > 0) {
    world.move(Layout::kEp);
    sources_lost |= world.lost_sources(Layout::kEp).has_value();
  }
  CHECK(sources_lost);
}

}  // namespace moebius::layout_test
