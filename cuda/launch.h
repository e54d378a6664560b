// Starting kernels. (tests/cuda/emulation stands in for CUDA's header where kernels are tested on the host.)
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <utility>

namespace moebius::cuda {

// What an op could not start that CUDA's runtime knows nothing of; Device::idle asks.
inline thread_local const char* failed_op = nullptr;

// Ways that a host may turn off, to look for a fault and to measure what they gain: NAME=0 in the environment.
inline bool is_turned_off(const char* name) {
  const char* const value = std::getenv(name);
  return value != nullptr && std::strcmp(value, "0") == 0;
}

// Whether the kernel may start while the one ahead of it in the stream still runs (programmatic dependent launch, decision 0014): where its code
// is made for GPUs from Hopper on, so that it waits by itself, and the driver captures such starts.
#ifndef MOEBIUS_EMULATED
inline bool starts_early(const void* kernel) {
  static const bool possible = [] {
    int driver = 0;
    return !is_turned_off("MOEBIUS_CUDA_OVERLAP") && CUDART_VERSION >= 12030 && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
  }();
  thread_local std::unordered_map<const void*, bool> known;
  const auto [found, added] = known.try_emplace(kernel, false);
  if (cudaFuncAttributes code; added && possible && cudaFuncGetAttributes(&code, kernel) == cudaSuccess) found->second = code.ptxVersion >= 90;
  return found->second;
}
#endif

// Set by whoever queues what is none of our kernels (copies too), or makes a stream wait for another: the thread's next kernel starts when all
// ahead has ended. CUDA allows early starts between kernels only.
inline thread_local bool starts_late = false;

// Unasked a kernel gets 48 KiB together with its static shared memory: more is not started, and by occupancy no block of it fits.
template <class... P>
bool allow_shared(void (*kernel)(P...), size_t shared_bytes) {
  return shared_bytes == 0 || cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)) == cudaSuccess;
}

// Queues a kernel on a stream (Lane::queue); nothing when the grid is empty. An error stays with the host's thread (cudaGetLastError),
// which Device::idle asks. Each thread of a kernel calls await_previous before it touches memory that another kernel writes, and in any case
// before it ends: what comes after the kernel takes it that what was ahead of it has ended too.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* queue, const A&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || !allow_shared(kernel, shared_bytes)) return;
#ifdef MOEBIUS_EMULATED
  emulation::launch(grid, block, shared_bytes, static_cast<cudaStream_t>(queue), [=] {
    emulation::start_thread();
    kernel(args...);
    emulation::end_thread();
  });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = !std::exchange(starts_late, false) && starts_early(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  (void)cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ T* dynamic_shared() {
#ifdef MOEBIUS_EMULATED
  return reinterpret_cast<T*>(emulation::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
#endif
}

// Blocks that fill the calling thread's device `per_multiprocessor` times over: for kernels that walk their work.
inline unsigned resident_blocks(int per_multiprocessor) {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return static_cast<unsigned>(count * per_multiprocessor);
}
// As many as it holds of a kernel: more would do their share of the work when the others have done theirs.
template <class... P>
unsigned resident_blocks(void (*kernel)(P...), int threads, size_t shared_bytes = 0) {
  thread_local std::unordered_map<const void*, int> known;  // a multiprocessor's
  int& blocks = known[reinterpret_cast<const void*>(kernel)];
  if (blocks == 0 && (!allow_shared(kernel, shared_bytes) ||
                      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) != cudaSuccess || blocks < 1))
    blocks = 1;
  return resident_blocks(blocks);
}

}  // namespace moebius::cuda
