// The device of a module: memory, copies, the order of ranks, and the blocks of a switch.
#include <numeric>
#include <thread>

#include "lib/base/error.h"
#include "tests/cuda/harness.h"

namespace moebius {

TEST_CASE("memory is zeroed, written and read back, rows apart too") {
  Device& device = test_device();
  for (int rank : {0, 3}) {
    const DeviceBuffer buffer(device, rank, 4096);
    std::vector<uint8_t> out(4096, 1);
    device.read(rank, out.data(), 4096, buffer.data(), 4096, 4096, 1);
    finish(rank);
    CHECK(std::all_of(out.begin(), out.end(), [](uint8_t b) { return b == 0; }));
    std::vector<uint8_t> in(4096);
    std::iota(in.begin(), in.end(), 0);
    device.write(rank, buffer.data(), in.data(), 4096);
    std::fill(in.begin(), in.end(), 9);  // may be used again
    std::vector<uint8_t> rows(3 * 10, 7);
    device.read(rank, rows.data(), 10, buffer.data() + 64, 100, 6, 3);
    finish(rank);
    for (int r = 0; r < 3; ++r)
      for (int i = 0; i < 10; ++i) CHECK(rows[static_cast<size_t>(r * 10 + i)] == (i < 6 ? static_cast<uint8_t>(64 + r * 100 + i) : 7));
  }
}

TEST_CASE("what a device does not have is refused with the numbers, and it goes on") {
  Device& device = test_device();
  CHECK(device.free_bytes(0) > 0);
  CHECK(device.free_bytes(0) < device.total_bytes(0));
  try {
    device.allocate(0, device.total_bytes(0) * 2);
    FAIL("it was given");
  } catch (const Error& e) {
    CHECK(e.code() == Code::kOutOfMemory);
    CHECK_THAT(e.what(), Catch::Matchers::Contains(std::to_string(device.total_bytes(0) * 2)));
  }
  const DeviceBuffer buffer(device, 0, 64);
  finish(0);
  CHECK(device.idle(0));
}

TEST_CASE("a rank that is still at work is asked again and again, which is no error") {
  Device& device = test_device();
  constexpr int64_t kBytes = kEmulated ? 1 << 20 : 256 << 20;  // a GPU copies for a quarter of a millisecond
  const DeviceBuffer from(device, 0, kBytes), to(device, 0, kBytes);
  int refused = 0;
  for (int round = 0; round < 8; ++round) {
    device.copy_block(0, to.data(), 0, from.data(), kBytes);
    device.finish_blocks(0);
    while (!device.idle(0)) ++refused;
  }
  CHECK(refused > 0);
  CHECK(device.idle(0));
}

TEST_CASE("a device that there is not is refused with both numbers") {
  try {
    const int32_t devices[] = {0, 99};
    open_module_device(MOEBIUS_TEST_DEVICE, {.ranks = 2, .devices = devices});
    FAIL("it was opened");
  } catch (const Error& e) {
    CHECK(e.code() == Code::kInvalidArgument);
    CHECK_THAT(e.what(), Catch::Matchers::Contains("device 99 of rank 1"));
  }
}

TEST_CASE("after a mark and a pass a rank sees what the others had queued") {
  Device& device = test_device();
  constexpr int kRanks = 4, kRounds = 20;
  constexpr int64_t kBytes = kEmulated ? 1 << 20 : 64 << 20;  // so much that a GPU still copies when the next rank would read
  const auto value = [](int from, int rank) { return static_cast<uint8_t>(1 + from * kRanks + rank); };
  std::vector<DeviceBuffer> buffers, sources[2];
  for (int r = 0; r < kRanks; ++r) {
    buffers.emplace_back(device, r, kBytes);
    for (int from : {0, 1}) {
      const std::vector<uint8_t> in(static_cast<size_t>(kBytes), value(from, r));
      sources[from].emplace_back(device, r, kBytes);
      device.write(r, sources[from].back().data(), in.data(), kBytes);
      finish(r);
    }
  }
  for (int round = 0; round < kRounds; ++round) {
    for (int r = 0; r < kRanks; ++r) {
      const auto i = static_cast<size_t>(r);
      device.copy_block(r, buffers[i].data(), r, sources[round % 2][i].data(), kBytes);
      device.finish_blocks(r);
    }
    for (int r = 0; r < kRanks; ++r) device.mark(r);
    for (int r = 0; r < kRanks; ++r) device.pass(r);
    std::vector<uint8_t> out(kRanks);
    for (int r = 0; r < kRanks; ++r)
      device.read(r, &out[static_cast<size_t>(r)], 1, buffers[static_cast<size_t>((r + 1) % kRanks)].data() + kBytes - 1, 1, 1, 1);
    for (int r = 0; r < kRanks; ++r) device.mark(r);  // nobody writes again before all have read
    for (int r = 0; r < kRanks; ++r) device.pass(r);
    for (int r = 0; r < kRanks; ++r) {
      finish(r);
      CHECK(out[static_cast<size_t>(r)] == value(round % 2, (r + 1) % kRanks));
    }
  }
}

TEST_CASE("blocks arrive whole, wherever from, and nothing beside them is written") {
  Random random(11);
  Device& device = test_device();
  constexpr int64_t kBytes = 4 << 20;
  std::vector<DeviceBuffer> from;
  std::vector<std::vector<uint8_t>> contents;
  for (int r = 0; r < 4; ++r) {
    from.emplace_back(device, r, kBytes);
    contents.emplace_back(static_cast<size_t>(kBytes));
    for (uint8_t& b : contents.back()) b = static_cast<uint8_t>(random.engine());
    device.write(r, from.back().data(), contents.back().data(), kBytes);
  }
  for (int r = 0; r < 4; ++r) finish(r);
  struct Case {
    int blocks, most_units;  // of 64 bytes
  };
  for (const Case& c : {Case{0, 1}, Case{1, 1}, Case{1, 20000}, Case{10000, 2}, Case{300, 200}, Case{40, 1500}, Case{5, 10000}}) {
    const DeviceBuffer to(device, 1, kBytes);
    std::vector<uint8_t> expected(static_cast<size_t>(kBytes), 0), got(expected);
    int64_t at = 0;
    for (int i = 0; i < c.blocks; ++i) {
      const int64_t bytes = 64 * (1 + random.below(c.most_units)), gap = 64 * random.below(3);
      if (at + gap + bytes > kBytes) break;
      at += gap;
      const int r = random.below(4);
      const int64_t source = 64 * random.below(static_cast<int>((kBytes - bytes) / 64 + 1));
      device.copy_block(1, to.data() + at, r, from[static_cast<size_t>(r)].data() + source, bytes);
      std::memcpy(expected.data() + at, contents[static_cast<size_t>(r)].data() + source, static_cast<size_t>(bytes));
      at += bytes;
    }
    device.finish_blocks(1);
    device.read(1, got.data(), kBytes, to.data(), kBytes, kBytes, 1);
    finish(1);
    REQUIRE(got == expected);
  }
}

}  // namespace moebius
