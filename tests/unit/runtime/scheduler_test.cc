// Which home a sequence gets when a switch to EP has to place all that run.
#include "lib/runtime/scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>

#include "tests/catch.h"

namespace moebius {
namespace {

constexpr int kHomes = 8;
constexpr int64_t kPages = 64;  // a home's

uint64_t seed_from_environment() {
  const char* text = std::getenv("MOEBIUS_SEED");
  return text ? std::strtoull(text, nullptr, 10) : std::random_device{}();
}

// Pages of sequences that fill half of all homes exactly, none larger than a home.
std::vector<int64_t> half_full(std::mt19937_64& rng) {
  std::vector<int64_t> pages;
  for (int64_t left = kHomes * kPages / 2; left > 0; left -= pages.back()) {
    const int64_t longest = std::uniform_int_distribution<int>(0, 2)(rng) == 0 ? kPages : 8;
    pages.push_back(std::uniform_int_distribution<int64_t>(1, std::min(left, longest))(rng));
  }
  std::shuffle(pages.begin(), pages.end(), rng);
  return pages;
}

using Choice = std::function<int(std::span<const HomeCandidate>)>;

// Whether every sequence finds room, placed in this order.
bool all_placed(const std::vector<int64_t>& pages, const Choice& choose) {
  std::vector<HomeCandidate> homes(kHomes);
  for (HomeCandidate& h : homes) h.room = kPages;
  for (int64_t p : pages) {
    for (HomeCandidate& h : homes) h.pages = p;
    const int home = choose(homes);
    if (home < 0 || homes[home].room < p) return false;
    homes[home].room -= p;
    homes[home].requests += 1;
    homes[home].tokens += p * 16;
  }
  return true;
}

// Fewest requests, then fewest tokens, room or no room.
int choose_blindly(std::span<const HomeCandidate> homes) {
  const auto load = [](const HomeCandidate& h) { return std::pair(h.requests, h.tokens); };
  return static_cast<int>(std::min_element(homes.begin(), homes.end(), [&](auto& a, auto& b) { return load(a) < load(b); }) -
                          homes.begin());
}

}  // namespace

TEST_CASE("half-full homes take every sequence, longest first; in order of arrival, or without a look at the room, they do not") {
  // Longest first always succeeds: of those larger than half a home there are fewer than homes, so each finds an empty one, and
  // the others find no home too full, because all of them together are at most half full.
  const uint64_t seed = seed_from_environment();
  INFO("MOEBIUS_SEED=" << seed);
  std::mt19937_64 rng(seed);
  constexpr int kFills = 2000;
  int refused_by_arrival = 0, refused_blindly = 0;
  for (int fill = 0; fill < kFills; ++fill) {
    std::vector<int64_t> pages = half_full(rng);
    refused_by_arrival += !all_placed(pages, choose_home);
    std::sort(pages.begin(), pages.end(), std::greater<>());
    INFO("fill " << fill << ": " << pages.size() << " sequences, the longest of " << pages[0] << " pages");
    REQUIRE(all_placed(pages, choose_home));
    refused_blindly += !all_placed(pages, choose_blindly);
  }
  CHECK(refused_by_arrival > kFills / 100);
  CHECK(refused_blindly > kFills / 10);
}

TEST_CASE("a home is chosen by fewest requests, most shared blocks, fewest tokens, lowest number, among those with room") {
  // requests, tokens, room, pages, shared
  using Homes = std::vector<HomeCandidate>;
  CHECK(choose_home(Homes{}) == -1);
  CHECK(choose_home(Homes{{0, 0, 3, 4, 0}, {0, 0, 0, 1, 0}}) == -1);
  CHECK(choose_home(Homes{{0, 0, 3, 4, 0}, {9, 900, 4, 4, 0}}) == 1);
  CHECK(choose_home(Homes{{2, 10, 9, 4, 3}, {1, 99, 9, 4, 0}}) == 1);
  CHECK(choose_home(Homes{{1, 10, 9, 4, 0}, {1, 99, 9, 3, 1}}) == 1);
  CHECK(choose_home(Homes{{1, 99, 9, 4, 1}, {1, 10, 9, 4, 1}}) == 1);
  CHECK(choose_home(Homes{{1, 10, 9, 4, 1}, {1, 10, 9, 4, 1}}) == 0);
}

}  // namespace moebius
