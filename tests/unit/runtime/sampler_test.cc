#include "lib/runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>

#include "lib/base/error.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/runtime/philox.h"
#include "tests/catch.h"

namespace moebius {
namespace {

std::vector<float> logits_of(int vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> x(static_cast<size_t>(vocab));
  for (float& v : x) v = normal(random);
  return x;
}

struct Drawer {
  explicit Drawer(SamplingParams p, std::vector<int32_t> prompt = {1}, int most = 200) : params(std::move(p)), scratch(most) {
    params.max_tokens = 1 << 20;
    state.start(params, 42, prompt, most);
  }
  SampleResult operator()(const std::vector<float>& x) {
    return sample(x.data(), static_cast<int64_t>(x.size()), params, state, cpu_ops(best_isa()), scratch, eos);
  }
  std::map<int, int> draw(const std::vector<float>& x, int n) {
    std::map<int, int> counts;
    for (int i = 0; i < n; ++i) ++counts[(*this)(x).token];
    return counts;
  }
  SamplingParams params;
  SamplerState state;
  SamplerScratch scratch;
  std::vector<int32_t> eos = {7};
};

SamplingParams params_with(void (*change)(SamplingParams&)) {
  SamplingParams p;
  change(p);
  return p;
}

// Largest deviation of counts from probabilities, in standard deviations.
double worst_sigma(const std::map<int, int>& counts, const std::vector<double>& p, int n) {
  double worst = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const auto it = counts.find(static_cast<int>(i));
    const double seen = it == counts.end() ? 0 : it->second;
    if (p[i] == 0) {
      if (seen > 0) return 1e9;
      continue;
    }
    worst = std::max(worst, std::fabs(seen - n * p[i]) / std::sqrt(n * p[i] * (1 - p[i]) + 1));
  }
  return worst;
}

std::vector<double> softmax(const std::vector<float>& x, double temperature) {
  std::vector<double> p;
  const double most = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (float v : x) sum += (p.push_back(std::exp((v - most) / temperature)), p.back());
  for (double& v : p) v /= sum;
  return p;
}

// Keeps the given tokens and rescales.
std::vector<double> only(std::vector<double> p, const std::vector<int>& kept) {
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i)
    if (std::find(kept.begin(), kept.end(), static_cast<int>(i)) == kept.end()) p[i] = 0;
  for (double v : p) sum += v;
  for (double& v : p) v /= sum;
  return p;
}

std::vector<int> by_probability(const std::vector<double>& p) {
  std::vector<int> order(p.size());
  for (size_t i = 0; i < p.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return p[static_cast<size_t>(a)] > p[static_cast<size_t>(b)]; });
  return order;
}

constexpr int kDraws = 40000;
constexpr double kSigmas = 5;  // of 200 tokens: passes by chance with probability above 0.9999

}  // namespace

TEST_CASE("Philox gives the published numbers") {
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
        std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("greedy takes the largest, the lowest of equals") {
  Drawer d(params_with([](SamplingParams& p) { p.temperature = 0; }));
  std::vector<float> x(64, 1.0f);
  x[9] = x[30] = 3;
  CHECK(d(x).token == 9);
}

TEST_CASE("draws follow the distribution at any temperature") {
  for (double t : {0.5, 1.0, 2.0}) {
    SamplingParams p;
    p.temperature = t;
    for (int vocab : {64, 200}) {  // one block of the passes over a vocabulary, and several with a rest
      const auto x = logits_of(vocab, 1);
      CHECK(worst_sigma(Drawer(p).draw(x, kDraws), softmax(x, t), kDraws) < kSigmas);
    }
  }
}

TEST_CASE("top_k, top_p and min_p keep exactly the tokens they should") {
  const int vocab = GENERATE(64, 200);
  const auto x = logits_of(vocab, 2);
  const auto p = softmax(x, 1);
  const auto order = by_probability(p);
  const auto head = [&](size_t n) { return std::vector<int>(order.begin(), order.begin() + static_cast<long>(n)); };
  CHECK(worst_sigma(Drawer(params_with([](SamplingParams& s) { s.top_k = 5; })).draw(x, kDraws), only(p, head(5)), kDraws) < kSigmas);
  const auto nucleus = [](const std::vector<double>& q, const std::vector<int>& by, double goal) {
    double sum = 0;
    size_t n = 0;
    while (sum < goal) sum += q[static_cast<size_t>(by[n++])];
    return n;
  };
  for (double top_p : {0.3, 0.9, 0.999}) {
    SamplingParams s;
    s.top_p = top_p;
    CHECK(worst_sigma(Drawer(s).draw(x, kDraws), only(p, head(nucleus(p, order, top_p))), kDraws) < kSigmas);
    s.top_k = 12;  // top_p of what top_k left
    CHECK(worst_sigma(Drawer(s).draw(x, kDraws), only(p, head(nucleus(only(p, head(12)), order, top_p))), kDraws) < kSigmas);
  }
  std::vector<int> likely;
  for (int i = 0; i < vocab; ++i)
    if (p[static_cast<size_t>(i)] >= 0.2 * p[static_cast<size_t>(order[0])]) likely.push_back(i);
  CHECK(worst_sigma(Drawer(params_with([](SamplingParams& s) { s.min_p = 0.2; })).draw(x, kDraws), only(p, likely), kDraws) < kSigmas);
}

TEST_CASE("allowed tokens, biases and the minimum length bound the choice") {
  auto x = logits_of(64, 3);
  x[7] = 50;  // end of text
  Drawer minimum(params_with([](SamplingParams& p) { p.temperature = 0, p.min_tokens = 3, p.stop_token_ids = {8}; }));
  x[8] = 49;
  for (int i = 0; i < 3; ++i) {
    const int token = minimum(x).token;
    CHECK(token != 7);
    CHECK(token != 8);
  }
  CHECK(minimum(x).token == 7);
  CHECK(Drawer(params_with([](SamplingParams& p) { p.temperature = 0, p.allowed_token_ids = {3, 4}; }))(x).token == (x[3] >= x[4] ? 3 : 4));
  CHECK(Drawer(params_with([](SamplingParams& p) { p.temperature = 0, p.logit_bias = {{20, 100.0f}}; }))(x).token == 20);
  CHECK(Drawer(params_with([](SamplingParams& p) { p.temperature = 0, p.logit_bias = {{7, -100.0f}}; }))(x).token == 8);
}

TEST_CASE("penalties count what was generated, repetition the prompt too") {
  std::vector<float> x(64, -5.0f);
  x[10] = 2.0f, x[11] = 1.5f, x[12] = 1.4f;
  Drawer presence(params_with([](SamplingParams& p) { p.temperature = 0, p.presence_penalty = 0.55; }));
  CHECK(presence(x).token == 10);
  CHECK(presence(x).token == 11);  // 2.0 − 0.55 < 1.5
  CHECK(presence(x).token == 10);  // 1.45 > 1.4 > 0.95; presence counts once
  Drawer frequency(params_with([](SamplingParams& p) { p.temperature = 0, p.frequency_penalty = 0.3; }));
  CHECK(frequency(x).token == 10);  // 2.0
  CHECK(frequency(x).token == 10);  // 1.7
  CHECK(frequency(x).token == 11);  // 1.4 < 1.5
  Drawer repetition(params_with([](SamplingParams& p) { p.temperature = 0, p.repetition_penalty = 2; }), {10});
  CHECK(repetition(x).token == 11);  // 2.0 ÷ 2: it is in the prompt
  CHECK(repetition(x).token == 12);
}

TEST_CASE("log-probabilities are of the raw distribution") {
  const auto x = logits_of(200, 4);
  const auto p = softmax(x, 1);
  Drawer d(params_with([](SamplingParams& s) { s.temperature = 0.3, s.logprobs = 4, s.logit_bias = {{5, 40.0f}}; }));
  const SampleResult r = d(x);
  CHECK(r.token == 5);
  CHECK(r.logprob == Approx(std::log(p[5])).epsilon(1e-4));
  REQUIRE(r.num_top == 4);
  const auto order = by_probability(p);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(r.top[i].token == order[i]);
    CHECK(r.top[i].logprob == Approx(std::log(p[static_cast<size_t>(order[i])])).epsilon(1e-4));
  }
}

TEST_CASE("rows that are no numbers fail instead of choosing") {
  auto x = logits_of(64, 5);
  x[3] = std::nanf("");
  CHECK(Drawer(SamplingParams{})(x).failed);
  CHECK(Drawer(params_with([](SamplingParams& p) { p.temperature = 0; }))(std::vector<float>(64, INFINITY)).failed);
}

TEST_CASE("the n-th token depends on seed and n alone") {
  const auto x = logits_of(64, 6);
  Drawer a(SamplingParams{}), b(SamplingParams{});
  std::vector<int> first, second;
  for (int i = 0; i < 50; ++i) first.push_back(a(x).token);
  for (int i = 0; i < 50; ++i) {
    Drawer between(SamplingParams{});
    between(x);
    second.push_back(b(x).token);
  }
  CHECK(first == second);
  CHECK(request_seed(1, "a", 0) == request_seed(1, "a", 0));
  CHECK(request_seed(1, "a", 0) != request_seed(1, "b", 0));
  CHECK(request_seed(1, "a", 0) != request_seed(2, "a", 0));
  CHECK(request_seed(1, "a", 0) != request_seed(1, "a", 1));
}

TEST_CASE("parameters out of range are refused by name and value") {
  const auto refused = [](void (*change)(SamplingParams&), const char* key) {
    SamplingParams p;
    change(p);
    CHECK_THROWS_WITH(check(p, 64), Catch::Contains(key));
  };
  refused([](SamplingParams& p) { p.max_tokens = 0; }, "max_tokens");
  refused([](SamplingParams& p) { p.min_tokens = 17; }, "min_tokens");
  refused([](SamplingParams& p) { p.temperature = -1; }, "temperature");
  refused([](SamplingParams& p) { p.temperature = NAN; }, "temperature");
  refused([](SamplingParams& p) { p.top_p = 0; }, "top_p");
  refused([](SamplingParams& p) { p.top_p = 1.1; }, "top_p");
  refused([](SamplingParams& p) { p.top_k = -2; }, "top_k");
  refused([](SamplingParams& p) { p.min_p = 2; }, "min_p");
  refused([](SamplingParams& p) { p.presence_penalty = 3; }, "presence_penalty");
  refused([](SamplingParams& p) { p.repetition_penalty = 0; }, "repetition_penalty");
  refused([](SamplingParams& p) { p.repetition_penalty = 1e-46; }, "repetition_penalty");  // 0 as a float
  refused([](SamplingParams& p) { p.n = 0; }, "n is 0");
  refused([](SamplingParams& p) { p.logprobs = 21; }, "logprobs");
  refused([](SamplingParams& p) { p.logprobs = -2; }, "logprobs");
  refused([](SamplingParams& p) { p.presence_penalty = NAN; }, "presence_penalty");
  refused([](SamplingParams& p) { p.repetition_penalty = NAN; }, "repetition_penalty");
  refused([](SamplingParams& p) { p.logit_bias = {{1, NAN}}; }, "logit_bias");
  refused([](SamplingParams& p) { p.stop_token_ids = {64}; }, "stop_token_ids");
  refused([](SamplingParams& p) { p.allowed_token_ids = {-1}; }, "allowed_token_ids");
  refused([](SamplingParams& p) { p.logit_bias = {{1, 101.0f}}; }, "logit_bias");
}

}  // namespace moebius
