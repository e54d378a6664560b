// The communicator of ranks in one process: exchanges read the peers' buffers. Ranks whose work is queued are ordered by marks of their
// queues beside the barriers of their threads (Device::mark).
#pragma once

#include <vector>

#include "lib/comm/communicator.h"
#include "lib/comm/exchange_buffers.h"
#include "lib/comm/world.h"
#include "lib/device/device.h"

namespace moebius {

class LocalCommunicator final : public Communicator {
 public:
  // `buffers`: [world.ranks()], owned by the caller, filled before the first exchange.
  LocalCommunicator(World& world, Device& device, int rank, const std::vector<ExchangeBuffers>& buffers,
                    const ExchangeWidths& widths);

  int rank() const override { return rank_; }
  int size() const override { return world_.ranks(); }
  void rank_barrier() override { world_.rank_barrier(rank_); }
  PartialSums all_reduce(Accumulator which, int64_t num_rows) override;
  PartialSums local_sum(Accumulator which) override;
  void dispatch(const Range* homes, const Lane& lane) override;
  PartialSums combine(Accumulator which, const Range* homes) override;
  void gather_rows(const Range* homes, const Lane& lane) override;
  const float* const* collect_logits(int64_t num_rows) override;
  void release_logits() override { meet(); }  // nobody overwrites its share before all have read it

 private:
  void fetch(const Range* homes, bool choices, const Lane& lane);
  void meet();  // what every rank did before comes before what any does afterwards
  template <class T>
  void copy_rows(T* to, int from_rank, const T* from, Range rows, int64_t width, const Lane& lane);
  PartialSums view(Accumulator which, int first, int num) const;

  World& world_;
  Device& device_;
  int rank_;
  const std::vector<ExchangeBuffers>& buffers_;
  ExchangeWidths widths_;
  std::vector<const int64_t*> sums_[kNumAccumulators];   // [ranks]
  std::vector<const uint8_t*> flags_[kNumAccumulators];  // [ranks]
  std::vector<bf16*> x_;                                 // [ranks] what is fetched from
  std::vector<int32_t*> ids_;
  std::vector<float*> weights_;
  std::vector<const float*> logits_;                     // [ranks]
};

}  // namespace moebius
