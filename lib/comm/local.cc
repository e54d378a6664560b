#include "lib/comm/local.h"

namespace moebius {

LocalCommunicator::LocalCommunicator(World& world, Device& device, int rank, const std::vector<ExchangeBuffers>& buffers, int64_t hidden,
                                     int64_t top_k)
    : world_(world), device_(device), rank_(rank), buffers_(buffers), hidden_(hidden), top_k_(top_k) {
  for (int which = 0; which < kNumAccumulators; ++which)
    for (const ExchangeBuffers& b : buffers) {
      sums_[which].push_back(b.sums[which]);
      flags_[which].push_back(b.flags[which]);
    }
}

void LocalCommunicator::meet() {
  device_.mark(rank_);
  world_.world_barrier();
  device_.pass(rank_);
}

PartialSums LocalCommunicator::view(Accumulator which, int first, int num) const {
  const int w = static_cast<int>(which);
  return {num, sums_[w].data() + first, flags_[w].data() + first};
}

PartialSums LocalCommunicator::all_reduce(Accumulator which) {
  meet();
  return view(which, 0, size());
}

PartialSums LocalCommunicator::local_sum(Accumulator which) {
  rank_barrier();
  return view(which, rank_, 1);
}

// Copies this thread's share of rows [rows.begin, rows.end) of a [max_rows, width] buffer.
template <class T>
void LocalCommunicator::copy_rows(T* to, const T* from, Range rows, int64_t width, const Lane& lane) {
  const Range share = share_of(rows.size(), lane.thread, lane.num_threads);
  if (share.empty()) return;
  const int64_t begin = (rows.begin + share.begin) * width;
  device_.copy(rank_, to + begin, from + begin, share.size() * width * static_cast<int64_t>(sizeof(T)));
}

void LocalCommunicator::gather_rows(const Range* homes, const Lane& lane) {
  meet();
  for (int r = 0; r < size(); ++r)
    if (r != rank_) copy_rows(buffers_[rank_].x, buffers_[r].x, homes[r], hidden_, lane);
  rank_barrier();
}

void LocalCommunicator::dispatch(const Range* homes, const Lane& lane) {
  meet();
  const ExchangeBuffers& mine = buffers_[rank_];
  for (int r = 0; r < size(); ++r) {
    if (r == rank_) continue;
    copy_rows(mine.x, buffers_[r].x, homes[r], hidden_, lane);
    copy_rows(mine.expert_ids, buffers_[r].expert_ids, homes[r], top_k_, lane);
    copy_rows(mine.expert_weights, buffers_[r].expert_weights, homes[r], top_k_, lane);
  }
  rank_barrier();
}

}  // namespace moebius
