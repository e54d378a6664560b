// Incremental switches: copying ahead in pieces, a little in every step, never starved and never all at once.
#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

constexpr double kTinyBudget = 1e-6;  // ms: spent by the first piece

// Pieces that the weights of an item take on the rank that copies most, the largest over items.
int64_t weight_pieces(Engine& engine, Layout to, int64_t piece_bytes) {
  const ModelStore& store = engine.impl().store();
  int64_t most = 0;
  for (const ItemTransfer& item : (to == Layout::kTp ? store.to_tp() : store.to_ep()).items)
    for (const std::vector<BlockCopy>& copies : item.to) {
      int64_t bytes = 0;
      for (const BlockCopy& c : copies) bytes += c.bytes;
      most = std::max(most, div_up(bytes, piece_bytes));
    }
  return most;
}

constexpr int64_t kPiece = 8 * kSmallPieces;
constexpr int kDecoding = 6;

EngineConfig two_ranks(int threads, Layout start, int64_t kv_tokens) {
  EngineConfig config = small_config(2, threads, start);
  config.chunk_tokens = 4096;
  config.kv_tokens = kv_tokens;
  config.stall_budget_ms = kTinyBudget;
  return config;
}

// Six requests of some 400 tokens each, which decode.
void begin_decoding(Engine& engine) {
  engine.impl().switcher().set_piece_bytes(kPiece);
  for (int i = 0; i < kDecoding; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 390 + 3 * i), 500));
  for (int i = 0; i < 3; ++i) engine.step();
  REQUIRE(engine.stats().running == kDecoding);
}

}  // namespace

TEST_CASE("64 decoding requests do not starve a switch of the smallest budget") {
  // In nearly every step some request fills a block, more than a piece takes.
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int64_t piece_bytes : {8 * kSmallPieces, int64_t{1} << 20}) {
      if (kSweep > 1 && (start == Layout::kTp) != (piece_bytes == 8 * kSmallPieces)) continue;  // each of the four once, but crosswise
      EngineConfig config = small_config(2, 1, start);
      config.kv_tokens = 64 * 512;
      config.chunk_tokens = 4096;
      config.stall_budget_ms = kTinyBudget;
      Engine engine(kQwen, config);
      engine.impl().switcher().set_piece_bytes(piece_bytes);
      for (int i = 0; i < 64; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 17 + i), 400));
      for (int i = 0; i < 4; ++i) engine.step();
      REQUIRE(engine.stats().running == 64);
      const Layout to = other(start);
      const int64_t layers = engine.model().num_layers;
      // Blocks of an item: all that the requests will ever have.
      const int64_t blocks_a_piece = std::max<int64_t>(1, piece_bytes * 2 / engine.impl().store().arena().kv_page_bytes(0, Layout::kEp));
      const int64_t blocks = 64 * (400 + 81) / config.page_tokens;
      const int64_t bound = layers * (weight_pieces(engine, to, piece_bytes) + div_up(blocks, blocks_a_piece) + 2);
      engine.request_switch(to);
      int64_t steps = 0;
      do engine.step();
      while (++steps < bound && engine.stats().switching && engine.stats().running == 64);
      INFO("from " << name_of(start) << " pieces of " << piece_bytes << ": " << steps << " steps, bound " << bound);
      CHECK(engine.stats().running == 64);
      CHECK_FALSE(engine.stats().switching);
      CHECK(engine.stats().seam == (to == Layout::kTp ? layers : 0));
    }
}

TEST_CASE("with a tiny budget a switch spreads over steps, and every step copies something") {
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int ranks : {2, 4})
      for (int threads = 1; threads <= threads_here(2); ++threads) {
        EngineConfig config = small_config(ranks, threads, start);
        config.stall_budget_ms = kTinyBudget;
        Engine engine(kQwen, config);
        engine.impl().switcher().set_piece_bytes(kPiece);
        std::atomic<int> regions{0};
        engine.impl().switcher().hook = [&](const CopyPoint& p) { regions += p.starts_rank() && p.rank == 0; };
        for (int i = 0; i < 6; ++i) engine.submit(greedy_request("r" + std::to_string(i), prompt_of(i, 20 + 9 * i), 900));
        for (int i = 0; i < 3; ++i) engine.step();
        const Layout to = other(start);
        const int64_t pieces = weight_pieces(engine, to, kPiece);
        REQUIRE(pieces > 4);
        INFO("from " << name_of(start) << " ranks " << ranks << " threads " << threads << " pieces " << pieces);
        engine.request_switch(to);
        int steps = 0;
        do {
          regions = 0;
          engine.step();
          ++steps;
          CHECK(regions == 1);  // one piece, or one fence
        } while (engine.stats().switching && steps < 2000);
        CHECK(engine.stats().switches == 1);
        std::vector<Event> events(4096);
        std::vector<uint64_t> seams;
        for (size_t n = engine.poll(events, 0), i = 0; i < n; ++i)
          if (events[i].type == EventType::kSeam) seams.push_back(events[i].step);
        REQUIRE(seams.size() == 4);
        for (size_t i = 1; i < seams.size(); ++i) CHECK(static_cast<int64_t>(seams[i] - seams[i - 1]) > pieces);
      }
}

TEST_CASE("blocks that fill while others are copied ahead are copied ahead too, down to a piece") {
  for (Layout start : {Layout::kTp, Layout::kEp}) {
    const EngineConfig config = two_ranks(1, start, 32768);
    Engine engine(kQwen, config);
    const Switcher& switcher = engine.impl().switcher();
    begin_decoding(engine);
    const int64_t block_bytes = engine.impl().store().arena().kv_page_bytes(0, Layout::kEp);
    const int64_t blocks_a_piece = config.ranks * kPiece / block_bytes;
    // A prompt a step, which ends at once: a third of what a piece takes.
    const int64_t blocks_a_step = blocks_a_piece / 3;
    REQUIRE(blocks_a_step >= 1);
    engine.request_switch(other(start));
    int64_t kv = 0;
    int seam = engine.stats().seam, fences = 0;
    for (int step = 0; step < 2000 && (step == 0 || engine.stats().switching); ++step) {
      engine.submit(greedy_request("p" + std::to_string(step), prompt_of(100 + step, static_cast<int>(blocks_a_step * config.page_tokens) + 1), 1));
      engine.step();
      const int64_t new_kv = switcher.kv_part().bytes - std::exchange(kv, switcher.kv_part().bytes);
      if (engine.stats().seam == seam) continue;
      seam = engine.stats().seam;
      ++fences;
      INFO("from " << name_of(start) << " fence " << fences << ": " << new_kv / block_bytes << " blocks, a piece has " << blocks_a_piece);
      // What was no more than a piece when the last list was made, what filled since, and the last block of each request.
      CHECK(new_kv <= (blocks_a_piece + 2 * blocks_a_step + 2 * (kDecoding + 1)) * block_bytes);
    }
    CHECK(fences == 4);
    CHECK_FALSE(engine.stats().switching);
  }
}

TEST_CASE("a step of the smallest budget copies no more bytes than a piece a rank, or what is left to a fence") {
  for (auto [model, threads] : {std::pair{kQwen, 1}, {kMixtral, 2}}) {
    for (Layout start : {Layout::kTp, Layout::kEp}) {
      const EngineConfig config = two_ranks(threads, start, 16384);
      Engine engine(model, config);
      const Switcher& switcher = engine.impl().switcher();
      begin_decoding(engine);
      // A block of a layer: no head is on both ranks, so a block is written once, whichever way.
      const int64_t block_bytes = engine.impl().store().arena().kv_page_bytes(0, Layout::kEp);
      const int64_t full_blocks = engine.impl().kv().blocks_in_use();
      // The fence has the block that each request writes, and those filled since the full ones were counted: one for each
      // request and page_tokens steps.
      const int64_t backlog_steps = div_up(full_blocks * 2 * block_bytes, kPiece * config.ranks) + 1;
      const int64_t at_fence = kDecoding * (2 + backlog_steps / config.page_tokens) * block_bytes;
      REQUIRE(at_fence * 3 < full_blocks * block_bytes);
      engine.request_switch(other(start));
      INFO(model << " from " << name_of(start) << " threads " << threads << ", a block has " << block_bytes << " bytes");
      int64_t weights = 0, kv = 0;
      int pieces_of_weights = 0, pieces_of_kv = 0, fences = 0, seam = engine.stats().seam;
      do {
        engine.step();
        const int64_t new_weights = switcher.weights_part().bytes - weights, new_kv = switcher.kv_part().bytes - kv;
        weights += new_weights;
        kv += new_kv;
        if (switcher.seam() == seam) {
          CHECK(new_weights + new_kv <= config.ranks * kPiece);
          CHECK(new_weights + new_kv > 0);
          ++(new_kv > 0 ? pieces_of_kv : pieces_of_weights);
        } else {
          CHECK(std::abs(switcher.seam() - seam) == 1);
          CHECK(new_weights == 0);
          CHECK(new_kv > 0);
          CHECK(new_kv <= at_fence);
          seam = switcher.seam();
          ++fences;
        }
      } while (engine.stats().switching);
      CHECK(engine.stats().running == kDecoding);
      CHECK(fences == 4);
      CHECK(pieces_of_weights > 2 * fences);
      CHECK(pieces_of_kv > 2 * fences);
    }
  }
}

}  // namespace moebius::test
