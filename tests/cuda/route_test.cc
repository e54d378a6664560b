#include <cmath>
#include <limits>
#include <set>

#include "lib/tensor/packed.h"
#include "tests/cuda/harness.h"

namespace moebius {

// Rules of families: those of softmax, and of sigmoids with biases, with shared experts that are gated or not.
RouteRule rule_of(int experts, int top_k, int kind) {
  RouteRule rule;
  rule.num_experts = experts;
  rule.top_k = top_k;
  rule.renormalise = kind != 0;
  if (kind == 2) rule.num_shared = 4, rule.gates_shared = true;
  if (kind == 3) rule.num_shared = 1, rule.sigmoid = true, rule.scale = 2.5f;
  return rule;
}

TEST_CASE("route: the CPU's choices where they are clear, its weights, ties to the lower index, NaN last") {
  Random random(9);
  struct Shape {
    int experts, top_k, hidden, rows;
  };
  // From 32 rows on they are taken by eights; the last three have more pairs of k than are loaded at once, or more choices than a warp has lanes.
  for (const Shape& s : {Shape{4, 2, 16, 1}, Shape{16, 4, 100, 70}, Shape{60, 6, 64, 5}, Shape{128, 8, 64, 33}, Shape{200, 8, 30, 9}, Shape{512, 10, 16, 3},
                         Shape{8, 2, 2130, 32}, Shape{256, 8, 1024, 9}, Shape{60, 40, 600, 39}}) {
    const PackedMatrix m{s.experts, s.hidden}, gate{1, s.hidden};
    const float size = 4 / std::sqrt(static_cast<float>(s.hidden));  // logits of about 4
    std::vector<bf16> w(static_cast<size_t>(m.elements() + gate.elements()), 0);
    for (int e = 0; e < s.experts; ++e)
      for (int k = 0; k < s.hidden; ++k) w[static_cast<size_t>(m.index(e, k))] = to_bf16(random.normal() * size);
    for (int k = 0; k < s.hidden; ++k) w[static_cast<size_t>(m.index(3, k))] = w[static_cast<size_t>(m.index(1, k))];  // experts 1 and 3 tie
    for (int k = 0; k < s.hidden; ++k) w[static_cast<size_t>(m.elements() + gate.index(0, k))] = to_bf16(random.normal() * size);
    std::vector<float> x = random.floats(static_cast<size_t>(s.rows * s.hidden)), bias = random.floats(static_cast<size_t>(s.experts));
    bias[3] = bias[1];
    if (s.rows > 4) x[static_cast<size_t>(4 * s.hidden)] = NAN;
    const Array<float> x_there(x), bias_there(bias);
    const Array<bf16> w_there(w);
    for (const int kind : {0, 1, 2, 3}) {
      const RouteRule rule = rule_of(s.experts, s.top_k, kind);
      const int choices = rule.choices();
      const bool biased = kind == 3;
      INFO("experts " << s.experts << ", rule " << kind);
      Lanes lanes({s.rows, s.hidden, 16, 1, rule.num_experts + rule.num_shared, choices});
      const auto pairs = static_cast<size_t>(s.rows * choices);
      std::vector<int32_t> ids(pairs);
      std::vector<float> weights(pairs);
      reference().route({{0, s.rows}, x.data(), w.data(), s.hidden, rule, biased ? bias.data() : nullptr, ids.data(), weights.data()}, lanes.host);
      const auto on_device = [&](Range rows, std::vector<int32_t>& out_ids, std::vector<float>& out_weights) {
        const Array<int32_t> ids_there(pairs);
        const Array<float> weights_there(pairs);
        test_device().ops().route({rows, x_there.get(), w_there.get(), s.hidden, rule, biased ? bias_there.get() : nullptr, ids_there.get(), weights_there.get()},
                                  lanes.device);
        out_ids = ids_there.values(), out_weights = weights_there.values();
      };
      std::vector<int32_t> all_ids, one_ids;
      std::vector<float> all_weights, one_weights;
      on_device({0, s.rows}, all_ids, all_weights);
      for (size_t i = 0; i < pairs; ++i) {
        INFO("pair " << i);
        if (std::isnan(weights[i])) {
          REQUIRE(std::isnan(all_weights[i]));
          REQUIRE(all_ids[i] == ids[i]);
          continue;
        }
        // Logits differ by some 2^−24 · √hidden of sizes near 4; ids may change places only where weights are as near as that. (With biases
        // weights do not say how near: there all ids are those of the CPU.)
        const double close = 1e-4;
        REQUIRE(std::fabs(all_weights[i] - weights[i]) <= close * (1e-3 + weights[i]));
        if (all_ids[i] != ids[i]) {
          const bool next_is_near = (i + 1) % static_cast<size_t>(choices) == 0 || std::fabs(weights[i + 1] - weights[i]) <= close * weights[i];
          const bool last_is_near = i % static_cast<size_t>(choices) != 0 && std::fabs(weights[i - 1] - weights[i]) <= close * weights[i];
          REQUIRE((!biased && (next_is_near || last_is_near)));
        }
      }
      for (int r = 0; r < s.rows; ++r) {
        std::set<int32_t> chosen(all_ids.begin() + r * choices, all_ids.begin() + (r + 1) * choices);
        REQUIRE(chosen.size() == static_cast<size_t>(choices));
        for (int i = 1; i < s.top_k; ++i)  // of the tie, 1 stands before 3
          REQUIRE_FALSE((all_ids[static_cast<size_t>(r * choices + i)] == 1 && all_ids[static_cast<size_t>(r * choices + i - 1)] == 3));
      }
      for (int r = 0; r < s.rows; r += 5) {
        on_device({r, r + 1}, one_ids, one_weights);
        for (int i = r * choices; i < (r + 1) * choices; ++i) {
          REQUIRE(one_ids[static_cast<size_t>(i)] == all_ids[static_cast<size_t>(i)]);
          REQUIRE(std::memcmp(&one_weights[static_cast<size_t>(i)], &all_weights[static_cast<size_t>(i)], sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("group_experts: the CPU's arrays, few and many choices, experts of other ranks, other homes' shared ones and rows that fill up left out, dense") {
  Random random(10);
  struct Shape {
    int experts, local, top_k, rows;
  };
  for (const Shape& s : {Shape{8, 8, 2, 1}, Shape{8, 3, 2, 0}, Shape{64, 64, 8, 100}, Shape{128, 16, 8, 40}, Shape{40, 40, 4, 1200}, Shape{128, 33, 8, 700}, Shape{1024, 1024, 4, 9}}) {
    std::vector<int32_t> local_of_expert(static_cast<size_t>(s.experts), -1);
    for (int e = 0, next = 0; e < s.experts; ++e)
      if (s.local == s.experts || (e % 3 == 1 && next < s.local)) local_of_expert[static_cast<size_t>(e)] = next++;
    const auto pairs = static_cast<size_t>(s.rows * s.top_k);
    std::vector<int32_t> ids;
    for (size_t i = 0; i < pairs; ++i) ids.push_back(i % 5 == 0 ? 1 : random.below(s.experts));
    const std::vector<float> weights = random.floats(pairs);
    std::vector<int32_t> tokens;
    for (int r = 0; r < s.rows; ++r) tokens.push_back(r % 6 == 5 ? -1 : r);  // some rows fill the step up
    const Array<int32_t> ids_there(ids), local_there(local_of_expert), tokens_there(tokens);
    const Array<float> weights_there(weights);
    Lanes lanes({std::max(1, s.rows), 16, 16, 1, s.experts, s.top_k});
    for (const bool dense : {false, true}) {
      const Range rows{s.rows / 7, s.rows};
      std::vector<int32_t> begins(static_cast<size_t>(s.local + 1), -1), pair_rows(pairs + 1, -1), reached(1, 5);
      std::vector<float> pair_weights(pairs + 1);
      const Array<int32_t> begins_there(begins), pair_rows_there(pair_rows), reached_there(reached);
      const Array<float> pair_weights_there(pair_weights);
      const int experts = dense ? 1 : s.local, routed = s.experts - 2;
      const Range shared_rows{s.rows / 3, s.rows / 2 + 1};
      reference().group_experts({rows, s.top_k, routed, shared_rows, tokens.data(), ids.data(), weights.data(), experts, dense ? nullptr : local_of_expert.data(), begins.data(), pair_rows.data(),
                                 pair_weights.data(), reached.data()},
                                lanes.host);
      test_device().ops().group_experts({rows, s.top_k, routed, shared_rows, tokens_there.get(), ids_there.get(), weights_there.get(), experts, dense ? nullptr : local_there.get(), begins_there.get(),
                                         pair_rows_there.get(), pair_weights_there.get(), reached_there.get()},
                                        lanes.device);
      CHECK(begins_there.values() == begins);
      CHECK(pair_rows_there.values() == pair_rows);
      CHECK(same_bytes(pair_weights_there.values(), pair_weights));
      CHECK(reached_there.values() == reached);
    }
  }
}

TEST_CASE("norm_route: the bits of add_norm, route and group_experts one after the other") {
  Random random(11);
  struct Shape {
    int experts, local, top_k, rows, hidden = 64;
  };
  // Rows of at most 4,096, below 32 of them, are normed by the router's own kernel. At most 128 choices of fewer than 32 rows are grouped by the router's own kernel.
  for (const Shape& s : {Shape{10, 10, 2, 0}, Shape{10, 3, 2, 1}, Shape{128, 128, 8, 1}, Shape{128, 40, 8, 16}, Shape{128, 128, 8, 17}, Shape{60, 60, 4, 31},
                         Shape{60, 20, 4, 32}, Shape{256, 256, 40, 3}, Shape{1024, 700, 8, 16}, Shape{60, 60, 4, 2, 2048}, Shape{20, 20, 4, 3, 4096}, Shape{20, 20, 4, 3, 4104}, Shape{20, 20, 4, 3, 70}}) {
    constexpr int kShared = 4;
    const int hidden = s.hidden;
    const RouteRule rule = rule_of(s.experts - kShared, s.top_k, 2);
    const int choices = rule.choices();
    const PackedMatrix m{rule.num_experts, hidden}, gate{1, hidden};
    std::vector<int32_t> local_of_expert(static_cast<size_t>(s.experts), -1), tokens;
    for (int e = 0; e < s.local; ++e) local_of_expert[static_cast<size_t>(s.experts - 1 - e)] = e;
    for (int r = 0; r < s.rows; ++r) tokens.push_back(r % 6 == 5 ? -1 : r);  // some rows fill the step up
    const NormThere norm(random, s.rows, hidden, s.top_k == 8);
    const Array<bf16> w(random.bf16s(static_cast<size_t>(m.elements() + gate.elements()), 0.5f));
    const Array<int32_t> local_there(local_of_expert), tokens_there(tokens);
    Lanes lanes({std::max(1, s.rows), hidden, 16, 1, s.experts, choices});
    const auto pairs = static_cast<size_t>(s.rows * choices);
    const auto run = [&](bool together, bool groups) {
      const Array<float> h_out(norm.h.size());
      const Array<bf16> x(norm.h.size());
      const Array<int32_t> ids(pairs), begins(static_cast<size_t>(s.local + 1)), pair_rows(pairs), reached(std::vector<int32_t>(1, 5));
      const Array<float> weights(pairs), pair_weights(pairs);
      const Range rows{0, s.rows};
      NormRouteArgs args{norm.args(rows), {rows, norm.x_float.get(), w.get(), hidden, rule, nullptr, ids.get(), weights.get()}, {}};
      args.norm.h_out = h_out.get();
      args.norm.x = x.get();
      if (groups)
        args.group = {rows, choices, rule.num_experts, {0, s.rows / 2}, tokens_there.get(), ids.get(), weights.get(), s.local, local_there.get(), begins.get(),
                      pair_rows.get(), pair_weights.get(), reached.get()};
      const Ops& ops = test_device().ops();
      if (together) {
        ops.norm_route(args, lanes.device);
      } else {
        ops.add_norm(args.norm, lanes.device);
        ops.route(args.route, lanes.device);
        if (groups) ops.group_experts(args.group, lanes.device);
      }
      const std::vector<int32_t> numbers[] = {ids.values(), begins.values(), pair_rows.values(), reached.values()};
      std::vector<int32_t> all;
      for (const auto& n : numbers) all.insert(all.end(), n.begin(), n.end());
      const std::vector<bf16> of_rows = x.values();
      all.insert(all.end(), of_rows.begin(), of_rows.end());
      std::vector<float> floats = weights.values();
      for (const auto& f : {pair_weights.values(), h_out.values()}) floats.insert(floats.end(), f.begin(), f.end());
      return std::pair(all, floats);
    };
    INFO("experts " << s.experts << ", top_k " << s.top_k << ", rows " << s.rows << ", hidden " << hidden);
    for (const bool groups : {true, false}) {
      const auto apart = run(false, groups);
      for (int again = 0; again < 2; ++again) {  // counters are 0 again behind it
        const auto together = run(true, groups);
        CHECK(together.first == apart.first);
        CHECK(same_bytes(together.second, apart.second));
      }
    }
  }
}

}  // namespace moebius
