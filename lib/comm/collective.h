// The communicator of ranks that do not read each other's memory: exchanges go by a device's Collectives, in the order of the ranks' queues.
// Sums are added on the way, integers as integers: in any order the same bits.
#pragma once

#include <vector>

#include "lib/comm/communicator.h"
#include "lib/comm/exchange_buffers.h"
#include "lib/comm/world.h"
#include "lib/device/device.h"

namespace moebius {

class CollectiveCommunicator final : public Communicator {
 public:
  // `mine`: this rank's buffers. A rank has one thread.
  CollectiveCommunicator(World& world, Device& device, int rank, const ExchangeBuffers& mine, const ExchangeWidths& widths);

  int rank() const override { return rank_; }
  int size() const override { return world_.ranks(); }
  void rank_barrier() override {}
  PartialSums all_reduce(Accumulator which, int64_t num_rows) override;
  PartialSums local_sum(Accumulator which) override;
  void dispatch(const Range* homes, const Lane& lane) override;
  PartialSums combine(Accumulator which, const Range* homes) override;
  void gather_rows(const Range* homes, const Lane& lane) override;
  const float* const* collect_logits(int64_t num_rows) override;
  void release_logits() override {}  // they are copies

 private:
  template <class T>
  void swap_rows(T* rows, const Range* homes, int64_t width);
  void exchange();
  Element element() const { return widths_.plain_sums ? Element::kFloat : Element::kInt64; }

  World& world_;
  Collectives& collectives_;
  int rank_;
  ExchangeBuffers mine_;
  ExchangeWidths widths_;
  const int64_t* sums_[kNumAccumulators];
  const uint8_t* flags_[kNumAccumulators];
  std::vector<const float*> logits_;  // [ranks]
};

}  // namespace moebius
