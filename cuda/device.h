// The functions of a DeviceModule over CUDA: one stream a rank, in one process. Ranks read each other's memory (they share a device, or have one
// each with peer access), or exchange by NCCL.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <vector>

#include "cuda/marks.h"
#include "cuda/nccl.h"
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
  int32_t keep_blocks(int rank, ModuleStatus& status);
  int32_t copy_kept(int rank, int number, int64_t begin, int64_t end, ModuleStatus& status);
  int32_t mark(int rank, ModuleStatus& status);
  int32_t pass(int rank, ModuleStatus& status);
  int32_t set_marks(int rank, int64_t marks, ModuleStatus& status);
  int32_t begin_capture(int rank, ModuleStatus& status);
  int32_t join_capture(int rank, ModuleStatus& status);
  int32_t end_capture(int rank, ModuleStatus& status);
  int32_t replay(int rank, int number, ModuleStatus& status);
  void forget_captures(int rank);
  int32_t idle(int rank, ModuleStatus& status);
  int32_t share_marks(std::byte* own, std::byte* const* others, int num_others, ModuleStatus& status);
  int32_t ipc_handle(std::byte* memory, IpcHandle* out_handle, ModuleStatus& status);
  std::byte* ipc_open(int rank, const IpcHandle* handle, ModuleStatus& status);
  void ipc_close(std::byte* memory) { (void)cudaIpcCloseMemHandle(memory); }
  Exchange& nccl() const { return *nccl_; }
  void give_up(int rank);
  int32_t prepare(ConnectionId* out_id, ModuleStatus& status);
  Exchange& nccl_on(int rank) {
    on(rank);
    return *nccl_;
  }
  int32_t exchange(int rank, ModuleStatus& status) { return nccl_->exchange(rank, on(rank).stream, status); }

 private:
  struct Rank {
    int device = 0;
    cudaStream_t stream = nullptr;
    bool own_stream = true;
    bool reads_pageable = false;  // by itself (GH200, GB200, kernels with HMM)
    cudaEvent_t marks[2] = {};  // in turn: a rank may set its next mark while others still pass this one
    unsigned num_marks = 0;
    BlockCopies blocks;
    std::vector<KeptBlocks> kept;
    std::vector<cudaGraphExec_t> captured;
    bool shares_capture = false;  // it has begun one that others join
  };
  static void abandon_capture(Rank& rank);
  Rank& on(int rank);  // makes the rank's device the calling thread's
  int32_t enable_peer_access(const std::vector<int>& devices, ModuleStatus& status);

  bool captures_together() const { return nccl_ == nullptr && marks_ == nullptr; }

  std::vector<std::unique_ptr<Rank>> ranks_;
  std::unique_ptr<SharedMarks> marks_;       // or null: all ranks are here
  cudaEvent_t fork_ = nullptr;               // in rank 0's stream where a capture begins that others join
  std::unique_ptr<Exchange> nccl_;           // or null: ranks read each other's memory
};

}  // namespace moebius::cuda
