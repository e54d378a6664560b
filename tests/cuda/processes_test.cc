// Each rank in a process of its own: the engine plans here, the ranks' processes hold the memory and do the work.
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include "tests/cuda/engine_harness.h"
#include "tests/unit/engine/model_copy.h"

namespace moebius::test {
namespace {

// Emulated memory can be shared with other processes only where it is asked for.
struct SharedMemory {
  SharedMemory() { setenv("MOEBIUS_EMULATED_SHARED", "1", 1); }
  ~SharedMemory() { unsetenv("MOEBIUS_EMULATED_SHARED"); }
};

EngineConfig processes_config(int ranks, Layout layout) {
  EngineConfig c = device_config(ranks, layout);
  c.device_ids.assign(static_cast<size_t>(ranks), 0);  // one GPU is enough
  c.rank_processes = true;
  return c;
}

Outcome in_one_process(const std::string& model) { return run_script(model, device_config(1, Layout::kTp), script_of_three(1.1)); }

// Processes called moebius-rank that this one has started.
std::vector<pid_t> children() {
  std::vector<pid_t> out;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string number = entry.path().filename();
    if (number.find_first_not_of("0123456789") != std::string::npos) continue;
    std::ifstream file(entry.path() / "stat");
    std::string text((std::istreambuf_iterator<char>(file)), {});
    const size_t end = text.rfind(')');
    if (end == std::string::npos || text.find("(moebius-rank)") == std::string::npos) continue;
    char state = 0;
    long parent = 0;
    if (std::sscanf(text.c_str() + end + 1, " %c %ld", &state, &parent) == 2 && parent == getpid() && state != 'Z') out.push_back(std::stoi(number));
  }
  return out;
}

}  // namespace

TEST_CASE("processes: either layout, seams and switches give the bits of one process, and none is left at the end", "[engine]") {
  const SharedMemory shared;
  int64_t turn = 0;
  for (const std::string& model : {kQwen, kDense}) {
    const Outcome expected = in_one_process(model);
    for (int ranks : {1, 2, 4})
      for (Layout layout : {Layout::kTp, Layout::kEp}) {
        if ((model == kDense && ranks != 2) || turn++ % kSweep != 0) continue;
        INFO(model << " ranks " << ranks << " " << name_of(layout));
        EngineConfig config = processes_config(ranks, layout);
        config.two_shot_bytes = ranks == 4 ? 0 : 1 << 18;
        CHECK(difference(expected, run_script(model, config, script_of_three(1.1))) == "");
      }
    Script script = script_of_three(1.1);
    script.switches = {{1, -1}, {3, 0}, {4, 2}};
    for (double budget : {0.0, 1e-6}) {
      EngineConfig config = processes_config(2, Layout::kEp);
      config.stall_budget_ms = budget;
      Engine engine(model, config);
      engine.impl().switcher().set_piece_bytes(4096);
      CHECK(children().size() == 2);
      const Outcome got = Runner(engine).run(script);
      CHECK(got.count(EventType::kSwitchStarted) > 0);
      CHECK(difference(expected, got) == "");
    }
  }
  CHECK(children().empty());
}

TEST_CASE("processes: attention that turns its queries gives the bits of one process", "[engine]") {
  const SharedMemory shared;
  const WideHeads model;
  EngineConfig one = device_config(1, Layout::kTp), two = processes_config(2, Layout::kTp);
  one.dummy_weights = two.dummy_weights = true;
  CHECK(difference(run_script(model.path(), one, short_script()), run_script(model.path(), two, short_script())) == "");
}

TEST_CASE("processes: what is read comes whole, however much it is", "[engine]") {
  const SharedMemory shared;
  Engine engine(kQwen, processes_config(2, Layout::kTp));
  Device& device = engine.impl().device();
  constexpr int64_t kBytes = (200 << 20) + 64;
  const DeviceBuffer buffer(device, 1, kBytes);
  std::vector<uint32_t> in(kBytes / 4), out(kBytes / 4, 0);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i) * 2654435761u;
  device.write(1, buffer.data(), in.data(), kBytes);
  const auto read = [&](int64_t pitch, int64_t width, int64_t height) {
    std::fill(out.begin(), out.end(), 0);
    device.read(1, out.data(), width, buffer.data(), pitch, width, height);
    while (!device.idle(1)) {
    }
    for (int64_t i = 0; i < height; ++i)
      if (std::memcmp(reinterpret_cast<std::byte*>(out.data()) + i * width, reinterpret_cast<std::byte*>(in.data()) + i * pitch, static_cast<size_t>(width)) != 0)
        FAIL("row " << i << " of " << width << " bytes");
  };
  read(kBytes, kBytes, 1);
  read(100 << 20, 80 << 20, 2);
  read(1 << 20, 4096, 200);
}

TEST_CASE("processes: a fault in a switch is rolled back, and no bit changes", "[engine]") {
  const SharedMemory shared;
  const Outcome expected = in_one_process(kQwen);
  for (Layout start : {Layout::kTp, Layout::kEp}) {
    Script script = script_of_three(1.1);
    script.switches = {{2, start == Layout::kTp ? 0 : -1}};
    Engine engine(kQwen, processes_config(2, start));
    std::atomic<bool> armed{true};
    engine.impl().switcher().hook = [&](const CopyPoint& p) {
      if (p.item == 2 && p.rank == 1 && p.when == CopyPoint::kBetween && armed.exchange(false)) throw Error(Code::kIo, "injected");
    };
    INFO("from " << name_of(start));
    check_rolled_back(engine, script, expected, start == Layout::kTp ? 4 : 0);
  }
}

TEST_CASE("processes: an update's weights are those of a fresh engine", "[engine]") {
  const SharedMemory shared;
  ModelCopy changed(kQwen);
  changed.change_all();
  Engine engine(kQwen, processes_config(2, Layout::kEp));
  engine.update_weights(changed.path());
  CHECK(difference(run_script(changed.path(), device_config(1, Layout::kTp), brief_script()), Runner(engine, true).run(brief_script())) == "");
  engine.submit(greedy_request("b", prompt_of(2, 1), 4));
  engine.step();
  CHECK(engine.step().captured);
}

TEST_CASE("processes: when one is killed every request ends with an error that says so", "[engine]") {
  const SharedMemory shared;
  Engine engine(kQwen, processes_config(2, Layout::kTp));
  engine.submit(greedy_request("a", prompt_of(1, 19), 50));
  engine.submit(greedy_request("b", prompt_of(2, 4), 50));
  for (int i = 0; i < 3; ++i) engine.step();
  const std::vector<pid_t> ranks = children();
  REQUIRE(ranks.size() == 2);
  kill(ranks[1], SIGKILL);
  std::string why;
  try {
    for (int i = 0; i < 100; ++i) engine.step();
  } catch (const Error& e) {
    why = e.what();
  }
  CHECK_THAT(why, Catch::Matchers::Contains("was ended by signal 9"));
  std::vector<Event> events(256);
  events.resize(engine.poll(events, 0));
  int failed = 0;
  for (const Event& e : events) failed += e.type == EventType::kFinished && e.finish_reason == FinishReason::kError;
  CHECK(failed == 2);
}

TEST_CASE("processes: one that stands still is waited for until the deadline", "[engine]") {
  const SharedMemory shared;
  EngineConfig config = processes_config(2, Layout::kTp);
  config.wait_deadline_ms = 3000;
  auto engine = std::make_unique<Engine>(kQwen, config);
  engine->submit(greedy_request("a", prompt_of(1, 19), 50));
  for (int i = 0; i < 3; ++i) engine->step();
  const std::vector<pid_t> ranks = children();
  REQUIRE(ranks.size() == 2);
  kill(ranks[1], SIGSTOP);
  std::string why;
  try {
    for (int i = 0; i < 3; ++i) engine->step();
  } catch (const Error& e) {
    why = e.what();
  }
  CHECK_THAT(why, Catch::Matchers::Contains("within 3000 ms") || Catch::Matchers::Contains("did not end in time"));
  kill(ranks[1], SIGCONT);
  engine.reset();
  for (int i = 0; i < 1000 && !children().empty(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));  // a thread that came back too late keeps them
}

TEST_CASE("processes: what they cannot do is refused", "[engine]") {
  using Catch::Matchers::Contains;
  const SharedMemory shared;
  EngineConfig config = processes_config(2, Layout::kTp);
  config.streams = {&config, &config};
  CHECK_THAT(refusal(config), Contains("with rank_processes each rank makes its own"));
  config.streams.clear();
  config.communicator = "nccl";
  const std::string shared_device = refusal(config);
  if (shared_device.find("NCCL cannot be loaded") == std::string::npos && shared_device.find("has no NCCL") == std::string::npos)
    CHECK_THAT(shared_device, Contains("2 ranks on 1 devices"));
  config.communicator = "peer";
  config.device_ids = {0, 99};
  CHECK_THAT(refusal(config), Contains("device 99 of rank"));
  CHECK(children().empty());
}

}  // namespace moebius::test
