#include "lib/comm/collective.h"

#include "lib/comm/waits.h"

namespace moebius {

CollectiveCommunicator::CollectiveCommunicator(World& world, Device& device, int rank, const ExchangeBuffers& mine, const ExchangeWidths& widths)
    : world_(world), collectives_(*device.collectives()), rank_(rank), mine_(mine), widths_(widths), logits_(static_cast<size_t>(world.ranks())) {
  for (int which = 0; which < kNumAccumulators; ++which) sums_[which] = mine.sums[which], flags_[which] = mine.flags[which];
}

void CollectiveCommunicator::exchange() { moebius::exchange(world_, collectives_, rank_); }

PartialSums CollectiveCommunicator::local_sum(Accumulator which) {
  const int w = static_cast<int>(which);
  return {1, 0, sums_ + w, flags_ + w};
}

PartialSums CollectiveCommunicator::all_reduce(Accumulator which, int64_t num_rows) {
  const int w = static_cast<int>(which);
  collectives_.all_reduce(rank_, mine_.sums[w], num_rows * widths_.hidden, element());
  collectives_.all_reduce(rank_, mine_.flags[w], num_rows, Element::kUint8);
  exchange();
  return local_sum(which);
}

// Each home's sums go to it. (Homes differ in their rows: a reduce for each, all at once.)
PartialSums CollectiveCommunicator::combine(Accumulator which, const Range* homes) {
  const int w = static_cast<int>(which);
  for (int r = 0; r < size(); ++r) {
    const int64_t begin = homes[r].begin * widths_.hidden;
    void* const sums = widths_.plain_sums ? static_cast<void*>(reinterpret_cast<float*>(mine_.sums[w]) + begin) : mine_.sums[w] + begin;
    collectives_.reduce(rank_, sums, homes[r].size() * widths_.hidden, element(), r);
    collectives_.reduce(rank_, mine_.flags[w] + homes[r].begin, homes[r].size(), Element::kUint8, r);
  }
  exchange();
  return local_sum(which);
}

// Sends this home's rows of a [max_rows, width] buffer to all others, and receives theirs.
template <class T>
void CollectiveCommunicator::swap_rows(T* rows, const Range* homes, int64_t width) {
  const auto at = [&](int r) { return rows + homes[r].begin * width; };
  const auto bytes = [&](int r) { return homes[r].size() * width * static_cast<int64_t>(sizeof(T)); };
  for (int r = 0; r < size(); ++r) {
    if (r == rank_) continue;
    collectives_.send(rank_, at(rank_), bytes(rank_), r);
    collectives_.receive(rank_, at(r), bytes(r), r);
  }
}

void CollectiveCommunicator::dispatch(const Range* homes, const Lane&) {
  swap_rows(mine_.x, homes, widths_.hidden);
  swap_rows(mine_.expert_ids, homes, widths_.choices);
  swap_rows(mine_.expert_weights, homes, widths_.choices);
  exchange();
}

void CollectiveCommunicator::gather_rows(const Range* homes, const Lane&) {
  swap_rows(mine_.x, homes, widths_.hidden);
  exchange();
}

const float* const* CollectiveCommunicator::collect_logits(int64_t num_rows) {
  const int64_t stride = widths_.logit_columns;
  const auto bytes = [&](const Range& rows) { return rows.size() * stride * static_cast<int64_t>(sizeof(float)); };
  const Range own = share_of(num_rows, rank_, size());
  for (int r = 0; r < size(); ++r) {
    const Range theirs = share_of(num_rows, r, size());
    float* const place = mine_.shares + r * div_up(num_rows, size()) * stride;
    logits_[static_cast<size_t>(r)] = r == rank_ ? mine_.logits + own.begin * stride : place;
    if (r == rank_) continue;
    collectives_.send(rank_, mine_.logits + theirs.begin * stride, bytes(theirs), r);
    collectives_.receive(rank_, place, bytes(own), r);
  }
  exchange();
  return logits_.data();
}

}  // namespace moebius
