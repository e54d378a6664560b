// The order of ranks that have a process each, by flags in their devices' memory: a mark raises the rank's own, a pass waits until those of all
// others are as high. Both are kernels of one block in the rank's stream, so a captured step holds them too, and each rank captures its own.
// (Where ranks are in one process, events order them: device.cu.)
//
// A pass spins on its device. A mark that it waits for is queued already, in another process's stream (Device::mark); ranks of different
// processes on one device take turns there.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "lib/base/time.h"
#include "lib/device/module.h"
#include "lib/layout/owners.h"

namespace moebius::cuda {

struct MarkFlags {
  uint64_t marks;                // set so far
  alignas(128) uint64_t passed;  // the same, where others look: all that was queued before so many marks is done
};
static_assert(sizeof(MarkFlags) <= kMarkBytes);

// As kernels have them.
struct OtherMarks {
  const MarkFlags* of[kMaxRanks];
  int num = 0;
};

class SharedMarks {
 public:
  SharedMarks(double wait_ms, uint32_t* stop_waiting) : wait_ns_(static_cast<uint64_t>(clamped_ms(wait_ms).count())), stop_waiting_(stop_waiting) {}
  ~SharedMarks();
  SharedMarks(const SharedMarks&) = delete;
  SharedMarks& operator=(const SharedMarks&) = delete;

  // As DeviceModule::share_marks has it.
  cudaError_t open(std::byte* own, std::byte* const* others, int num_others);

  void mark(cudaStream_t stream) const;
  void pass(cudaStream_t stream) const;
  // From now on so many have been set. No rank is at work, and none is told of fewer than it has set.
  void set(uint64_t marks, cudaStream_t stream) const;
  bool waits() const { return *static_cast<volatile uint32_t*>(stop_waiting_) == 0; }

 private:
  uint64_t wait_ns_;
  MarkFlags* own_ = nullptr;
  OtherMarks others_;
  uint32_t* stop_waiting_;
  uint32_t* stop_on_device_ = nullptr;  // the same word
  bool pinned_ = false;
};

}  // namespace moebius::cuda
