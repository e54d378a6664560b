#include <cmath>
#include <limits>

#include "tests/cuda/harness.h"

namespace moebius {

TEST_CASE("choose_tokens: the cumulative distribution in order, whatever the shares; the first of equals; no numbers, no token") {
  Random random(12);
  for (const int vocab : {1, 40, 1024, 5000}) {
    constexpr int kRows = 12;
    std::vector<float> logits = random.floats(static_cast<size_t>(kRows * vocab), 3);
    const auto row_of = [&](int r) { return logits.data() + r * vocab; };
    row_of(1)[vocab / 2] = row_of(1)[vocab - 1] = 50;                       // equals
    row_of(2)[vocab - 1] = NAN;
    row_of(3)[0] = std::numeric_limits<float>::infinity();
    for (int i = 0; i < vocab; ++i) row_of(4)[i] = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < vocab; i += 2) row_of(5)[i] = -std::numeric_limits<float>::infinity();
    if (vocab == 1) row_of(5)[0] = 0;
    std::vector<TokenChoice> choices;
    for (int r = 0; r < kRows; ++r)
      choices.push_back({r < 3 ? 0.0f : 1.0f / (0.5f + 0.1f * static_cast<float>(r)), r == 8 ? 0.05f : 0.0f, r == 10 ? 0.0 : r == 11 ? 0x1.fffffffffffffp-1 : random.below(1000) / 1000.0});
    const Array<TokenChoice> choices_there(choices);
    std::vector<int32_t> first;
    for (const int shares : {1, 2, 5}) {
      const int64_t stride = round_up(vocab, 16) + 16;
      std::vector<Array<float>> memory;
      std::vector<const float*> pointers;
      std::vector<Range> columns;
      for (int s = 0; s < shares; ++s) {
        const Range tiles = share_of(div_up(vocab, 16), s, shares);
        columns.push_back({std::min<int64_t>(vocab, tiles.begin * 16), std::min<int64_t>(vocab, tiles.end * 16)});
        std::vector<float> share(static_cast<size_t>(kRows * stride), NAN);
        for (int r = 0; r < kRows; ++r)
          for (int64_t c = columns.back().begin; c < columns.back().end; ++c) share[static_cast<size_t>(r * stride + c - columns.back().begin)] = row_of(r)[c];
        memory.emplace_back(share);
        pointers.push_back(memory.back().get());
      }
      const Array<int32_t> tokens(static_cast<size_t>(kRows));
      test_device().ops().choose_tokens({{0, kRows}, shares, pointers.data(), columns.data(), stride, choices_there.get(), tokens.get()}, {0, 1, nullptr, test_device().queue(0)});
      const std::vector<int32_t> got = tokens.values();
      if (first.empty()) first = got;
      REQUIRE(got == first);
    }
    for (int r = 0; r < kRows; ++r) {
      INFO("vocabulary " << vocab << " row " << r);
      const float* x = row_of(r);
      int best = -1;
      bool bad = false;
      for (int i = 0; i < vocab; ++i) {
        bad = bad || std::isnan(x[i]) || x[i] == std::numeric_limits<float>::infinity();
        if (x[i] > (best < 0 ? -std::numeric_limits<float>::infinity() : x[best])) best = i;
      }
      const int token = first[static_cast<size_t>(r)];
      if (bad || best < 0) {
        CHECK(token == -1);
        continue;
      }
      const TokenChoice& c = choices[static_cast<size_t>(r)];
      if (c.factor == 0) {
        CHECK(token == best);
        continue;
      }
      REQUIRE(token >= 0);
      double total = 0, before = 0;
      const auto weight = [&](int i) {
        const double w = std::exp((static_cast<double>(x[i]) - x[best]) * c.factor);
        return w < c.floor ? 0.0 : w;
      };
      for (int i = 0; i < vocab; ++i) {
        if (i == token) before = total;
        total += weight(i);
      }
      // Each weight is right to some 2^−21 of itself (its exponent is a product in float of sizes up to 40).
      const double goal = c.uniform * total, close = 0x1p-18 * total;
      CHECK(weight(token) > 0);
      CHECK(before <= goal + close);
      CHECK(before + weight(token) >= goal - close);
    }
  }
}

}  // namespace moebius
