// A switch's copies by tables of the device's own, against the list of copies that the transfer plan is.
#include <numeric>

#include "lib/cpu/cpu_device.h"
#include "lib/runtime/migration.h"
#include "lib/runtime/resident_copies.h"
#include "tests/cuda/harness.h"
#include "tests/unit/layout/cases.h"

namespace moebius {
namespace {

using layout_test::Case;

// Distinct pages of both layouts.
std::vector<PagePair> some_pairs(const Case& c, layout_test::Random& random) {
  std::vector<int32_t> tp(static_cast<size_t>(c.tp_pages));
  std::iota(tp.begin(), tp.end(), 0);
  std::shuffle(tp.begin(), tp.end(), random.engine);
  std::vector<PagePair> pairs;
  for (int r = 0; r < c.ranks; ++r)
    for (int32_t p = 0; p < c.ep_pages[static_cast<size_t>(r)]; ++p) pairs.push_back({-1, r, p});
  std::shuffle(pairs.begin(), pairs.end(), random.engine);
  pairs.resize(std::min(pairs.size(), tp.size()));
  for (size_t i = 0; i < pairs.size(); ++i) pairs[i].tp_page = tp[i];
  return pairs;
}

void check_case(const Case& c, layout_test::Random& random) {
  const ArenaPlan arena = layout_test::arena_of(c);
  const TransferPlan to_tp = plan_transfer(arena, Layout::kEp), to_ep = plan_transfer(arena, Layout::kTp);
  const std::unique_ptr<Device> device = open_module_device(MOEBIUS_TEST_DEVICE, {.ranks = c.ranks});
  const auto settle = [&] {
    for (int r = 0; r < c.ranks; ++r)
      while (!device->idle(r)) {
      }
  };
  std::vector<std::vector<uint8_t>> here;
  std::vector<DeviceBuffer> there;
  std::vector<std::byte*> arenas;
  for (int r = 0; r < c.ranks; ++r) {
    here.emplace_back(static_cast<size_t>(arena.arena_bytes(r)));
    for (uint8_t& b : here.back()) b = static_cast<uint8_t>(random.engine());
    there.emplace_back(*device, r, arena.arena_bytes(r));
    arenas.push_back(there.back().data());
    device->write(r, arenas.back(), here.back().data(), arena.arena_bytes(r));
  }
  ResidentCopies copies(*device, arena, to_tp, to_ep, arenas, 30 * c.ranks);
  settle();
  for (int round = 0; round < 4; ++round) {
    const Layout to = random.once_in(2) ? Layout::kTp : Layout::kEp;
    const int item = random.below(arena.num_layers());
    const std::vector<PagePair> pairs = some_pairs(c, random);
    for (int r = 0; r < c.ranks; ++r) {
      const auto copy = [&](const BlockCopy& b) {
        std::memcpy(here[static_cast<size_t>(r)].data() + b.dst_offset, here[static_cast<size_t>(b.src_rank)].data() + b.src_offset, static_cast<size_t>(b.bytes));
      };
      int64_t weights = 0, bytes = 0, changed = 0;
      for (const BlockCopy& b : (to == Layout::kTp ? to_tp : to_ep).items[static_cast<size_t>(item)].to[static_cast<size_t>(r)]) copy(b), weights += b.bytes;
      for (const PagePair& pair : pairs)
        for_each_kv_block(arena, to, item, r, pair, [&](const BlockCopy& b, bool local) {
          copy(b);
          bytes += b.bytes;
          if (!local) changed += b.bytes;
        });
      const int64_t middle = weights / 128 * 64;
      copies.copy_weights(r, to, item, 0, middle);
      copies.copy_weights(r, to, item, middle, weights);
      copies.send_pages(r, to, pairs);
      copies.copy_pages(r, to, item);
      CHECK(copies.page_bytes(r, to) == std::pair(bytes, changed));
    }
    settle();
    for (int r = 0; r < c.ranks; ++r) {
      std::vector<uint8_t> got(here[static_cast<size_t>(r)].size());
      const auto bytes = static_cast<int64_t>(got.size());
      device->read(r, got.data(), bytes, arenas[static_cast<size_t>(r)], bytes, bytes, 1);
      while (!device->idle(r)) {
      }
      REQUIRE(got == here[static_cast<size_t>(r)]);
    }
  }
}

}  // namespace

TEST_CASE("tables of weights and pages copy what the plan lists, on any layout, and nothing else") {
  test_device();
  layout_test::repeat(25, [](layout_test::Random& random) { check_case(layout_test::random_case(random), random); });
  layout_test::Random random{std::mt19937_64(3)};
  check_case(layout_test::replicated_case(), random);
}


TEST_CASE("a host's own layers move in the device's memory as they do in its own") {
  MigrationSpec spec;
  spec.model.num_heads = 8, spec.model.num_kv_heads = 2;
  spec.model.mlps = {{6, 4}, {0, 4}, {6, 4}};
  spec.counts = {4, 4};
  spec.bytes = {192, 128, 320, 448};
  spec.kv_slice_bytes = 256;
  spec.tp_pages = 6, spec.ep_pages = 4;
  spec.ranks = 3;
  const std::vector<PagePair> pairs = {{0, 1, 0}, {5, 0, 3}, {2, 2, 1}};
  Migration here(spec, std::make_unique<CpuDevice>(spec.ranks, reference()));
  Migration there(spec, open_module_device(MOEBIUS_TEST_DEVICE, {.ranks = spec.ranks}));
  const std::unique_ptr<Device> memory = open_module_device(MOEBIUS_TEST_DEVICE, {.ranks = spec.ranks});
  std::vector<std::vector<uint64_t>> words;
  std::vector<std::byte*> own, device;
  std::vector<DeviceBuffer> buffers;
  std::mt19937_64 random(11);
  const auto settle = [&] {
    for (int r = 0; r < spec.ranks; ++r)
      while (!memory->idle(r)) {
      }
  };
  for (int r = 0; r < spec.ranks; ++r) {
    const int64_t bytes = here.arena().arena_bytes(r);
    words.emplace_back(static_cast<size_t>(bytes / 8 + 8));
    for (uint64_t& w : words.back()) w = random();
    own.push_back(reinterpret_cast<std::byte*>(round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(words.back().data())), 64)));
    buffers.emplace_back(*memory, r, bytes);
    device.push_back(buffers.back().data());
    memory->write(r, device.back(), own.back(), bytes);
  }
  settle();
  for (const Layout to : {Layout::kEp, Layout::kTp})
    for (int l = 0; l < 3; ++l) {
      for (int r = 0; r < spec.ranks; ++r) {
        here.copy_next(to, r, own, pairs);
        memory->set_current(0);
        there.copy_next(to, r, device, pairs);
        CHECK(memory->current() == 0);
      }
      here.advance(to);
      there.advance(to);
      for (int r = 0; r < spec.ranks; ++r) {
        std::vector<std::byte> back(static_cast<size_t>(here.arena().arena_bytes(r)));
        const auto bytes = static_cast<int64_t>(back.size());
        memory->read(r, back.data(), bytes, device[static_cast<size_t>(r)], bytes, bytes, 1);
        settle();
        CHECK(std::memcmp(back.data(), own[static_cast<size_t>(r)], back.size()) == 0);
      }
    }
}

}  // namespace moebius
