// A lane's scratch memory: counters, all 0 when no kernel runs, then what an op lays out as it likes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "lib/device/ops.h"

namespace moebius::cuda {

constexpr int kCounters = 4096;
constexpr size_t kCounterBytes = kCounters * sizeof(unsigned);

inline unsigned* counters_of(const Lane& lane) { return reinterpret_cast<unsigned*>(lane.scratch); }
template <class T>
T* scratch_of(const Lane& lane) {
  return reinterpret_cast<T*>(lane.scratch + kCounterBytes);
}

// True for the last of `num` that call it with the same counter, which then sees what the others wrote before they did.
__device__ __forceinline__ bool comes_last(unsigned* counter, int num) {
  __threadfence();
  const bool last = atomicInc(counter, static_cast<unsigned>(num) - 1) == static_cast<unsigned>(num) - 1;  // which sets it to 0 again
  if (last) __threadfence();
  return last;
}

}  // namespace moebius::cuda
