#include "cuda/device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cuda/dense.h"
#include "cuda/launch.h"
#include "cuda/status.h"
#include "cuda/turn.h"

namespace moebius::cuda {
namespace {

// 0, or what CUDA says of `what`.
int32_t checked(cudaError_t error, const char* what, int rank, ModuleStatus& status) {
  if (error == cudaSuccess) return 0;
  (void)cudaGetLastError();
  const Code code = error == cudaErrorMemoryAllocation ? Code::kOutOfMemory : Code::kRankFailed;
  return refuse(status, code, "CUDA, rank %d: %s: %s (%s)", rank, what, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace

CudaDevice::Rank& CudaDevice::on(int rank) {
  Rank& r = *ranks_[static_cast<size_t>(rank)];
  (void)cudaSetDevice(r.device);
  return r;
}

std::unique_ptr<CudaDevice> CudaDevice::open(const ModuleOptions& options, ModuleStatus& status) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    (void)cudaGetLastError();
    refuse(status, Code::kUnsupported, "CUDA finds no device: %s", error != cudaSuccess ? cudaGetErrorString(error) : "there is none");
    return nullptr;
  }
  constexpr int kLeastDriver = 12010;  // kernels have parameters of more than 4 KiB
  if (int driver = 0; cudaDriverGetVersion(&driver) != cudaSuccess || driver < kLeastDriver) {
    refuse(status, Code::kUnsupported, "the driver is made for CUDA %d.%d, 12.1 is needed (driver 530 or later)", driver / 1000, driver % 1000 / 10);
    return nullptr;
  }
  auto device = std::make_unique<CudaDevice>();
  std::vector<int> used;
  for (int r = 0; r < options.ranks; ++r) {
    const int number = options.devices != nullptr ? options.devices[r] : (options.first_rank + r) % count;
    if (number < 0 || number >= count) {
      refuse(status, Code::kInvalidArgument, "device %d of rank %d: there are %d", number, r, count);
      return nullptr;
    }
    if (std::find(used.begin(), used.end(), number) == used.end()) used.push_back(number);
    device->ranks_.push_back(std::make_unique<Rank>());
    device->ranks_.back()->device = number;
    Rank& rank = device->on(r);
    if (options.queues != nullptr) {
      auto* const given = static_cast<cudaStream_t>(options.queues[r]);
      if (given == nullptr || given == cudaStreamLegacy || given == cudaStreamPerThread) {
        refuse(status, Code::kInvalidArgument, "stream of rank %d is the default stream, on which no step can be captured", r);
        return nullptr;
      }
      rank.stream = given;
      rank.own_stream = false;
    } else if (checked(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking), "a stream", r, status) < 0)
      return nullptr;
    int reads_pageable = 0;
    (void)cudaDeviceGetAttribute(&reads_pageable, cudaDevAttrPageableMemoryAccess, number);
    rank.reads_pageable = reads_pageable != 0;
    for (cudaEvent_t& mark : rank.marks)
      if (checked(cudaEventCreateWithFlags(&mark, cudaEventDisableTiming), "an event", r, status) < 0) return nullptr;
  }
  for (int r = 0; r < options.ranks && options.row_major != 0; ++r) {
    device->on(r);
    if (open_dense(status) < 0) return nullptr;
  }
  if (options.shared != 0) device->marks_ = std::make_unique<SharedMarks>(options.wait_ms, options.stop_waiting);
  if (options.collectives == 0) return device->enable_peer_access(used, status) < 0 ? nullptr : std::move(device);
  if (static_cast<int>(used.size()) < options.ranks) {
    refuse(status, Code::kUnsupported, "%d ranks on %d devices: NCCL needs a device for each; communicator peer does not", options.ranks, static_cast<int>(used.size()));
    return nullptr;
  }
  device->nccl_ = open_nccl(options, status);
  return device->nccl_ != nullptr ? std::move(device) : nullptr;
}

int32_t CudaDevice::enable_peer_access(const std::vector<int>& devices, ModuleStatus& status) {
  for (int one : devices)
    for (int peer : devices) {
      if (one == peer) continue;
      int can = 0;
      (void)cudaSetDevice(one);
      if (checked(cudaDeviceCanAccessPeer(&can, one, peer), "peer access", 0, status) < 0) return status.code;
      if (can == 0)
        return refuse(status, Code::kUnsupported, "device %d cannot read the memory of device %d, as communicator peer needs it; communicator nccl does not", one, peer);
      const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled) (void)cudaGetLastError();
      else if (checked(error, "peer access", 0, status) < 0) return status.code;
    }
  return 0;
}

CudaDevice::~CudaDevice() {
  if (fork_ != nullptr) (void)cudaEventDestroy(fork_);
  for (size_t r = 0; r < ranks_.size(); ++r) {
    Rank& rank = on(static_cast<int>(r));
    if (rank.stream != nullptr) {
      abandon_capture(rank);
      (void)cudaStreamSynchronize(rank.stream);
    }
    for (cudaGraphExec_t graph : rank.captured) (void)cudaGraphExecDestroy(graph);
    rank.kept.clear();
    if (rank.stream != nullptr && rank.own_stream) (void)cudaStreamDestroy(rank.stream);
    for (cudaEvent_t mark : rank.marks)
      if (mark != nullptr) (void)cudaEventDestroy(mark);
  }
}

int32_t CudaDevice::memory(int rank, int64_t* total_bytes, int64_t* free_bytes, ModuleStatus& status) {
  const Rank& r = on(rank);
  size_t free = 0, total = 0;
  if (checked(cudaMemGetInfo(&free, &total), "asking for free memory", rank, status) < 0) return status.code;
  const auto sharers = std::count_if(ranks_.begin(), ranks_.end(), [&](const auto& other) { return other->device == r.device; });
  *total_bytes = static_cast<int64_t>(total);
  *free_bytes = static_cast<int64_t>(free) / 10 * 9 / sharers;  // a tenth for the driver, kernels' local memory and graphs
  return 0;
}

std::byte* CudaDevice::allocate(int rank, int64_t bytes, ModuleStatus& status) {
  constexpr int64_t kSharedUnit = 2 << 20;  // what is shared is the whole of such units: they must hold nothing else
  if (marks_ != nullptr) bytes = round_up(bytes, kSharedUnit);
  const Rank& r = on(rank);
  void* memory = nullptr;
  if (const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes)); error != cudaSuccess) {
    size_t free = 0, total = 0;
    (void)cudaGetLastError();
    (void)cudaMemGetInfo(&free, &total);
    refuse(status, error == cudaErrorMemoryAllocation ? Code::kOutOfMemory : Code::kRankFailed,
           "CUDA, rank %d: %lld bytes of device %d, which has %lld free: %s", rank, static_cast<long long>(bytes), r.device,
           static_cast<long long>(free), cudaGetErrorString(error));
    return nullptr;
  }
  starts_late = true;
  if (checked(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), r.stream), "clearing memory", rank, status) < 0) {
    (void)cudaFree(memory);
    return nullptr;
  }
  return static_cast<std::byte*>(memory);
}

void CudaDevice::release(int rank, std::byte* memory) {
  on(rank);
  (void)cudaFree(memory);  // waits for what the device still does
}

// What is not pinned has been copied when the runtime's call returns, but perhaps not where the device reads pageable memory by itself.
int32_t CudaDevice::write(int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status) {
  const Rank& r = on(rank);
  starts_late = true;
  if (checked(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, r.stream), "writing", rank, status) < 0) return status.code;
  if (!r.reads_pageable) return 0;
  cudaPointerAttributes memory{};
  if (cudaPointerGetAttributes(&memory, from) == cudaSuccess && memory.type == cudaMemoryTypeHost) return 0;  // pinned
  return checked(cudaStreamSynchronize(r.stream), "writing", rank, status);
}

int32_t CudaDevice::read(int rank, void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height, ModuleStatus& status) {
  if (width == 0 || height == 0) return 0;
  starts_late = true;
  if (height == 1 || (width == to_pitch && width == from_pitch))  // rows of over 2 GiB cannot be copied as such
    return checked(cudaMemcpyAsync(to, from, static_cast<size_t>(width * height), cudaMemcpyDeviceToHost, on(rank).stream), "reading", rank, status);
  return checked(cudaMemcpy2DAsync(to, static_cast<size_t>(to_pitch), from, static_cast<size_t>(from_pitch), static_cast<size_t>(width),
                                   static_cast<size_t>(height), cudaMemcpyDeviceToHost, on(rank).stream),
                 "reading", rank, status);
}

int32_t CudaDevice::pin(void* host, int64_t bytes, ModuleStatus& status) {
  on(0);
  return checked(cudaHostRegister(host, static_cast<size_t>(bytes), cudaHostRegisterPortable), "pinning memory", 0, status);
}

int32_t CudaDevice::copy(int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status) {
  starts_late = true;
  return checked(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, on(rank).stream), "copying", rank, status);
}

int32_t CudaDevice::copy_block(int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status) {
  return checked(on(rank).blocks.add(to, from, bytes), "a block to copy", rank, status);
}

int32_t CudaDevice::finish_blocks(int rank, ModuleStatus& status) {
  Rank& r = on(rank);
  return checked(r.blocks.flush(r.stream), "copying blocks", rank, status);
}

int32_t CudaDevice::keep_blocks(int rank, ModuleStatus& status) {
  Rank& r = on(rank);
  r.kept.emplace_back();
  if (checked(r.blocks.keep(r.stream, r.kept.back()), "a table of blocks", rank, status) < 0) return status.code;
  return static_cast<int32_t>(r.kept.size()) - 1;
}

int32_t CudaDevice::copy_kept(int rank, int number, int64_t begin, int64_t end, ModuleStatus& status) {
  const Rank& r = on(rank);
  r.kept[static_cast<size_t>(number)].copy(begin, end, r.stream);
  return checked(cudaPeekAtLastError(), "copying kept blocks", rank, status);
}

int32_t CudaDevice::mark(int rank, ModuleStatus& status) {
  Rank& r = on(rank);
  const Turn turn;
  if (marks_ != nullptr) {
    marks_->mark(r.stream);
    return 0;
  }
  return checked(cudaEventRecord(r.marks[r.num_marks++ % 2], r.stream), "a mark", rank, status);
}

// All ranks have set as many marks: the barrier between says so.
int32_t CudaDevice::pass(int rank, ModuleStatus& status) {
  const Rank& r = on(rank);
  const Turn turn;
  if (marks_ != nullptr) {
    marks_->pass(r.stream);
    return 0;
  }
  const unsigned mark = (r.num_marks - 1) % 2;
  for (const auto& other : ranks_) {
    if (other.get() == &r) continue;
    starts_late = true;
    if (checked(cudaStreamWaitEvent(r.stream, other->marks[mark], 0), "passing a mark", rank, status) < 0) return status.code;
  }
  return 0;
}

int32_t CudaDevice::set_marks(int rank, int64_t marks, ModuleStatus&) {
  if (marks_ != nullptr) marks_->set(static_cast<uint64_t>(marks), on(rank).stream);
  else ranks_[static_cast<size_t>(rank)]->num_marks = static_cast<unsigned>(marks);
  return 0;
}

int32_t CudaDevice::share_marks(std::byte* own, std::byte* const* others, int num_others, ModuleStatus& status) {
  on(0);
  return checked(marks_->open(own, others, num_others), "sharing marks", 0, status);
}

int32_t CudaDevice::ipc_handle(std::byte* memory, IpcHandle* out_handle, ModuleStatus& status) {
  static_assert(sizeof(cudaIpcMemHandle_t) <= sizeof(IpcHandle));
  return checked(cudaIpcGetMemHandle(reinterpret_cast<cudaIpcMemHandle_t*>(out_handle), memory), "sharing memory", 0, status);
}

std::byte* CudaDevice::ipc_open(int rank, const IpcHandle* handle, ModuleStatus& status) {
  on(rank);
  cudaIpcMemHandle_t other;
  std::memcpy(&other, handle, sizeof other);
  void* memory = nullptr;
  (void)checked(cudaIpcOpenMemHandle(&memory, other, cudaIpcMemLazyEnablePeerAccess), "another process's memory", rank, status);
  return static_cast<std::byte*>(memory);
}

// Where others join, one graph holds the work of all ranks: their marks become its edges, also between devices.
int32_t CudaDevice::begin_capture(int rank, ModuleStatus& status) {
  Rank& r = on(rank);
  if (checked(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeRelaxed), "beginning a capture", rank, status) < 0) return status.code;
  starts_late = true;
  if (!captures_together()) return 0;
  r.shares_capture = true;
  ++shared_captures;
  if (fork_ == nullptr && checked(cudaEventCreateWithFlags(&fork_, cudaEventDisableTiming), "an event", rank, status) < 0) return status.code;
  return checked(cudaEventRecord(fork_, r.stream), "beginning a capture", rank, status);
}

int32_t CudaDevice::join_capture(int rank, ModuleStatus& status) {
  const Turn turn;
  starts_late = true;
  return checked(cudaStreamWaitEvent(on(rank).stream, fork_, 0), "joining a capture", rank, status);
}

int32_t CudaDevice::end_capture(int rank, ModuleStatus& status) {
  Rank& r = on(rank);
  if (std::exchange(r.shares_capture, false)) --shared_captures;
  cudaGraph_t graph = nullptr;
  if (checked(cudaStreamEndCapture(r.stream, &graph), "ending a capture", rank, status) < 0) return status.code;
  cudaGraphExec_t ready = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&ready, graph, 0);
  (void)cudaGraphDestroy(graph);
  if (checked(error, "a captured step", rank, status) < 0) return status.code;
  r.captured.push_back(ready);
  return static_cast<int32_t>(r.captured.size()) - 1;
}

// One that an error has left open: nothing else can be done on the stream before it has ended.
void CudaDevice::abandon_capture(Rank& r) {
  if (std::exchange(r.shares_capture, false)) --shared_captures;
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(r.stream, &state) == cudaSuccess && state == cudaStreamCaptureStatusNone) return;
  cudaGraph_t graph = nullptr;
  (void)cudaStreamEndCapture(r.stream, &graph);
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  (void)cudaGetLastError();
}

int32_t CudaDevice::replay(int rank, int number, ModuleStatus& status) {
  Rank& r = on(rank);
  starts_late = true;
  return checked(cudaGraphLaunch(r.captured[static_cast<size_t>(number)], r.stream), "replaying a captured step", rank, status);
}

void CudaDevice::forget_captures(int rank) {
  Rank& r = on(rank);
  abandon_capture(r);
  for (cudaGraphExec_t graph : r.captured) (void)cudaGraphExecDestroy(graph);
  r.captured.clear();
}

// What was captured goes first: a communicator ends only when no graph refers to it any more.
void CudaDevice::give_up(int rank) {
  forget_captures(rank);
  nccl_->give_up(rank);
}

int32_t CudaDevice::prepare(ConnectionId* out_id, ModuleStatus& status) {
  for (size_t r = 0; r < ranks_.size(); ++r) give_up(static_cast<int>(r));
  on(0);
  return nccl_->prepare(out_id, status);
}

int32_t CudaDevice::idle(int rank, ModuleStatus& status) {
  Rank& r = on(rank);
  if (checked(cudaGetLastError(), "starting a kernel", rank, status) < 0) return status.code;
  if (const char* what = std::exchange(failed_op, nullptr); what != nullptr) return refuse(status, Code::kRankFailed, "CUDA, rank %d: %s was refused", rank, what);
  const cudaError_t error = cudaStreamQuery(r.stream);
  if (error == cudaErrorNotReady) {
    (void)cudaGetLastError();  // the runtime keeps it as an error of the thread; the next question would report it as a kernel's
    return 0;
  }
  if (checked(error, "the rank's work", rank, status) < 0) return status.code;
  if (nccl_ != nullptr && nccl_->exchanged(rank, status) < 0) return status.code;
  if (marks_ != nullptr && !marks_->waits()) return refuse(status, Code::kTimeout, "CUDA, rank %d: another rank failed, or its work did not end in time", rank);
  return 1;
}

}  // namespace moebius::cuda
