#include <cmath>
#include <limits>
#include <numeric>

#include "tests/cuda/harness.h"

namespace moebius {

namespace {

// What the device chooses for rows of logits that lie in so many shares of whole units.
std::vector<int32_t> choose(const std::vector<float>& logits, const std::vector<TokenChoice>& choices, int vocab, int shares, int64_t unit) {
  const auto rows = static_cast<int64_t>(choices.size()), stride = round_up(vocab, 16) + 16;
  std::vector<Array<float>> memory;
  std::vector<const float*> pointers;
  std::vector<Range> columns;
  for (int s = 0; s < shares; ++s) {
    columns.push_back(share_of(vocab, s, shares, unit));
    std::vector<float> share(static_cast<size_t>(rows * stride), NAN);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(logits.data() + r * vocab + columns.back().begin, columns.back().size(), share.data() + r * stride);
    memory.emplace_back(share);
    pointers.push_back(memory.back().get());
  }
  const Array<TokenChoice> choices_there(choices);
  const Array<int32_t> tokens(choices.size());
  test_device().ops().choose_tokens({{0, rows}, shares, pointers.data(), columns.data(), stride, choices_there.get(), tokens.get()},
                                    {0, 1, nullptr, test_device().queue(0)});
  return tokens.values();
}

}  // namespace

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
    std::vector<int32_t> first;
    for (const int shares : {1, 2, 5}) {
      const std::vector<int32_t> got = choose(logits, choices, vocab, shares, 16);
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

TEST_CASE("choose_tokens: top_k and top_p take the host's token, whatever the shares, equals and all") {
  Random random(13);
  for (const int vocab : {1, 2, 50, 3000}) {
    constexpr int kRows = 48;
    std::vector<float> logits = random.floats(static_cast<size_t>(kRows * vocab), 3);
    std::vector<TokenChoice> choices;
    for (int r = 0; r < kRows; ++r) {
      float* x = logits.data() + r * vocab;
      if (r % 4 == 1)
        for (int i = 0; i < vocab; ++i) x[i] = std::round(x[i]);  // many equals, both zeros
      if (r % 8 == 2)
        for (int i = 1; i < vocab; i += 2) x[i] = -std::numeric_limits<float>::infinity();
      if (r % 16 == 7) std::fill_n(x, vocab, 0.5f);
      TokenChoice c{1.0f / (0.4f + 0.02f * static_cast<float>(r)), r % 5 == 0 ? 0.03f : 0.0f, random.below(1000) / 1000.0, 0, 1};
      if (r % 3 != 1) c.top_k = 1 + random.below(r % 2 == 0 ? 5 : 2 * vocab);
      if (r % 3 != 0) c.top_p = r % 12 == 1 ? 0.0f : static_cast<float>(random.below(100)) / 100.0f;
      choices.push_back(c);
    }
    std::vector<int32_t> first;
    for (const int shares : {1, 3}) {
      const std::vector<int32_t> got = choose(logits, choices, vocab, shares, 1);
      if (first.empty()) first = got;
      REQUIRE(got == first);
    }
    for (int r = 0; r < kRows; ++r) {
      const TokenChoice& c = choices[static_cast<size_t>(r)];
      if (c.top_p >= 1 && c.top_k >= vocab) continue;  // asks for nothing
      INFO("vocabulary " << vocab << " row " << r << " top_k " << c.top_k << " top_p " << c.top_p << " uniform " << c.uniform);
      const float* x = logits.data() + r * vocab;
      std::vector<int32_t> order(static_cast<size_t>(vocab));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[a] > x[b]; });
      const auto weight = [&](int32_t t) {
        const double w = std::exp((static_cast<double>(x[t]) - x[order[0]]) * c.factor);
        return w < c.floor ? 0.0 : w;
      };
      size_t most = c.top_k > 0 ? std::min(order.size(), static_cast<size_t>(c.top_k)) : order.size();
      double total = 0;
      for (size_t i = 0; i < most; ++i) total += weight(order[i]);
      const double close = 0x1p-18 * total;
      // The largest prefix that may be meant, and the sum before the token.
      double least = total, sum = 0, before = -1;
      if (c.top_p < 1) {
        for (size_t i = 0; i < most; ++i)
          if ((sum += weight(order[i])) >= c.top_p * total - close) {
            least = sum;
            break;
          }
      }
      sum = 0;
      size_t rank = 0;
      for (; rank < order.size() && order[rank] != first[static_cast<size_t>(r)]; ++rank) sum += weight(order[rank]);
      before = sum;
      REQUIRE(rank < most);
      REQUIRE(weight(order[rank]) > 0);
      // Between this prefix and the next, where top_p falls on an edge.
      const double next = std::min(total, least + (c.top_p < 1 ? 1.0 : 0.0));
      CHECK(before <= c.uniform * next + close);
      CHECK(before + weight(order[rank]) >= c.uniform * least - close);
      CHECK(before < std::max(c.top_p * total, 1e-9) + close);  // no prefix that is enough comes before it
    }
  }
}

}  // namespace moebius
