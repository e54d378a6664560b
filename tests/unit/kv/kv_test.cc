#include "lib/kv/kv_manager.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "lib/base/error.h"
#include "tests/catch.h"

namespace moebius {
namespace {

BlockKey key_of(uint64_t n) { return {n * 0x9e3779b97f4a7c15ull, ~n}; }

// Every invariant that can be seen from outside.
void check_pages(const KvManager& kv) {
  std::set<std::pair<int, int>> ep;
  std::map<int, int> tp;
  std::set<int> used;
  for (int32_t b : kv.live_blocks()) {
    const Block& block = kv.block(b);
    if (kv.phase() != Phase::kEp) {
      REQUIRE(block.tp_page >= 0);
      ++tp[block.tp_page];
      REQUIRE((kv.phase() == Phase::kBoth || tp[block.tp_page] == 1));
    } else {
      REQUIRE(block.tp_page == -1);
    }
    if (block.users > 0 && kv.phase() != Phase::kEp) used.insert(block.tp_page);
    if (kv.phase() != Phase::kTp) {
      REQUIRE(block.ep_page >= 0);
      REQUIRE(ep.insert({block.home, block.ep_page}).second);  // an EP page belongs to one block
    } else {
      REQUIRE(block.ep_page == -1);
    }
  }
  // A TP page can be had when nobody uses a block on it.
  const int64_t tp_room = kv.tp_capacity() - static_cast<int64_t>(used.size());
  if (kv.phase() == Phase::kTp) REQUIRE(kv.available(-1) == tp_room);
  if (kv.phase() != Phase::kEp) REQUIRE(kv.usage() == static_cast<double>(used.size()) / static_cast<double>(kv.tp_capacity()));
  if (kv.phase() == Phase::kBoth)
    for (int h = 0; h < kv.num_homes(); ++h) REQUIRE(kv.available(h) <= tp_room);
}

}  // namespace

TEST_CASE("a pool hands out every page once and takes them back") {
  KvManager kv(10, {6, 6}, 16, true, Phase::kTp);
  std::vector<int32_t> blocks;
  for (int i = 0; i < 10; ++i) blocks.push_back(kv.allocate(-1));
  CHECK(kv.allocate(-1) == -1);
  check_pages(kv);
  for (int32_t b : blocks) kv.release(b);
  CHECK(kv.available(-1) == 10);
}

TEST_CASE("keys start at random in every manager, chains' roots do not") {
  KvManager a(10, {6}, 16, true, Phase::kTp), b(10, {6}, 16, true, Phase::kTp);
  const std::vector<int32_t> tokens(16, 7);
  CHECK_FALSE(a.first_key() == b.first_key());
  CHECK_FALSE(a.first_key() == BlockKey{});
  CHECK_FALSE(extend_key(a.first_key(), tokens) == extend_key(b.first_key(), tokens));
  CHECK(KvManager::root_of(tokens) == extend_key({}, tokens).low);
}

TEST_CASE("in EP a home's pages are its own") {
  KvManager kv(10, {2, 3}, 16, true, Phase::kEp);
  CHECK(kv.allocate(0) >= 0);
  CHECK(kv.allocate(0) >= 0);
  CHECK(kv.allocate(0) == -1);
  CHECK(kv.available(1) == 3);
  check_pages(kv);
}

TEST_CASE("a registered block outlives its users and is found, until a page is wanted") {
  KvManager kv(3, {3}, 16, true, Phase::kTp);
  const int32_t a = kv.allocate(-1), b = kv.allocate(-1);
  kv.set_full(a);
  kv.register_block(a, key_of(1), 1);
  kv.set_full(b);
  kv.register_block(b, key_of(2), 1);
  kv.release(b);
  kv.release(a);
  CHECK(kv.available(-1) == 3);
  CHECK(kv.find(key_of(1), -1) == a);
  kv.release(a);
  for (int i = 0; i < 2; ++i) REQUIRE(kv.allocate(-1) >= 0);  // the free page, then the oldest cached: b
  CHECK(kv.find(key_of(2), -1) == -1);
  CHECK(kv.contains(key_of(1), -1));
}

TEST_CASE("with the prefix cache off nothing is found or kept") {
  KvManager kv(3, {3}, 16, false, Phase::kTp);
  const int32_t a = kv.allocate(-1);
  kv.register_block(a, key_of(1), 1);
  CHECK(kv.find(key_of(1), -1) == -1);
  kv.release(a);
  CHECK(kv.live_blocks().empty());
}

TEST_CASE("a TP page shared by requests of several homes becomes one EP page per home") {
  KvManager kv(8, {8, 8}, 16, true, Phase::kTp);
  const int32_t shared = kv.allocate(-1);
  kv.set_full(shared);
  kv.register_block(shared, key_of(7), 7);
  REQUIRE(kv.find(key_of(7), -1) == shared);
  REQUIRE(kv.find(key_of(7), -1) == shared);
  std::vector<int32_t> x{shared, kv.allocate(-1)}, y{shared, kv.allocate(-1)}, z{shared};
  const std::vector<KvManager::SequenceBlocks> sequences{{x, 0}, {y, 1}, {z, 0}};
  kv.open_ep(sequences);
  check_pages(kv);
  CHECK(x[0] == z[0]);
  CHECK(x[0] != y[0]);
  CHECK(kv.block(x[0]).tp_page == kv.block(y[0]).tp_page);
  CHECK(kv.block(x[0]).users == 2);
  CHECK(kv.block(y[0]).users == 1);
  // A hit counts only for the home whose table holds the page.
  CHECK(kv.contains(key_of(7), 0));
  CHECK(kv.contains(key_of(7), 1));
  kv.close(Layout::kEp, {});
  check_pages(kv);
  // Back: the two copies meet again on one TP page, filled from one of them.
  kv.open_tp();
  check_pages(kv);
  CHECK(kv.block(x[0]).tp_page == kv.block(y[0]).tp_page);
  CHECK(kv.leads_tp_page(x[0]) != kv.leads_tp_page(y[0]));
  kv.close(Layout::kTp, sequences);
  check_pages(kv);
  CHECK(x[0] == y[0]);  // one block again
  CHECK(kv.block(x[0]).users == 3);
  CHECK(kv.live_blocks().size() == 3);
}

TEST_CASE("equal prefixes take as many pages after many switches as after one, whoever's home is where") {
  std::mt19937 random(1);
  KvManager kv(64, {32, 32, 32, 32}, 16, true, Phase::kTp);
  std::vector<std::vector<int32_t>> blocks(16);
  for (size_t i = 0; i < blocks.size(); ++i)
    for (int p = 0; p < 3; ++p) {  // two shared, one of its own
      const int32_t known = p < 2 ? kv.find(key_of(p), -1) : -1;
      blocks[i].push_back(known >= 0 ? known : kv.allocate(-1));
      kv.set_full(blocks[i].back());
      if (p < 2) kv.register_block(blocks[i].back(), key_of(p), 0);
    }
  for (int round = 0; round < 6; ++round) {
    std::vector<KvManager::SequenceBlocks> sequences;
    for (size_t i = 0; i < blocks.size(); ++i) sequences.push_back({blocks[i], static_cast<int32_t>(i % 4)});
    std::shuffle(sequences.begin(), sequences.end(), random);
    std::shuffle(blocks.begin(), blocks.end(), random);  // other homes in the next round
    CHECK(kv.blocks_in_use() == 2 + 16);
    kv.open_ep(sequences);
    check_pages(kv);
    kv.close(Layout::kEp, sequences);
    CHECK(kv.blocks_in_use() == 2 * 4 + 16);
    CHECK(kv.tp_pages_needed() == 2 + 16);
    kv.open_tp();
    kv.close(Layout::kTp, sequences);
    check_pages(kv);
  }
  for (std::vector<int32_t>& sequence : blocks)
    for (int32_t b : sequence) kv.release(b);
  CHECK(kv.available(-1) == 64);
}

TEST_CASE("what TP needs counts equal prefixes of several homes once, and only what is in use") {
  KvManager kv(8, {4, 4}, 16, true, Phase::kEp);
  for (int home : {0, 1, 1}) {  // the second of home 1 finds its key taken: it has a page of its own
    const int32_t b = kv.allocate(home);
    kv.set_full(b);
    kv.register_block(b, key_of(1), 1);
  }
  const int32_t only_cached = kv.allocate(0);
  kv.set_full(only_cached);
  kv.register_block(only_cached, key_of(2), 1);
  const int32_t used = kv.allocate(1);
  kv.set_full(used);
  kv.register_block(used, key_of(2), 1);
  CHECK(kv.tp_pages_needed() == 3);
  kv.release(only_cached);
  CHECK(kv.blocks_in_use() == 4);
  CHECK(kv.tp_pages_needed() == 3);
}

TEST_CASE("a release helps where it frees a page of the kind that lacks") {
  KvManager kv(3, {3, 2}, 16, true, Phase::kEp);
  std::vector<int32_t> shared, own;
  for (int home : {0, 1}) {
    shared.push_back(kv.allocate(home));
    kv.set_full(shared.back());
    kv.register_block(shared.back(), key_of(1), 1);
    own.push_back(kv.allocate(home));
  }
  kv.open_tp();  // three pages: one for the equal prefixes
  REQUIRE(kv.allocate(0) == -1);
  CHECK_FALSE(kv.lacks_ep_page(0));  // TP is full
  CHECK_FALSE(kv.release_helps(shared[1], 0));
  CHECK(kv.release_helps(own[1], 0));  // whichever home it is on
  REQUIRE(kv.allocate(1) == -1);
  CHECK(kv.lacks_ep_page(1));
  CHECK_FALSE(kv.release_helps(own[0], 1));
  CHECK(kv.release_helps(shared[1], 1));
  REQUIRE(kv.find(key_of(1), 1) == shared[1]);
  CHECK_FALSE(kv.release_helps(shared[1], 1));  // it has another user
}

TEST_CASE("a cached block is not given up where that frees no page") {
  KvManager kv(2, {3, 2}, 16, true, Phase::kEp);
  std::vector<int32_t> equal;
  for (int home : {0, 1}) {
    equal.push_back(kv.allocate(home));
    kv.set_full(equal.back());
    kv.register_block(equal.back(), key_of(1), 1);
  }
  REQUIRE(kv.allocate(0) >= 0);
  kv.open_tp();
  kv.release(equal[0]);  // cached, on a TP page that home 1 uses
  CHECK(kv.available(0) == 0);
  CHECK(kv.allocate(0) == -1);
  CHECK(kv.contains(key_of(1), 0));
  CHECK(kv.release_helps(equal[1], 0));
  kv.release(equal[1]);
  CHECK(kv.available(0) == 1);
  CHECK(kv.allocate(0) >= 0);
  check_pages(kv);
}

TEST_CASE("while the seam is inside the cached block goes that was used longest ago, of those that free a page") {
  KvManager kv(3, {4, 3}, 16, true, Phase::kEp);
  const auto full = [&](int home, uint64_t key) {
    const int32_t b = kv.allocate(home);
    kv.set_full(b);
    kv.register_block(b, key_of(key), key);
    return b;
  };
  const int32_t shared = full(0, 1), used = full(1, 1), newer = full(0, 2), newest = full(1, 3);
  kv.open_tp();  // three pages, one of them for the equal blocks
  kv.release(shared);
  kv.release(newer);
  kv.release(newest);
  REQUIRE(kv.allocate(1) >= 0);
  CHECK(kv.contains(key_of(1), 0));
  CHECK_FALSE(kv.contains(key_of(2), 0));
  CHECK(kv.contains(key_of(3), 1));
  REQUIRE(kv.allocate(0) >= 0);
  CHECK(kv.contains(key_of(1), 0));
  CHECK_FALSE(kv.contains(key_of(3), 1));
  CHECK(kv.allocate(0) == -1);
  kv.release(used);
  CHECK(kv.allocate(0) >= 0);
  CHECK_FALSE(kv.contains(key_of(1), 0));
  check_pages(kv);
}

TEST_CASE("a prefix page of one home is no hit for another while the seam is inside") {
  KvManager kv(8, {4, 4}, 16, true, Phase::kTp);
  const int32_t b = kv.allocate(-1);
  kv.set_full(b);
  kv.register_block(b, key_of(3), 3);
  std::vector<int32_t> x{b};
  const std::vector<KvManager::SequenceBlocks> sequences{{x, 1}};
  kv.open_ep(sequences);
  CHECK(kv.find(key_of(3), 0) == -1);
  CHECK(kv.find(key_of(3), 1) == b);
}

TEST_CASE("cached blocks follow their chain to its home, or are given up when there is no room") {
  KvManager kv(8, {2, 2}, 16, true, Phase::kTp);
  std::vector<int32_t> chain;
  for (int i = 0; i < 3; ++i) {
    chain.push_back(kv.allocate(-1));
    kv.set_full(chain.back());
    kv.register_block(chain.back(), key_of(10 + i), 10);
  }
  kv.release(chain[2]);
  kv.release(chain[1]);
  std::vector<int32_t> x{chain[0]};
  const std::vector<KvManager::SequenceBlocks> sequences{{x, 1}};
  kv.open_ep(sequences);
  check_pages(kv);
  CHECK(kv.live_blocks().size() == 2);  // home 1 has two pages: one in use, one cached; the third is gone
  kv.close(Layout::kEp, {});
  check_pages(kv);
}

TEST_CASE("where cached blocks do not all fit behind a switch, those that were used last stay, heads of chains before their tails") {
  for (const Phase from : {Phase::kTp, Phase::kEp}) {
    const bool from_tp = from == Phase::kTp;
    KvManager kv(from_tp ? 12 : 5, {from_tp ? 3 : 6, from_tp ? 2 : 6}, 16, true, from);
    const auto home_of = [](int chain) { return chain % 2; };
    std::vector<std::vector<int32_t>> chains(4);
    for (int c = 0; c < 4; ++c)
      for (int i = 0; i < 3; ++i) {
        chains[c].push_back(kv.allocate(from_tp ? -1 : home_of(c)));
        kv.set_full(chains[c].back());
        kv.register_block(chains[c].back(), key_of(100 * c + i), static_cast<uint64_t>(home_of(c)));
      }
    for (std::vector<int32_t>& chain : chains)
      for (size_t i = chain.size(); i-- > 0;) kv.release(chain[i]);
    if (from_tp) kv.open_ep({});
    else kv.open_tp();
    check_pages(kv);
    kv.close(from_tp ? Layout::kEp : Layout::kTp, {});
    check_pages(kv);
    const auto kept = [&](int chain, int i) {
      const int32_t b = kv.find(key_of(100 * chain + i), from_tp ? home_of(chain) : -1);
      if (b >= 0) kv.release(b);
      return b >= 0;
    };
    // Home 0 has chains 0 and 2, home 1 chains 1 and 3; there is room for three and two blocks, in TP for five of both.
    for (int i = 0; i < 3; ++i) {
      CHECK_FALSE(kept(0, i));
      CHECK_FALSE(kept(1, i));
      CHECK(kept(2, i) == (from_tp || i < 2));
      CHECK(kept(3, i) == (!from_tp || i < 2));
    }
  }
}

TEST_CASE("behind a switch to TP the homes' cached blocks are one list by their last use") {
  for (int first : {0, 1}) {
    KvManager kv(6, {4, 4}, 16, true, Phase::kEp);
    std::vector<int32_t> blocks;
    for (int i = 0; i < 6; ++i) {  // homes in turns
      blocks.push_back(kv.allocate((i + first) % 2));
      kv.set_full(blocks.back());
      kv.register_block(blocks.back(), key_of(i), 0);
    }
    const int order[] = {4, 1, 0, 3, 5, 2};
    for (int i : order) kv.release(blocks[i]);
    kv.open_tp();
    kv.close(Layout::kTp, {});
    check_pages(kv);
    for (int n = 0; n < 6; ++n) {
      for (int k = 0; k < 6; ++k) CHECK(kv.contains(key_of(order[k]), -1) == (k >= n));
      REQUIRE(kv.allocate(-1) >= 0);  // takes the oldest one's page
    }
  }
}

TEST_CASE("random use over many switches keeps every invariant") {
  const unsigned seed = std::random_device{}();
  INFO("seed " << seed);
  std::mt19937 random(seed);
  const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 60; ++round) {
    const int homes = 1 + pick(4);
    const int64_t tp = 8 + pick(40);
    std::vector<int64_t> ep(homes);
    for (int64_t& pages : ep) pages = 4 + pick(20);
    KvManager kv(tp, ep, 16, true, pick(2) ? Phase::kTp : Phase::kEp);
    struct Holder {
      std::vector<int32_t> blocks;
      int home;
    };
    std::vector<Holder> holders;
    const auto hold = [&] {
      Holder h{{}, kv.phase() == Phase::kTp ? -1 : pick(homes)};
      const int chain = pick(3), length = 1 + pick(5);
      for (int i = 0; i < length; ++i) {
        const BlockKey key = key_of(static_cast<uint64_t>(chain * 100 + i + 1));
        int32_t b = kv.find(key, h.home);
        if (b < 0) {
          b = kv.allocate(h.home);
          if (b < 0) break;
          kv.set_full(b);
          kv.register_block(b, key, static_cast<uint64_t>(chain));
        }
        h.blocks.push_back(b);
      }
      holders.push_back(h);
    };
    const auto drop = [&](size_t i) {
      for (size_t k = holders[i].blocks.size(); k-- > 0;) kv.release(holders[i].blocks[k]);
      holders.erase(holders.begin() + static_cast<long>(i));
    };
    for (int i = 0; i < 120; ++i) {
      const int what = pick(10);
      if (what < 5) {
        hold();
      } else if (what < 8 && !holders.empty()) {
        drop(static_cast<size_t>(pick(static_cast<int>(holders.size()))));
      } else if (kv.phase() == Phase::kBoth) {
        const Layout to = pick(2) ? Layout::kTp : Layout::kEp;
        std::vector<KvManager::SequenceBlocks> sequences;
        for (Holder& h : holders) sequences.push_back({h.blocks, h.home});
        kv.close(to, sequences);
        if (to == Layout::kTp)
          for (Holder& h : holders) h.home = -1;
      } else if (kv.phase() == Phase::kEp) {
        if (kv.tp_pages_needed() <= kv.tp_capacity()) kv.open_tp();
      } else {
        std::vector<int64_t> room = ep;
        std::vector<KvManager::SequenceBlocks> sequences;
        bool fits = true;
        for (Holder& h : holders) {
          h.home = static_cast<int>(std::max_element(room.begin(), room.end()) - room.begin());
          room[h.home] -= static_cast<int64_t>(h.blocks.size());
          fits = fits && room[h.home] >= 0;
          sequences.push_back({h.blocks, h.home});
        }
        if (fits) kv.open_ep(sequences);
        else
          for (Holder& h : holders) h.home = -1;
      }
      check_pages(kv);
      for (const Holder& h : holders)
        for (int32_t b : h.blocks) {
          REQUIRE(kv.block(b).users > 0);
          REQUIRE((kv.phase() == Phase::kTp || kv.block(b).home == h.home));
        }
    }
    while (!holders.empty()) drop(holders.size() - 1);
    kv.drop_cached();
    CHECK(kv.live_blocks().empty());
    for (int h = 0; h < homes; ++h)
      CHECK(kv.available(h) == (kv.phase() == Phase::kTp ? tp : kv.phase() == Phase::kEp ? ep[h] : std::min(tp, ep[h])));
  }
}

}  // namespace moebius
