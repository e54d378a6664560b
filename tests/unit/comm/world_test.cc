#include "lib/comm/world.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "lib/base/error.h"
#include "lib/comm/local.h"
#include "lib/cpu/cpu_device.h"
#include "lib/cpu/cpu_ops.h"
#include "tests/catch.h"

namespace moebius {
namespace {

using namespace std::chrono_literals;

TEST_CASE("a region runs once on every thread and its end is a fence") {
  for (int ranks : {1, 2, 5})
    for (int threads : {1, 3}) {
      World world(ranks, threads, 5000);
      std::vector<int> runs(ranks * threads, 0);  // plain: the fence orders the writes before the reads below
      for (int i = 0; i < 200; ++i) world.run([&](int r, int t) { ++runs[r * threads + t]; });
      CHECK(runs == std::vector<int>(ranks * threads, 200));
    }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which need address space of their own
TEST_CASE("a thread that cannot start is an error, and those that have started end") {
  long pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_AS, &before) == 0);
  rlimit little = before;
  little.rlim_cur = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (64 << 20);  // some stacks of 8 MiB
  REQUIRE(setrlimit(RLIMIT_AS, &little) == 0);
  std::string message;
  try {
    World world(4, 64, 5000);
  } catch (const Error& e) {
    message = e.what();
  }
  REQUIRE(setrlimit(RLIMIT_AS, &before) == 0);
  CHECK_THAT(message, Catch::Contains("of 64 of rank") && Catch::Contains("cannot start (4 ranks, 256 threads in all)"));
  World(2, 2, 5000).run([](int, int) {});
}
#endif

TEST_CASE("the caller computes as rank 0's first thread") {
  World world(2, 1, 5000);
  std::thread::id seen;
  world.run([&](int r, int t) {
    if (r == 0 && t == 0) seen = std::this_thread::get_id();
  });
  CHECK(seen == std::this_thread::get_id());
}

TEST_CASE("barriers order writes before reads") {
  World world(3, 2, 5000);
  std::vector<int> a(6), b(6);
  bool right = true;
  for (int round = 1; round <= 300; ++round)
    world.run([&](int r, int t) {
      const int me = r * 2 + t;
      a[me] = round;
      world.world_barrier();
      b[me] = std::accumulate(a.begin(), a.end(), 0);
      world.rank_barrier(r);
      if (b[r * 2] != 6 * round || b[r * 2 + 1] != 6 * round) right = false;
    });
  CHECK(right);
}

TEST_CASE("an error in one thread ends the region on all, and the world lives on") {
  World world(2, 2, 5000);
  std::atomic<int> left{0};
  const auto region = [&](int r, int t) {
    struct Leave {
      std::atomic<int>& n;
      ~Leave() { ++n; }
    } leave{left};
    if (r == 1 && t == 0) throw Error(Code::kIo, "injected");
    world.world_barrier();  // would wait for ever
  };
  CHECK_THROWS_WITH(world.run(region), "injected");
  CHECK(left == 4);  // everyone has stopped before run returns
  CHECK_FALSE(world.dead());
  std::atomic<int> ran{0};
  world.run([&](int, int) {
    ++ran;
    world.world_barrier();
  });
  CHECK(ran == 4);
}

TEST_CASE("a slow thread is waited for after the deadline: nobody undoes while it may still write") {
  World world(2, 1, 200);
  std::atomic<bool> wrote{false};
  CHECK_THROWS_AS(world.run([&](int r, int) {
    if (r == 1) {
      std::this_thread::sleep_for(300ms);
      wrote = true;
    }
  }), Error);
  CHECK(wrote);  // run() returned only after it had acknowledged
  CHECK_FALSE(world.dead());
}

TEST_CASE("a slow thread learns of the abort before it goes on") {
  World world(2, 1, 200);
  std::atomic<bool> went_on{false};
  CHECK_THROWS_AS(world.run([&](int r, int) {
    if (r == 1) {
      std::this_thread::sleep_for(300ms);
      world.check_abort();
      went_on = true;
    }
  }), Error);
  CHECK_FALSE(went_on);
}

TEST_CASE("a thread that never answers makes the world dead within two deadlines") {
  static std::atomic<bool> release{false};  // outlives the detached thread's last look at it
  {
    World world(2, 1, 100);
    const auto begin = std::chrono::steady_clock::now();
    CHECK_THROWS_AS(world.run([&](int r, int) {
      while (r == 1 && !release) std::this_thread::sleep_for(2ms);
    }), Error);
    CHECK(std::chrono::steady_clock::now() - begin < 10s);
    CHECK(world.dead());
    CHECK_THROWS_AS(world.run([](int, int) {}), Error);
  }
  release = true;
  std::this_thread::sleep_for(20ms);
}

TEST_CASE("memory of a dead world lives while a thread is stuck, and no longer when it came back before it was handed over") {
  for (bool back_first : {false, true}) {
    const auto release = std::make_shared<std::atomic<bool>>(false);
    std::atomic<bool>* const go = release.get();
    World world(2, 1, 100);
    CHECK_THROWS_AS(world.run([go](int r, int) {
      while (r == 1 && !*go) std::this_thread::sleep_for(2ms);
    }), Error);
    REQUIRE(world.dead());
    if (back_first) *release = true, std::this_thread::sleep_for(300ms);
    auto memory = std::make_shared<int>(1);
    const std::weak_ptr<int> kept = memory;
    world.keep_alive(std::move(memory));
    CHECK(kept.expired() == back_first);
    *release = true;
    for (int i = 0; i < 2000 && !kept.expired(); ++i) std::this_thread::sleep_for(2ms);
    CHECK(kept.expired());
  }
}

TEST_CASE("a caller that outlasts the deadline finds its region failed, with a barrier after it and without, and the world lives on") {
  for (bool barrier : {false, true}) {
    World world(2, 1, 200);
    const auto region = [barrier, &world](int r, int) {
      if (r == 0) std::this_thread::sleep_for(1000ms);
      if (barrier) world.world_barrier();
    };
    try {
      world.run(region);
      FAIL("no error");
    } catch (const Error& e) {
      CHECK(e.code() == Code::kTimeout);
    }
    CHECK_FALSE(world.dead());
    for (int i = 0; i < 10; ++i) world.run([&](int, int) { world.world_barrier(); });
    if (!barrier) world.run_long(region);  // a load may take as long as it takes
  }
}

#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork
TEST_CASE("time in which the whole process is stopped counts for no deadline") {
  int ready[2];
  REQUIRE(pipe(ready) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    int status = 1;
    try {
      World world(2, 1, 1500);
      world.run([&](int r, int) {
        if (r == 1) {
          (void)!write(ready[1], "", 1);
          for (int i = 0; i < 40; ++i) std::this_thread::sleep_for(5ms);
        }
        world.world_barrier();
      });
      status = 0;
    } catch (...) {
    }
    _exit(status);
  }
  char byte;
  REQUIRE(read(ready[0], &byte, 1) == 1);
  std::this_thread::sleep_for(50ms);
  REQUIRE(kill(child, SIGSTOP) == 0);
  std::this_thread::sleep_for(2000ms);
  REQUIRE(kill(child, SIGCONT) == 0);
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  close(ready[0]), close(ready[1]);
}
#endif

TEST_CASE("a barrier that a rank never reaches times out") {
  World world(2, 1, 150);
  CHECK_THROWS_AS(world.run([&](int r, int) {
    if (r == 0) world.world_barrier();
    else std::this_thread::sleep_for(250ms);
  }), Error);
}

TEST_CASE("dispatch brings every home's rows and choices, gather its rows") {
  const int64_t hidden = 8, top_k = 2, rows = 7;
  World world(3, 2, 5000);
  std::vector<std::vector<bf16>> x(3, std::vector<bf16>(rows * hidden));
  std::vector<std::vector<int32_t>> ids(3, std::vector<int32_t>(rows * top_k));
  std::vector<std::vector<float>> weights(3, std::vector<float>(rows * top_k));
  CpuDevice device(3, cpu_ops(best_isa()));
  std::vector<ExchangeBuffers> buffers(3);
  for (int r = 0; r < 3; ++r) buffers[r] = {x[r].data(), ids[r].data(), weights[r].data(), {}, {}};
  const Range homes[3] = {{0, 4}, {4, 4}, {4, 7}};  // rank 1 has no rows and takes part all the same
  for (int r = 0; r < 3; ++r)
    for (int64_t row = homes[r].begin; row < homes[r].end; ++row) {
      for (int64_t i = 0; i < hidden; ++i) x[r][row * hidden + i] = static_cast<bf16>(row * 100 + i);
      for (int64_t i = 0; i < top_k; ++i) ids[r][row * top_k + i] = static_cast<int32_t>(row), weights[r][row * top_k + i] = row * 0.5f;
    }
  std::vector<std::unique_ptr<LocalCommunicator>> comms;
  for (int r = 0; r < 3; ++r) comms.push_back(std::make_unique<LocalCommunicator>(world, device, r, buffers, ExchangeWidths{hidden, top_k, 0}));
  world.run([&](int r, int t) { comms[r]->dispatch(homes, Lane{t, 2, nullptr}); });
  for (int r = 0; r < 3; ++r)
    for (int64_t row = 0; row < rows; ++row) {
      CHECK(x[r][row * hidden + 3] == row * 100 + 3);
      CHECK(ids[r][row * top_k + 1] == row);
      CHECK(weights[r][row * top_k] == row * 0.5f);
    }
}

}  // namespace
}  // namespace moebius
