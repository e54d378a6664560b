#include "lib/runtime/step_tables.h"

#include <cstring>
#include <random>

#include "tests/catch.h"

namespace moebius {
namespace {

constexpr StepLimits kLimits{40, 8, 8, 12, 16};

struct Sequences {
  std::vector<std::vector<int32_t>> pages[2];  // [Layout][sequence]
};

// The first `chunks` are home 0's.
void take_shape(StepPlan& plan, int chunks) {
  const auto all = static_cast<int64_t>(plan.chunks.size());
  const int64_t rows = chunks < all ? plan.chunks[static_cast<size_t>(chunks)].row_begin : plan.num_rows();
  plan.shape.num_rows = plan.num_rows();
  plan.shape.num_chunks = all;
  plan.shape.homes = {{0, rows}, {rows, plan.num_rows()}};
  plan.shape.chunks_of_home = {{0, chunks}, {chunks, all}};
}

// A plan of some sequences at random positions; the tables of layouts that are not alive are empty.
StepPlan random_plan(std::mt19937& random, Sequences& sequences, bool tp, bool ep) {
  StepPlan plan(kLimits.rows, kLimits.chunks, 2);
  const auto below = [&](int n) { return static_cast<int32_t>(random() % static_cast<uint32_t>(n)); };
  const int chunks = below(9);
  for (int layout : {0, 1}) sequences.pages[layout].assign(static_cast<size_t>(chunks), {});
  for (int c = 0; c < chunks; ++c) {
    const int32_t row = static_cast<int32_t>(plan.num_rows()), rows = 1 + below(5), first = below(12 * 16 - 5);
    plan.chunks.push_back({nullptr, row, rows, true});
    for (int layout : {0, 1}) {
      std::vector<int32_t>& pages = sequences.pages[layout][static_cast<size_t>(c)];
      if (layout == 0 ? tp : ep) pages.resize(static_cast<size_t>(div_up(first + rows, 16)));
      for (int32_t& page : pages) page = below(1000);
      const int32_t* table = pages.empty() ? nullptr : pages.data();
      plan.attention[layout].push_back({row, rows, first, table});
      for (int32_t i = 0; i < rows; ++i) plan.places[layout].push_back({first + i, table});
    }
    for (int32_t i = 0; i < rows; ++i) plan.tokens.push_back(below(30000));
    plan.logit_rows.push_back({row + rows - 1, c, first + rows - 1, true});
  }
  take_shape(plan, random() % 2 == 0 ? chunks / 2 : chunks);
  return plan;
}

}  // namespace

TEST_CASE("a step's block says elsewhere what the plan says here") {
  std::mt19937 random(20261125);
  const StepBlock block(kLimits);
  for (int round = 0; round < 300; ++round) {
    INFO("round " << round);
    Sequences sequences;
    const bool tp = round % 3 != 1, ep = round % 3 != 0;
    const StepPlan plan = random_plan(random, sequences, tp, ep);
    std::vector<std::byte> out(static_cast<size_t>(block.bytes()), std::byte{0xee});
    // As if it lay elsewhere: pointers are to that place, and what they mean is found by the distance.
    const std::byte* const base = reinterpret_cast<const std::byte*>(uintptr_t{1} << 40);
    const int64_t used = block.write(plan, plan.shape, base, out.data());
    REQUIRE(used <= block.bytes());
    CHECK(std::all_of(out.begin() + used, out.end(), [](std::byte b) { return b == std::byte{0xee}; }));
    const auto here = [&]<class T>(const T* there) {
      const int64_t at = reinterpret_cast<const std::byte*>(there) - base;
      REQUIRE(at >= 0);
      REQUIRE(at < used);
      return reinterpret_cast<const T*>(out.data() + at);
    };
    if (plan.num_rows() == 0) continue;
    const StepView view = block.view(base);
    CHECK(std::memcmp(here(view.tokens), plan.tokens.data(), plan.tokens.size() * sizeof(int32_t)) == 0);
    for (size_t i = 0; i < plan.logit_rows.size(); ++i) CHECK(here(view.logit_rows)[i] == plan.logit_rows[i].row);
    for (int layout : {0, 1}) {
      for (size_t c = 0; c < plan.chunks.size(); ++c) {
        const SequenceChunk there = here(view.chunks[layout])[c], mine = plan.attention[layout][c];
        CHECK(there.row_begin == mine.row_begin);
        CHECK(there.num_rows == mine.num_rows);
        CHECK(there.first_position == mine.first_position);
        REQUIRE((there.pages == nullptr) == (mine.pages == nullptr));
        const std::vector<int32_t>& pages = sequences.pages[layout][c];
        for (size_t p = 0; p < pages.size(); ++p) CHECK(here(there.pages + p)[0] == pages[p]);
        for (int32_t row = mine.row_begin; row < mine.row_begin + mine.num_rows; ++row) {
          const RowPlace place = here(view.places[layout])[row];
          CHECK(place.position == plan.places[layout][static_cast<size_t>(row)].position);
          CHECK(place.pages == there.pages);
        }
      }
    }
  }
}

TEST_CASE("the longest page tables of the most sequences fit a step's block") {
  const StepBlock block(kLimits);
  StepPlan plan(kLimits.rows, kLimits.chunks, 2);
  const std::vector<int32_t> pages(static_cast<size_t>(kLimits.pages_per_sequence), 7);
  const auto last = static_cast<int32_t>(kLimits.pages_per_sequence * kLimits.page_tokens - 1);
  for (int32_t c = 0; c < kLimits.chunks; ++c) {
    plan.tokens.push_back(1);
    plan.chunks.push_back({nullptr, c, 1, true});
    for (int layout : {0, 1}) {
      plan.attention[layout].push_back({c, 1, last, pages.data()});
      plan.places[layout].push_back({last, pages.data()});
    }
  }
  take_shape(plan, static_cast<int>(kLimits.chunks));
  std::vector<std::byte> out(static_cast<size_t>(block.bytes()));
  CHECK(block.write(plan, plan.shape, out.data(), out.data()) == block.bytes());
}

TEST_CASE("a step in a larger shape: each home's rows and chunks where the shape has them, nobody in between") {
  std::mt19937 random(5);
  constexpr StepLimits kWide{64, 32, 8, 12, 16};
  const StepBlock block(kWide);
  for (int round = 0; round < 100; ++round) {
    Sequences sequences;
    const StepPlan plan = random_plan(random, sequences, true, true);
    StepShape shape;
    shape.num_rows = 60, shape.num_chunks = 24;
    shape.homes = {{0, 0}, {0, 60}};
    shape.homes[0].end = shape.homes[1].begin = plan.shape.homes[0].size() + 3;
    if (plan.shape.homes[1].size() > shape.homes[1].size()) continue;
    shape.chunks_of_home = {{2, 12}, {12, 24}};
    std::vector<std::byte> out(static_cast<size_t>(block.bytes()), std::byte{0x55});
    block.write(plan, shape, out.data(), out.data());
    const StepView view = block.view(out.data());
    int64_t rows = 0, chunks = 0;
    for (int64_t row = 0; row < shape.num_rows; ++row) {
      rows += view.tokens[row] >= 0;
      if (view.tokens[row] < 0) CHECK(view.places[0][row].pages == nullptr);
    }
    for (int64_t c = 0; c < shape.num_chunks; ++c) chunks += view.chunks[1][c].num_rows > 0;
    CHECK(rows == plan.num_rows());
    CHECK(chunks == plan.shape.num_chunks);
    for (size_t h : {0u, 1u})
      for (int64_t c = 0; c < plan.shape.chunks_of_home[h].size(); ++c) {
        const SequenceChunk mine = plan.attention[0][static_cast<size_t>(plan.shape.chunks_of_home[h].begin + c)];
        const SequenceChunk there = view.chunks[0][shape.chunks_of_home[h].begin + c];
        CHECK(there.num_rows == mine.num_rows);
        CHECK(there.row_begin - shape.homes[h].begin == mine.row_begin - plan.shape.homes[h].begin);
        for (int32_t i = 0; i < mine.num_rows; ++i) {
          CHECK(view.tokens[there.row_begin + i] == plan.tokens[static_cast<size_t>(mine.row_begin + i)]);
          CHECK(view.places[0][there.row_begin + i].position == mine.first_position + i);
        }
      }
    for (size_t i = 0; i < plan.logit_rows.size(); ++i)
      CHECK(view.tokens[view.logit_rows[i]] == plan.tokens[static_cast<size_t>(plan.logit_rows[i].row)]);
  }
}

}  // namespace moebius
