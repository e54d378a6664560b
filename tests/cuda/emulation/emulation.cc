#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <boost/context/fiber.hpp>
#include <boost/context/fixedsize_stack.hpp>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "tests/cuda/emulation/cuda_runtime.h"

namespace moebius::emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kMaxShared = 227 << 10;  // of Hopper
constexpr unsigned kMaxThreads = 1024;

[[noreturn]] void report(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Exchange {
  std::byte values[kWarp * 64];
  int readers = 0;
};

struct Thread {
  boost::context::fiber fiber, scheduler;
  Place place;
  int number = 0;  // in its block
  bool awaited = false;
  std::deque<std::vector<std::function<void()>>> groups[2];  // committed
  std::vector<std::function<void()>> open[2];
  bool fenced = true;  // since the last copies were waited for
  State state = State::kDone;
  // At a warp function:
  unsigned mask = 0;
  const void* function = nullptr;
  std::byte mine[64];
  Exchange* result = nullptr;
};

// One launch at a time.
std::mutex launch_mutex;
std::vector<std::unique_ptr<Thread>> threads;  // reused by every block
std::vector<std::unique_ptr<Exchange>> exchanges;
std::vector<Exchange*> free_exchanges;
Thread* current = nullptr;
const std::function<void()>* job = nullptr;
alignas(1024) std::byte shared_memory[kMaxShared];
uint64_t random_state = [] {
  const char* seed = std::getenv("MOEBIUS_SEED");
  const uint64_t value = seed != nullptr ? std::strtoull(seed, nullptr, 10) : 20261125;
  std::fprintf(stderr, "emulated kernels: order of threads from MOEBIUS_SEED=%llu\n", static_cast<unsigned long long>(value));
  return value * 2 + 1;
}();

uint32_t random_below(uint32_t n) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>((random_state >> 33) % n);
}

void yield() { current->scheduler = std::move(current->scheduler).resume(); }

void make_threads(size_t n) {
  while (threads.size() < n) {
    threads.push_back(std::make_unique<Thread>());
    Thread* t = threads.back().get();
    t->number = static_cast<int>(threads.size()) - 1;
    t->fiber = boost::context::fiber(std::allocator_arg, boost::context::fixedsize_stack(kStackBytes), [t](boost::context::fiber&& scheduler) {
      t->scheduler = std::move(scheduler);
      for (;;) {
        (*job)();
        t->state = State::kDone;
        t->scheduler = std::move(t->scheduler).resume();
      }
      return boost::context::fiber();
    });
  }
}

// Lets go the lanes of thread `arrived`'s mask once all of them wait for the same: they are ready again.
void release_lanes(size_t arrived, size_t n, std::vector<size_t>& ready) {
  const size_t first = arrived / kWarp * kWarp, last = std::min(n, first + kWarp);
  const unsigned mask = threads[arrived]->mask;
  if ((mask >> (arrived - first) & 1) == 0) report("a lane calls a warp function with a mask that leaves it out");
  for (size_t i = first; i < first + kWarp; ++i) {
    if ((mask >> (i - first) & 1) == 0) continue;
    if (i >= last || threads[i]->state == State::kDone) report("a lane of a warp function's mask has ended or does not exist");
    if (threads[i]->state != State::kAtWarp || threads[i]->mask != mask) return;
    if (threads[i]->function != threads[arrived]->function) report("the lanes of a mask call different warp functions");
  }
  if (free_exchanges.empty()) {
    exchanges.push_back(std::make_unique<Exchange>());
    free_exchanges.push_back(exchanges.back().get());
  }
  Exchange* result = free_exchanges.back();
  free_exchanges.pop_back();
  result->readers = 0;
  for (size_t i = first; i < last; ++i) {
    if ((mask >> (i - first) & 1) == 0) continue;
    Thread& t = *threads[i];
    std::memcpy(result->values + (i - first) * 64, t.mine, 64);
    t.result = result;
    t.state = State::kReady;
    ++result->readers;
    ready.push_back(i);
  }
}

void run_block(size_t n) {
  static std::vector<size_t> ready;
  ready.resize(n);
  for (size_t i = 0; i < n; ++i) ready[i] = i, threads[i]->state = State::kReady;
  for (;;) {
    while (!ready.empty()) {
      const size_t pick = random_below(static_cast<uint32_t>(ready.size()));
      const size_t i = ready[pick];
      ready[pick] = ready.back();
      ready.pop_back();
      current = threads[i].get();
      current->fiber = std::move(current->fiber).resume();
      if (current->state == State::kAtWarp) release_lanes(i, n, ready);
    }
    size_t done = 0, at_block = 0;
    for (size_t i = 0; i < n; ++i) done += threads[i]->state == State::kDone, at_block += threads[i]->state == State::kAtBlock;
    if (done == n) return;
    if (done + at_block < n) report("threads wait in a warp function that others of its mask never call");
    for (size_t i = 0; i < n; ++i)
      if (threads[i]->state == State::kAtBlock) threads[i]->state = State::kReady, ready.push_back(i);
  }
}

}  // namespace

const Place& here() { return current->place; }
std::byte* dynamic_shared() { return shared_memory; }
int lane() { return current->number % kWarp; }
void start_thread() {
  current->awaited = false;
  current->fenced = true;
}
void defer(Async kind, std::function<void()> work) {
  if (kind == kProducts && !current->fenced) report("a product of what was copied, without a fence between");
  current->open[kind].push_back(std::move(work));
}
void commit(Async kind) { current->groups[kind].push_back(std::exchange(current->open[kind], {})); }
void wait(Async kind, int groups_left) {
  Thread* const t = current;
  while (static_cast<int>(t->groups[kind].size()) > groups_left) {
    for (const auto& work : t->groups[kind].front()) work();
    t->groups[kind].pop_front();
    if (kind == kCopies) t->fenced = false;
  }
}
void fence_async_shared() { current->fenced = true; }
void await_previous() { current->awaited = true; }
void end_thread() {
  for (const int kind : {kCopies, kProducts})
    if (!current->open[kind].empty() || !current->groups[kind].empty()) report("a thread ends that has not waited for what it started");
  if (!current->awaited) report("a thread ends that has not awaited the kernels ahead");
}

void block_barrier() {
  current->state = State::kAtBlock;
  yield();
}

const std::byte* meet_warp(unsigned mask, const void* mine, size_t bytes, const void* function) {
  Thread* t = current;
  std::memcpy(t->mine, mine, bytes);
  t->mask = mask;
  t->function = function;
  t->state = State::kAtWarp;
  yield();
  return t->result->values;
}

void release_warp(const std::byte*) {
  Exchange* result = current->result;
  if (--result->readers == 0) free_exchanges.push_back(result);
}

bool run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& f) {
  const uint64_t in_block = uint64_t{block.x} * block.y * block.z;
  if (in_block == 0 || in_block > kMaxThreads || shared_bytes > kMaxShared || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return false;
  std::lock_guard lock(launch_mutex);
  const size_t n = size_t{block.x} * block.y * block.z;
  make_threads(n);
  job = &f;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(shared_memory, 0xff, shared_bytes);
        for (size_t i = 0; i < n; ++i) {
          const auto t = static_cast<unsigned>(i);
          threads[i]->place = {dim3(t % block.x, t / block.x % block.y, t / block.x / block.y), dim3(x, y, z), block, grid};
        }
        run_block(n);
      }
  return true;
}

}  // namespace moebius::emulation

// ---- runtime

namespace {

constexpr size_t kDeviceBytes = size_t{8} << 30;
std::mutex memory_mutex;
struct Allocation {
  int device;
  size_t bytes;
  int file;  // of shared memory, or −1
};
std::unordered_map<void*, Allocation> allocations;
std::unordered_map<void*, size_t> opened;  // memory of other processes
size_t used[16] = {};
thread_local int device_of_thread = 0;
thread_local cudaError_t last_error = cudaSuccess;

int device_count() {
  const char* text = std::getenv("MOEBIUS_EMULATED_DEVICES");
  return text != nullptr ? std::atoi(text) : 4;
}

cudaError_t give(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;  // cudaErrorNotReady too, as CUDA's runtime does
  return error;
}

}  // namespace

void moebius::emulation::keep_error(cudaError_t error) { give(error); }

size_t& moebius::emulation::allowed_shared(const void* kernel) {
  thread_local std::unordered_map<const void*, size_t> allowed;
  return allowed.try_emplace(kernel, 32 << 10).first->second;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorPeerAccessAlreadyEnabled: return "cudaErrorPeerAccessAlreadyEnabled";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    default: return "cudaErrorNotSupported";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count > 0 ? cudaSuccess : give(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return give(cudaErrorInvalidDevice);
  device_of_thread = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = device_of_thread;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10 : 0;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard lock(memory_mutex);
  *total = kDeviceBytes;
  *free = kDeviceBytes - used[device_of_thread];
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaMalloc(void** out, size_t bytes) {
  std::lock_guard lock(memory_mutex);
  if (bytes > kDeviceBytes - used[device_of_thread]) return give(cudaErrorMemoryAllocation);
  Allocation made{device_of_thread, (bytes + 4095) / 4096 * 4096, -1};
  if (std::getenv("MOEBIUS_EMULATED_SHARED") != nullptr) {
    made.file = memfd_create("emulated", MFD_CLOEXEC);
    static std::byte* next = reinterpret_cast<std::byte*>(uintptr_t{1} << 45);  // equal addresses in all processes, as GPUs may give them
    void* mapping = made.file < 0 || ftruncate(made.file, static_cast<off_t>(made.bytes)) != 0
                        ? MAP_FAILED
                        : mmap(next, made.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, made.file, 0);
    next += made.bytes;
    *out = mapping != MAP_FAILED ? mapping : nullptr;
  } else {
    *out = std::aligned_alloc(4096, made.bytes);
  }
  if (*out == nullptr) return give(cudaErrorMemoryAllocation);
  std::memset(*out, 0xff, made.bytes);
  allocations[*out] = made;
  used[device_of_thread] += made.bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  std::lock_guard lock(memory_mutex);
  const auto it = allocations.find(memory);
  if (it == allocations.end()) return give(cudaErrorInvalidValue);
  used[it->second.device] -= it->second.bytes;
  if (it->second.file >= 0) {
    munmap(memory, it->second.bytes);
    close(it->second.file);
  } else {
    std::free(memory);
  }
  allocations.erase(it);
  return cudaSuccess;
}
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* out, void* memory) {
  std::lock_guard lock(memory_mutex);
  const auto it = allocations.find(memory);
  if (it == allocations.end() || it->second.file < 0) return give(cudaErrorInvalidValue);
  *out = {getpid(), it->second.file, it->second.bytes};
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** out, cudaIpcMemHandle_t handle, unsigned) {
  *out = nullptr;
  if (handle.process == getpid()) return give(cudaErrorInvalidValue);  // as CUDA: not in the process that has it
  const std::string path = "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.file);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return give(cudaErrorInvalidValue);
  void* mapping = mmap(nullptr, handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (mapping == MAP_FAILED) return give(cudaErrorMemoryAllocation);
  std::lock_guard lock(memory_mutex);
  opened[mapping] = handle.bytes;
  *out = mapping;
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void* memory) {
  std::lock_guard lock(memory_mutex);
  const auto it = opened.find(memory);
  if (it == opened.end()) return give(cudaErrorInvalidValue);
  munmap(memory, it->second);
  opened.erase(it);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  *out = std::malloc(bytes > 0 ? bytes : 1);
  return *out != nullptr ? cudaSuccess : give(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

// Streams do their work when it is queued, but for those that are being captured: there it is kept, in the order of the calls, which is one
// that the captured events allow.
struct Capture;
struct CUstream_st {
  Capture* capture = nullptr;
  std::atomic<bool> busy = false;  // work was queued since it was last asked: the next answer is cudaErrorNotReady, as a device may give
};
struct CUevent_st {
  Capture* capture = nullptr;  // of the stream where it was recorded last
  cudaStream_t stream = nullptr;
  uint64_t at = 0;             // how much of its stream's captured work it covers
};
struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct Capture {
  cudaStream_t origin = nullptr;
  std::vector<std::function<void()>> work;
  std::vector<cudaStream_t> streams;
  std::unordered_map<cudaStream_t, uint64_t> queued, joined;  // captured work of a stream, and what of it the origin waits for
};

namespace {

std::mutex capture_mutex;
std::vector<std::unique_ptr<Capture>> captures;  // also those that have ended: events may remember them

bool is_captured(cudaStream_t stream) { return stream != nullptr && stream->capture != nullptr; }
void set_busy(cudaStream_t stream) {
  if (stream != nullptr) stream->busy = true;
}

}  // namespace

bool moebius::emulation::is_captured(cudaStream_t stream) { return ::is_captured(stream); }

int moebius::emulation::device_of(const void* memory) {
  std::lock_guard lock(memory_mutex);
  for (const auto& [begin, allocation] : allocations)
    if (memory >= begin && memory < static_cast<const std::byte*>(begin) + allocation.bytes) return allocation.device;
  return -1;
}

void moebius::emulation::check_prefetch(const void* memory, int64_t bytes) {
  const auto* begin = static_cast<const std::byte*>(memory);
  if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(memory) % 16 != 0 || device_of(begin) < 0 || device_of(begin + bytes - 1) != device_of(begin))
    report("a prefetch of what is no memory of a device, or not by 16 bytes");
}

void moebius::emulation::queue(cudaStream_t stream, std::function<void()> work) {
  {
    std::lock_guard lock(capture_mutex);
    if (::is_captured(stream)) {
      stream->capture->work.push_back(std::move(work));
      ++stream->capture->queued[stream];
      return;
    }
  }
  work();
  set_busy(stream);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (is_captured(stream) && kind != cudaMemcpyDeviceToDevice && kind != cudaMemcpyDefault) return give(cudaErrorStreamCaptureUnsupported);
  moebius::emulation::queue(stream, [=] {
    if (bytes > 0) std::memcpy(to, from, bytes);
  });
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return give(cudaErrorInvalidValue);
  if (is_captured(stream)) return give(cudaErrorStreamCaptureUnsupported);
  for (size_t i = 0; i < height; ++i) std::memcpy(static_cast<std::byte*>(to) + i * to_pitch, static_cast<const std::byte*>(from) + i * from_pitch, width);
  set_busy(stream);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  moebius::emulation::queue(stream, [=] {
    if (bytes > 0) std::memset(to, value, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) {
  *out = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (is_captured(stream)) return give(cudaErrorStreamCaptureUnsupported);
  return stream != nullptr && stream->busy.exchange(false) ? give(cudaErrorNotReady) : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_captured(stream)) return give(cudaErrorStreamCaptureUnsupported);
  if (stream != nullptr) stream->busy = false;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::lock_guard lock(capture_mutex);
  if (event->capture != nullptr && !is_captured(stream)) {  // it joins
    stream->capture = event->capture;
    event->capture->streams.push_back(stream);
  }
  if (!is_captured(stream)) return cudaSuccess;
  Capture& capture = *stream->capture;
  if (event->capture != &capture) return give(cudaErrorStreamCaptureIsolation);
  if (stream == capture.origin) capture.joined[event->stream] = std::max(capture.joined[event->stream], event->at);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  std::lock_guard lock(capture_mutex);
  *event = {is_captured(stream) ? stream->capture : nullptr, stream, is_captured(stream) ? stream->capture->queued[stream] : 0};
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* out) {
  std::lock_guard lock(capture_mutex);
  *out = is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  std::lock_guard lock(capture_mutex);
  if (stream == nullptr || is_captured(stream)) return give(cudaErrorStreamCaptureUnsupported);
  captures.push_back(std::make_unique<Capture>());
  stream->capture = captures.back().get();
  stream->capture->origin = stream;
  stream->capture->streams = {stream};
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  std::lock_guard lock(capture_mutex);
  *out = nullptr;
  if (!is_captured(stream) || stream->capture->origin != stream) return give(cudaErrorStreamCaptureUnsupported);
  Capture& capture = *stream->capture;
  bool all_joined = true;
  for (cudaStream_t s : capture.streams) {
    s->capture = nullptr;
    all_joined = all_joined && (s == stream || capture.joined[s] == capture.queued[s]);
  }
  if (!all_joined) {
    capture.work.clear();
    return give(cudaErrorStreamCaptureUnjoined);
  }
  *out = new CUgraph_st{std::exchange(capture.work, {})};
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = new CUgraph_st(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (is_captured(stream)) return give(cudaErrorStreamCaptureUnsupported);
  for (const auto& work : graph->work) work();
  set_busy(stream);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaGraphDestroy(graph); }
