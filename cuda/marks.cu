#include "cuda/marks.h"

#include <cstring>

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace moebius::cuda {
namespace {

constexpr int kMaxOthers = 64;
constexpr size_t kPageBytes = 4096;

struct Others {
  const MarkFlags* of[kMaxOthers];
};

__global__ void mark_kernel(MarkFlags* own) {
  own->marks += 1;
  __threadfence_system();  // what kernels before this one have written, too
  store_release_system(&own->passed, own->marks);
}

__global__ void pass_kernel(const MarkFlags* own, Others others, int num, uint64_t wait_ns, volatile uint32_t* stop_waiting) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i >= num) return;
  const uint64_t begin = global_timer_ns();
  while (load_acquire_system(&others.of[i]->passed) < own->marks) {
    if (global_timer_ns() - begin > wait_ns) *stop_waiting = 1;
    if (*stop_waiting != 0) return;
    __nanosleep(100);
  }
}

__global__ void set_kernel(MarkFlags* own, uint64_t marks) {
  own->marks = marks;
  store_release_system(&own->passed, marks);
}

}  // namespace

SharedMarks::~SharedMarks() {
  for (MarkFlags* other : others_) (void)cudaIpcCloseMemHandle(other);
  if (pinned_) (void)cudaHostUnregister(stop_waiting_);
}

cudaError_t SharedMarks::open(std::byte* memory) {
  own_ = reinterpret_cast<MarkFlags*>(memory);
  const cudaError_t e = cudaHostRegister(stop_waiting_, kPageBytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  pinned_ = e == cudaSuccess;
  return e;
}

cudaError_t SharedMarks::import(const IpcHandle& handle) {
  if (others_.size() == kMaxOthers) return cudaErrorInvalidValue;
  cudaIpcMemHandle_t other;
  std::memcpy(&other, &handle, sizeof other);
  void* memory = nullptr;
  if (const cudaError_t e = cudaIpcOpenMemHandle(&memory, other, cudaIpcMemLazyEnablePeerAccess); e != cudaSuccess) return e;
  others_.push_back(static_cast<MarkFlags*>(memory));
  return cudaSuccess;
}

void SharedMarks::mark(cudaStream_t stream) const { launch(mark_kernel, 1, 1, 0, stream, own_); }

void SharedMarks::pass(cudaStream_t stream) const {
  Others others{};
  for (size_t i = 0; i < others_.size(); ++i) others.of[i] = others_[i];
  if (!others_.empty()) launch(pass_kernel, 1, kMaxOthers, 0, stream, own_, others, static_cast<int>(others_.size()), wait_ns_, stop_waiting_);
}

void SharedMarks::set(uint64_t marks, cudaStream_t stream) const { launch(set_kernel, 1, 1, 0, stream, own_, marks); }

}  // namespace moebius::cuda
