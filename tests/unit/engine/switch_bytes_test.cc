// The bytes that a finished switch reports, against a count of its own.
#include <bit>

#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

struct Bytes {
  int64_t all = 0, changed = 0;
};

// Each slice once to each rank that owns it only in the new layout.
Bytes count_weights(const ModelStore& store, Layout to) {
  Bytes sum;
  const SliceTable& table = store.slices();
  for (int l = 0; l < table.num_layers(); ++l)
    for (size_t i = 0; i < table.layer(l).size(); ++i) {
      const RankSet gains =
          store.arena().owners(to).slices[static_cast<size_t>(l)][i] & ~store.arena().owners(other(to)).slices[static_cast<size_t>(l)][i];
      sum.all += std::popcount(gains) * table.layer(l)[i].bytes;
    }
  sum.changed = sum.all;
  return sum;
}

// Each head of each block once to each rank that holds it in the new layout; it changes owner where the rank did not have it.
Bytes count_kv(Engine& engine, Layout to) {
  const ModelShape& model = engine.impl().store().slices().model();
  const KvManager& kv = engine.impl().kv();
  const std::vector<RankSet>& tp_holders = engine.impl().store().arena().owners(Layout::kTp).kv_heads;
  const int64_t slice = 2 * kv.page_tokens() * int64_t{model.head_dim} * 2;  // K and V, two bytes each
  Bytes sum;
  for (const Sequence* s : engine.impl().scheduler().running())
    for (int32_t b : s->blocks)
      for (int h = 0; h < model.num_kv_heads; ++h) {
        const RankSet home = RankSet{1} << kv.block(b).home, holders = tp_holders[static_cast<size_t>(h)];
        sum.all += (to == Layout::kTp ? std::popcount(holders) : 1) * slice;
        sum.changed += (to == Layout::kTp ? std::popcount(holders & ~home) : (holders & home) == 0) * slice;
      }
  sum.all *= model.num_layers();
  sum.changed *= model.num_layers();
  return sum;
}

}  // namespace

TEST_CASE("a finished switch reports exactly the bytes of its weights and KV, and those that changed owner") {
  // 3 ranks have unequal shares; with more ranks than KV heads (2 of qwen, 4 of mixtral) heads are replicated in TP.
  for (auto [model, ranks] : {std::pair{kQwen, 2}, {kQwen, 3}, {kQwen, 8}, {kDense, 3}, {kMixtral, 2}, {kMixtral, 3}, {kMixtral, 8}})
    for (Layout to : {Layout::kTp, Layout::kEp})
      for (double budget : {0.0, 1e-6}) {
        EngineConfig config = small_config(ranks, 1, other(to));
        config.prefix_cache = false;
        Engine engine(model, config);
        Switcher& switcher = engine.impl().switcher();
        switcher.set_piece_bytes(16 * kSmallPieces);
        for (int i = 0; i < 7; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 5 + 9 * i), 60));
        for (int i = 0; i < 4; ++i) engine.step();
        const Bytes weights = count_weights(engine.impl().store(), to);
        const SwitchEstimate estimate = engine.estimate_switch(to);
        REQUIRE(switcher.begin(to == Layout::kTp ? switcher.num_layers() : 0, false));
        const Bytes kv = count_kv(engine, to);  // while both layouts are known
        while (switcher.moving()) switcher.advance(budget);
        engine.step();  // shows its events

        std::vector<Event> events(256);
        events.resize(engine.poll(events, 0));
        const auto finished =
            std::find_if(events.begin(), events.end(), [](const Event& e) { return e.type == EventType::kSwitchFinished; });
        INFO(model << " on " << ranks << " to " << name_of(to) << " budget " << budget);
        REQUIRE(finished != events.end());
        CHECK(finished->bytes == weights.all + kv.all);
        CHECK(finished->bytes_changed == weights.changed + kv.changed);
        CHECK(switcher.weights_part().bytes == weights.all);
        CHECK(switcher.kv_part().bytes == kv.all);
        CHECK(switcher.kv_part().bytes_changed == kv.changed);
        CHECK(estimate.bytes == finished->bytes);
      }
}

}  // namespace moebius::test
