// Collectives by NCCL, which is loaded when they are asked for: from MOEBIUS_NCCL_LIBRARY, else libnccl.so.2 as the loader finds it (the one
// that the host's process has already, if any). One communicator a rank, and each rank on a device of its own.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "lib/device/module.h"

namespace moebius::cuda {

// The functions of Collectives; the rank's device is the calling thread's.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual int32_t prepare(ConnectionId* out_id, ModuleStatus& status) = 0;
  virtual int32_t connect(int rank, const ConnectionId& id, ModuleStatus& status) = 0;
  virtual void all_reduce(int rank, void* data, int64_t count, Element element) = 0;
  virtual void reduce(int rank, void* data, int64_t count, Element element, int root) = 0;
  virtual void send(int rank, const void* data, int64_t bytes, int to) = 0;
  virtual void receive(int rank, void* data, int64_t bytes, int from) = 0;
  virtual int32_t exchange(int rank, cudaStream_t stream, ModuleStatus& status) = 0;
  virtual int32_t exchanged(int rank, ModuleStatus& status) = 0;
  virtual void give_up(int rank) = 0;
};

// Null, and `status` says why. The host's communicators (options.comms) are used as they are and left alone at the end, unless a rank gives up.
std::unique_ptr<Exchange> open_nccl(const ModuleOptions& options, ModuleStatus& status);

}  // namespace moebius::cuda
