// Dummy weights: a benchmark's model must not favour some experts.
#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

const Ops* inner = nullptr;
std::vector<std::vector<int64_t>> hits;  // [layers][experts]

void counting_route(const RouteArgs& args, const Lane& lane) {
  inner->route(args, lane);
  std::vector<int64_t>& of = hits.emplace_back(static_cast<size_t>(args.rule.num_experts));
  for (int64_t i = args.rows.begin * args.rule.choices(); i < args.rows.end * args.rule.choices(); ++i) ++of[static_cast<size_t>(args.ids[i])];
}

}  // namespace

TEST_CASE("with dummy weights random tokens spread over a layer's experts") {
  const bool one_prompt = GENERATE(true, false);
  const double factor = one_prompt ? 5 : 3;  // rows of one prompt have in common what attention adds
  for (uint64_t seed : {0, 1, 2}) {
    EngineConfig config = small_config(1, 1, Layout::kTp);
    config.dummy_weights = true;
    config.seed = seed;
    config.chunk_tokens = config.max_batch = 512;
    config.kv_tokens = 512 * 16;
    Engine engine(kQwen, config);
    inner = &engine.impl().ops();
    Ops counting = *inner;
    counting.route = counting_route;
    engine.impl().use_ops(counting);
    hits.clear();
    const std::vector<int32_t> tokens = prompt_of(7 + static_cast<uint32_t>(seed), 512);
    if (one_prompt) engine.submit(greedy_request("", tokens, 1));
    else
      for (int32_t token : tokens) engine.submit(greedy_request("", {token}, 1));
    engine.step();
    REQUIRE(hits.size() == 4);
    for (size_t layer = 0; layer < hits.size(); ++layer)
      for (size_t expert = 0; expert < hits[layer].size(); ++expert) {
        const double mean = 512.0 * 4 / static_cast<double>(hits[layer].size());
        INFO("one prompt " << one_prompt << " seed " << seed << " layer " << layer << " expert " << expert);
        CHECK(static_cast<double>(hits[layer][expert]) > mean / factor);
        CHECK(static_cast<double>(hits[layer][expert]) < mean * factor);
      }
  }
}

}  // namespace moebius::test
