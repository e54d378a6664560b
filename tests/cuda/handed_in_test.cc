// Streams and communicators of the host's: the module works with them and leaves them alone.
#include <nccl.h>

#include <cstring>

#include "lib/base/code.h"
#include "lib/device/module.h"
#include "tests/catch.h"

extern "C" const moebius::DeviceModule* moebius_device_module();

namespace moebius {
namespace {

struct Host {
  Host() {
    ncclUniqueId id;
    ncclGetUniqueId(&id);
    for (int r = 0; r < 2; ++r) {
      cudaSetDevice(r);
      cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking);
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      ncclCommInitRankConfig(&comms[r], 2, id, r, &config);
    }
    cudaSetDevice(0);
  }
  ~Host() {
    for (int r = 0; r < 2; ++r) {
      if (!gone) ncclCommAbort(comms[r]);
      cudaStreamDestroy(streams[r]);
    }
  }
  ModuleOptions options(void* const* queues, void* const* handles) const { return {.ranks = 2, .collectives = 1, .queues = queues, .comms = handles}; }
  cudaStream_t streams[2];
  ncclComm_t comms[2];
  bool gone = false;
};

}  // namespace

TEST_CASE("streams and communicators that are handed in are used, and left alone at the end") {
  const DeviceModule& module = *moebius_device_module();
  Host host;
  void* queues[] = {host.streams[0], host.streams[1]};
  void* comms[] = {host.comms[0], host.comms[1]};
  ModuleStatus status;
  void* device = module.open(host.options(queues, comms), status);
  REQUIRE(std::string(status.text) == "");
  std::byte* memory[2];
  for (int r : {0, 1}) {
    CHECK(module.queue(device, r) == queues[r]);
    memory[r] = module.allocate(device, r, 64, status);
    const int64_t value = r + 5;
    module.write(device, r, memory[r], &value, sizeof value, status);
    module.all_reduce(device, r, memory[r], 1, Element::kInt64, status);
    module.exchange(device, r, status);
  }
  for (int r : {0, 1}) {
    CHECK(module.exchanged(device, r, status) == 1);
    int64_t value = 0;
    module.read(device, r, &value, 8, memory[r], 8, 8, 1, status);
    while (module.idle(device, r, status) == 0) {
    }
    CHECK(value == 11);
    module.release(device, r, memory[r]);
  }
  CHECK(status.code == 0);
  module.close(device);
  int count = 0;
  CHECK(ncclCommCount(host.comms[0], &count) == ncclSuccess);
  CHECK(count == 2);
  CHECK(cudaStreamQuery(host.streams[1]) == cudaSuccess);
}

TEST_CASE("a stream that is handed in can be used again after a capture that failed") {
  const DeviceModule& module = *moebius_device_module();
  Host host;
  void* queues[] = {host.streams[0], host.streams[1]};
  ModuleStatus status;
  void* device = module.open(host.options(queues, nullptr), status);
  REQUIRE(std::string(status.text) == "");
  std::byte* memory = module.allocate(device, 0, 64, status);
  const int64_t value = 5;
  CHECK(module.begin_capture(device, 0, status) == 0);
  CHECK(module.write(device, 0, memory, &value, sizeof value, status) < 0);  // nothing for a capture
  module.forget_captures(device, 0);
  status = {};
  CHECK(module.write(device, 0, memory, &value, sizeof value, status) == 0);
  while (module.idle(device, 0, status) == 0) {
  }
  CHECK(std::string(status.text) == "");
  module.release(device, 0, memory);
  module.close(device);
}

TEST_CASE("communicators that were handed in cannot be replaced once a rank has given up") {
  const DeviceModule& module = *moebius_device_module();
  Host host;
  void* comms[] = {host.comms[0], host.comms[1]};
  ModuleStatus status;
  void* device = module.open(host.options(nullptr, comms), status);
  REQUIRE(device != nullptr);
  for (int r : {0, 1}) module.give_up(device, r);
  host.gone = true;
  ConnectionId id;
  CHECK(module.prepare(device, &id, status) == static_cast<int32_t>(Code::kRankFailed));
  CHECK_THAT(status.text, Catch::Matchers::Contains("only the host can make others"));
  module.close(device);
}

TEST_CASE("what is handed in is checked") {
  const DeviceModule& module = *moebius_device_module();
  Host host;
  const auto refusal = [&](void* const* queues, void* const* comms) {
    ModuleStatus status;
    CHECK(module.open(host.options(queues, comms), status) == nullptr);
    CHECK(status.code == static_cast<int32_t>(Code::kInvalidArgument));
    return std::string(status.text);
  };
  void* turned[] = {host.comms[1], host.comms[0]};
  CHECK_THAT(refusal(nullptr, turned), Catch::Matchers::Contains("is of rank 1 of 2, must be of rank 0 of 2"));
  void* missing[] = {host.comms[0], nullptr};
  CHECK_THAT(refusal(nullptr, missing), Catch::Matchers::Contains("communicator 1 is NULL"));
  for (void* stream : {static_cast<void*>(nullptr), static_cast<void*>(cudaStreamLegacy), static_cast<void*>(cudaStreamPerThread)}) {
    void* no_stream[] = {host.streams[0], stream};
    CHECK_THAT(refusal(no_stream, nullptr), Catch::Matchers::Contains("stream of rank 1 is the default stream"));
  }
}

}  // namespace moebius
