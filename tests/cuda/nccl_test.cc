// Ranks that exchange by NCCL, each on a device of its own: what they add and send, and the whole engine over it.
#include <thread>

#include "lib/base/error.h"
#include "tests/cuda/engine_harness.h"
#include "tests/cuda/harness.h"
#include "tests/unit/engine/model_copy.h"

namespace moebius::test {
namespace {

std::unique_ptr<Device> open_ranks(int ranks) { return open_module_device(MOEBIUS_TEST_DEVICE, {.ranks = ranks, .collectives = 1}); }

// As many as there are devices, up to 4; 0 where NCCL cannot be had on a GPU.
int possible_ranks() {
  for (int ranks = 4; ranks > 0; --ranks) try {
      open_ranks(ranks);
      return ranks;
    } catch (const Error& e) {
      if (std::string_view(e.what()).find("NCCL needs a device for each") != std::string_view::npos) continue;
      const std::string_view why = e.what();
      if (why.find("NCCL cannot be loaded") == std::string_view::npos && why.find("has no NCCL") == std::string_view::npos) throw;
      WARN(why);
      return 0;
    }
  return 0;
}

// Runs f(rank) on a thread for each rank.
template <class F>
void on_ranks(int ranks, F&& f) {
  std::vector<std::thread> threads;
  std::vector<std::string> errors(static_cast<size_t>(ranks));
  for (int r = 0; r < ranks; ++r) threads.emplace_back([&, r] {
    try {
      f(r);
    } catch (const std::exception& e) {
      errors[static_cast<size_t>(r)] = e.what();
    }
  });
  for (std::thread& t : threads) t.join();
  for (const std::string& e : errors) CHECK(e == "");
}

void exchange(Device& device, int rank) {
  device.collectives()->exchange(rank);
  while (!device.collectives()->exchanged(rank)) std::this_thread::yield();
}

void connect(Device& device, int ranks) {
  device.collectives()->prepare();
  on_ranks(ranks, [&](int r) {
    device.collectives()->connect(r);
    while (!device.collectives()->exchanged(r)) std::this_thread::yield();
  });
}

template <class T>
std::vector<T> read(Device& device, int rank, const DeviceBuffer& buffer, size_t n) {
  std::vector<T> out(n);
  const auto bytes = static_cast<int64_t>(n * sizeof(T));
  device.read(rank, out.data(), bytes, buffer.data(), bytes, bytes, 1);
  while (!device.idle(rank)) std::this_thread::yield();
  return out;
}

EngineConfig nccl_config(int ranks, Layout layout, bool processes) {
  EngineConfig c = device_config(ranks, layout);
  c.communicator = "nccl";
  c.rank_processes = processes;
  return c;
}

}  // namespace

TEST_CASE("NCCL: sums wrap, flags take the largest, rows go where they are sent; again after a rank gave up") {
  const int ranks = possible_ranks();
  if (ranks == 0) return;
  const std::unique_ptr<Device> device = open_ranks(ranks);
  CHECK(device->collectives()->connection() == 0);
  Random random(5);
  for (int round = 0; round < 2; ++round) {
    connect(*device, ranks);
    CHECK(device->collectives()->connection() == round + 1);
    const size_t n = round == 0 ? 1 : 3001;
    std::vector<std::vector<int64_t>> sums(static_cast<size_t>(ranks));
    std::vector<std::vector<uint8_t>> flags(sums.size());
    std::vector<int64_t> expected(n, 0);
    std::vector<uint8_t> any(n, 0);
    for (size_t r = 0; r < sums.size(); ++r)
      for (size_t i = 0; i < n; ++i) {
        sums[r].push_back(static_cast<int64_t>(random.engine()) << 32 ^ static_cast<int64_t>(random.engine()));
        flags[r].push_back(random.below(4) == 0);
        expected[i] = static_cast<int64_t>(static_cast<uint64_t>(expected[i]) + static_cast<uint64_t>(sums[r].back()));
        any[i] |= flags[r].back();
      }
    const auto bytes = static_cast<int64_t>(n * sizeof(int64_t));
    on_ranks(ranks, [&](int r) {
      const DeviceBuffer sum(*device, r, bytes), flag(*device, r, static_cast<int64_t>(n)), rooted(*device, r, bytes), rows(*device, r, ranks * bytes);
      const auto& own = sums[static_cast<size_t>(r)];
      device->write(r, sum.data(), own.data(), bytes);
      device->write(r, rooted.data(), own.data(), bytes);
      device->write(r, flag.data(), flags[static_cast<size_t>(r)].data(), static_cast<int64_t>(n));
      device->write(r, rows.data() + r * bytes, own.data(), bytes);
      Collectives& c = *device->collectives();
      c.all_reduce(r, sum.data(), static_cast<int64_t>(n), Element::kInt64);
      c.all_reduce(r, flag.data(), static_cast<int64_t>(n), Element::kUint8);
      c.reduce(r, rooted.data(), static_cast<int64_t>(n), Element::kInt64, ranks - 1);
      for (int other = 0; other < ranks; ++other)
        if (other != r) {
          c.send(r, rows.data() + r * bytes, bytes, other);
          c.receive(r, rows.data() + other * bytes, bytes, other);
        }
      exchange(*device, r);
      if (read<int64_t>(*device, r, sum, n) != expected) throw std::runtime_error("a sum");
      if (read<uint8_t>(*device, r, flag, n) != any) throw std::runtime_error("a flag");
      if (read<int64_t>(*device, r, rooted, n) != (r == ranks - 1 ? expected : own)) throw std::runtime_error("a sum of the root");
      std::vector<int64_t> all;
      for (const auto& s : sums) all.insert(all.end(), s.begin(), s.end());
      if (read<int64_t>(*device, r, rows, all.size()) != all) throw std::runtime_error("rows");
    });
    device->collectives()->give_up(0);
    CHECK(device->collectives()->connection() == 0);
  }
}

TEST_CASE("NCCL: ranks that share a device are refused") {
  try {
    const int32_t devices[] = {0, 0};
    open_module_device(MOEBIUS_TEST_DEVICE, {.ranks = 2, .devices = devices, .collectives = 1});
    FAIL("they were accepted");
  } catch (const Error& e) {
    CHECK(e.code() == Code::kUnsupported);
    CHECK_THAT(e.what(), Catch::Matchers::Contains("2 ranks on 1 devices"));
  }
}

TEST_CASE("NCCL: either layout, every seam, captured or not, give the bits of ranks that read each other's memory", "[engine]") {
  const int most = possible_ranks();
  int64_t turn = 0;
  for (const std::string& model : {kQwen, kDense}) {
    Script script = script_of_three(most > 0 ? 1.1 : 0);
    const Outcome expected = run_script(model, device_config(1, Layout::kTp), script);
    for (int ranks = 1; ranks <= most; ++ranks)
      for (Layout layout : {Layout::kTp, Layout::kEp})
        for (bool capture : {true, false})
          for (bool processes : {false, true}) {
            if (ranks == 3 || (ranks != most && (model == kDense || !capture)) || turn++ % kSweep != 0) continue;
            INFO(model << " ranks " << ranks << " " << name_of(layout) << " capture " << capture << " processes " << processes);
            EngineConfig config = nccl_config(ranks, layout, processes);
            config.capture_steps = capture;
            CHECK(difference(expected, run_script(model, config, script)) == "");
          }
    for (int seam = 1; seam < layers_of(model); ++seam) {
      if (turn++ % kSweep != 0) continue;
      script.switches = {{0, seam}};
      INFO(model << " seam " << seam);
      if (most > 1) CHECK(difference(expected, run_script(model, nccl_config(most, seam % 2 == 0 ? Layout::kTp : Layout::kEp, seam > 2), script)) == "");
    }
  }
}

TEST_CASE("NCCL: switches at once and a little in every step, there and back, change no bit", "[engine]") {
  const int ranks = possible_ranks();
  if (ranks < 2) return;
  Script script = script_of_three(0);
  const Outcome expected = run_script(kQwen, device_config(1, Layout::kTp), script);
  script.switches = {{1, -1}, {3, 0}, {4, 2}};
  for (bool processes : {false, true})
    for (double budget : {0.0, 1e-6}) {
      EngineConfig config = nccl_config(ranks, Layout::kEp, processes);
      config.stall_budget_ms = budget;
      Engine engine(kQwen, config);
      engine.impl().switcher().set_piece_bytes(4096);
      const Outcome got = Runner(engine).run(script);
      CHECK(got.count(EventType::kSwitchStarted) > 0);
      CHECK(difference(expected, got) == "");
    }
}

TEST_CASE("NCCL: an update that fails takes the connection down, and the next one brings it back, with captured steps", "[engine]") {
  if (possible_ranks() < 2) return;
  ModelCopy changed(kQwen);
  changed.change_all();
  EngineConfig config = nccl_config(2, Layout::kTp, GENERATE(false, true));
  int64_t most = INT64_MAX;
  config.progress = [&](int64_t done, int64_t) { return done < most; };
  Engine engine(kQwen, config);
  most = 1 << 20;
  CHECK_THROWS_AS(engine.update_weights(changed.path()), Error);
  CHECK_THROWS_AS(engine.step(), Error);
  most = INT64_MAX;
  engine.update_weights(changed.path());
  CHECK(difference(run_script(changed.path(), device_config(1, Layout::kTp), brief_script()), Runner(engine, true).run(brief_script())) == "");
  engine.submit(greedy_request("b", prompt_of(2, 1), 4));
  engine.step();
  CHECK(engine.step().captured);
}

TEST_CASE("NCCL: a fault on any rank is rolled back over a new connection, and no bit changes", "[engine]") {
  const int ranks = possible_ranks();
  if (ranks < 2) return;
  Script script = script_of_three(0);
  const Outcome expected = run_script(kQwen, device_config(1, Layout::kTp), script);
  for (Layout start : {Layout::kTp, Layout::kEp})
    for (int rank = 0; rank < ranks; ++rank) {
      const bool processes = rank % 2 == (start == Layout::kTp ? 0 : 1);
      Engine engine(kQwen, nccl_config(ranks, start, processes));
      std::atomic<bool> armed{true};
      engine.impl().switcher().hook = [&](const CopyPoint& p) {
        // After its copies the others may have left the region as if nothing had been.
        if (p.item == rank && p.rank == rank && p.when == (rank < 2 ? CopyPoint::kAfter : CopyPoint::kBetween) && armed.exchange(false))
          throw Error(Code::kIo, "injected");
      };
      script.switches = {{2, start == Layout::kTp ? 0 : -1}};
      INFO("from " << name_of(start) << " rank " << rank << " processes " << processes);
      check_rolled_back(engine, script, expected, start == Layout::kTp ? 4 : 0);
    }
}

}  // namespace moebius::test
