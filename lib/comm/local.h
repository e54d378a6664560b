// The communicator of ranks in one process: exchanges read the peers' buffers. Ranks whose work is queued are ordered by marks of their
// queues beside the barriers of their threads (Device::mark).
#pragma once

#include <vector>

#include "lib/comm/communicator.h"
#include "lib/comm/world.h"
#include "lib/device/device.h"

namespace moebius {

// Waits for all that a rank has queued, with World::wait_until's deadline.
inline void wait_until_idle(World& world, Device& device, int rank) {
  world.wait_until([&] { return device.idle(rank); });
}

// One rank's buffers that peers read; indexed by the step's row.
struct ExchangeBuffers {
  bf16* x = nullptr;            // [max_rows, hidden]
  int32_t* expert_ids = nullptr;   // [max_rows, top_k]
  float* expert_weights = nullptr; // [max_rows, top_k]
  int64_t* sums[kNumAccumulators] = {};        // [max_rows, hidden], by Accumulator
  uint8_t* flags[kNumAccumulators] = {};       // [max_rows]
};

class LocalCommunicator final : public Communicator {
 public:
  // `buffers`: [world.ranks()], owned by the caller, filled before the first exchange.
  LocalCommunicator(World& world, Device& device, int rank, const std::vector<ExchangeBuffers>& buffers, int64_t hidden, int64_t top_k);

  int rank() const override { return rank_; }
  int size() const override { return world_.ranks(); }
  void rank_barrier() override { world_.rank_barrier(rank_); }
  PartialSums all_reduce(Accumulator which) override;
  PartialSums local_sum(Accumulator which) override;
  void dispatch(const Range* homes, const Lane& lane) override;
  PartialSums combine(Accumulator which) override { return all_reduce(which); }
  void gather_rows(const Range* homes, const Lane& lane) override;
  void meet();  // what every rank did before comes before what any does afterwards

 private:
  template <class T>
  void copy_rows(T* to, const T* from, Range rows, int64_t width, const Lane& lane);
  PartialSums view(Accumulator which, int first, int num) const;

  World& world_;
  Device& device_;
  int rank_;
  const std::vector<ExchangeBuffers>& buffers_;
  int64_t hidden_, top_k_;
  std::vector<const int64_t*> sums_[kNumAccumulators];   // [ranks]
  std::vector<const uint8_t*> flags_[kNumAccumulators];  // [ranks]
};

}  // namespace moebius
