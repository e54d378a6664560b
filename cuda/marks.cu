#include "cuda/marks.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace moebius::cuda {
namespace {

constexpr size_t kPageBytes = 4096;

__global__ void mark_kernel(MarkFlags* own) {
  follow_previous();
  own->marks += 1;
  __threadfence_system();  // what kernels before this one have written, too
  store_release_system(&own->passed, own->marks);
}

__global__ void pass_kernel(const MarkFlags* own, OtherMarks others, uint64_t wait_ns, volatile uint32_t* stop_waiting) {
  // The next kernel starts when this one has ended: one that is held could take the place of what the other processes on this device need.
  await_previous();
  const auto i = static_cast<int>(threadIdx.x);
  if (i >= others.num) return;
  const uint64_t begin = global_timer_ns();
  for (unsigned turn = 1; load_acquire_system(&others.of[i]->passed) < own->marks; ++turn) {
    __nanosleep(100);
    if (turn % 64 != 0) continue;  // the word is the host's, and far
    if (global_timer_ns() - begin > wait_ns) *stop_waiting = 1;
    if (*stop_waiting != 0) return;
  }
}

__global__ void set_kernel(MarkFlags* own, uint64_t marks) {
  follow_previous();
  own->marks = marks;
  store_release_system(&own->passed, marks);
}

}  // namespace

SharedMarks::~SharedMarks() {
  if (pinned_) (void)cudaHostUnregister(stop_waiting_);
}

cudaError_t SharedMarks::open(std::byte* own, std::byte* const* others, int num_others) {
  if (num_others >= kMaxRanks) return cudaErrorInvalidValue;
  own_ = reinterpret_cast<MarkFlags*>(own);
  for (int i = 0; i < num_others; ++i) others_.of[i] = reinterpret_cast<const MarkFlags*>(others[i]);
  others_.num = num_others;
  const cudaError_t e = cudaHostRegister(stop_waiting_, kPageBytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  pinned_ = e == cudaSuccess;
  return pinned_ ? cudaHostGetDevicePointer(reinterpret_cast<void**>(&stop_on_device_), stop_waiting_, 0) : e;
}

void SharedMarks::mark(cudaStream_t stream) const { launch(mark_kernel, 1, 1, 0, stream, own_); }

void SharedMarks::pass(cudaStream_t stream) const {
  if (others_.num == 0) return;
  launch(pass_kernel, 1, kMaxRanks, 0, stream, own_, others_, wait_ns_, stop_on_device_);
  starts_late = true;  // an early start waits for what the kernel ahead has written, and this one has read what others wrote
}

void SharedMarks::set(uint64_t marks, cudaStream_t stream) const { launch(set_kernel, 1, 1, 0, stream, own_, marks); }

}  // namespace moebius::cuda
