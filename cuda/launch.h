// Starting kernels. (tests/cuda/emulation stands in for CUDA's header where kernels are tested on the host.)
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <unordered_map>

namespace moebius::cuda {

// What an op could not start that CUDA's runtime knows nothing of; Device::idle asks.
inline thread_local const char* failed_op = nullptr;

// Queues a kernel on a stream (Lane::queue); nothing when the grid is empty. An error stays with the host's thread (cudaGetLastError),
// which Device::idle asks.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* queue, const A&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef MOEBIUS_EMULATED
  emulation::launch(grid, block, shared_bytes, static_cast<cudaStream_t>(queue), [=] { kernel(args...); });
#else
  // Unasked it gets 48 KiB together with its static shared memory.
  if (shared_bytes > 0 && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)) != cudaSuccess)
    return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue);
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
// As many as it holds of a kernel without dynamic shared memory: more would do their share of the work when the others have done theirs.
template <class... P>
unsigned resident_blocks(void (*kernel)(P...), int threads) {
  thread_local std::unordered_map<const void*, int> known;  // a multiprocessor's
  int& blocks = known[reinterpret_cast<const void*>(kernel)];
  if (blocks == 0 && (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0) != cudaSuccess || blocks < 1)) blocks = 1;
  return resident_blocks(blocks);
}

}  // namespace moebius::cuda
