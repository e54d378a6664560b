// The functions of a DeviceModule over CUDA: one stream a rank; ranks share a device or have one each, in one process with peer access.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <vector>

#include "cuda/reshard.h"
#include "lib/device/module.h"

namespace moebius::cuda {

class CudaDevice {
 public:
  // Null, and `status` says why.
  static std::unique_ptr<CudaDevice> open(const ModuleOptions& options, ModuleStatus& status);
  ~CudaDevice();

  int place(int rank) const { return ranks_[static_cast<size_t>(rank)]->device; }
  int32_t memory(int rank, int64_t* total_bytes, int64_t* free_bytes, ModuleStatus& status);
  std::byte* allocate(int rank, int64_t bytes, ModuleStatus& status);
  void release(int rank, std::byte* memory);
  void* queue(int rank) const { return ranks_[static_cast<size_t>(rank)]->stream; }
  int32_t write(int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status);
  int32_t read(int rank, void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height, ModuleStatus& status);
  int32_t pin(void* host, int64_t bytes, ModuleStatus& status);
  int32_t copy(int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status);
  int32_t copy_block(int rank, void* to, const void* from, int64_t bytes, ModuleStatus& status);
  int32_t finish_blocks(int rank, ModuleStatus& status);
  int32_t mark(int rank, ModuleStatus& status);
  int32_t pass(int rank, ModuleStatus& status);
  int32_t begin_capture(ModuleStatus& status);
  int32_t join_capture(int rank, ModuleStatus& status);
  int32_t end_capture(ModuleStatus& status);
  int32_t replay(int number, ModuleStatus& status);
  int32_t idle(int rank, ModuleStatus& status);

 private:
  struct Rank {
    int device = 0;
    cudaStream_t stream = nullptr;
    cudaEvent_t marks[2] = {};  // in turn: a rank may set its next mark while others still pass this one
    unsigned num_marks = 0;
    BlockCopies blocks;
  };
  Rank& on(int rank);  // makes the rank's device the calling thread's

  std::vector<std::unique_ptr<Rank>> ranks_;
  cudaEvent_t fork_ = nullptr;              // in rank 0's stream where a capture begins
  std::vector<cudaGraphExec_t> captured_;
};

}  // namespace moebius::cuda
