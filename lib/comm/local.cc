#include "lib/comm/local.h"

namespace moebius {

LocalCommunicator::LocalCommunicator(World& world, Device& device, int rank, const std::vector<ExchangeBuffers>& buffers,
                                     const ExchangeWidths& widths)
    : world_(world), device_(device), rank_(rank), buffers_(buffers), widths_(widths), logits_(buffers.size()) {
  for (const ExchangeBuffers& b : buffers) {
    for (int which = 0; which < kNumAccumulators; ++which) {
      sums_[which].push_back(b.sums[which]);
      flags_[which].push_back(b.flags[which]);
    }
    x_.push_back(b.x);
    ids_.push_back(b.expert_ids);
    weights_.push_back(b.expert_weights);
  }
}

void LocalCommunicator::meet() {
  device_.mark(rank_);
  world_.world_barrier();
  device_.pass(rank_);
}

PartialSums LocalCommunicator::view(Accumulator which, int first, int num) const {
  const int w = static_cast<int>(which);
  return {num, 0, sums_[w].data() + first, flags_[w].data() + first};
}

// In one shot every rank reads all partial sums; in two each adds up its share of the rows first, and all read those: 2 · (P − 1) ÷ P of the
// sums' bytes instead of P − 1 times, for one more meeting.
PartialSums LocalCommunicator::all_reduce(Accumulator which, int64_t num_rows) {
  PartialSums all = combine(which, nullptr);
  const int64_t bytes = num_rows * widths_.hidden * static_cast<int64_t>(widths_.plain_sums ? sizeof(float) : sizeof(int64_t));
  if (device_.ops().add_partials == nullptr || size() < 3 || bytes < widths_.two_shot_bytes) return all;
  device_.ops().add_partials({share_of(num_rows, rank_, size()), widths_.hidden, size(), rank_, all.sums, all.flags, widths_.plain_sums},
                             {0, 1, nullptr, device_.queue(rank_)});
  meet();
  all.whole_rows = num_rows;
  return all;
}

PartialSums LocalCommunicator::combine(Accumulator which, const Range*) {
  meet();
  return view(which, 0, size());
}

PartialSums LocalCommunicator::local_sum(Accumulator which) {
  rank_barrier();
  return view(which, rank_, 1);
}

// Copies this thread's share of rows [rows.begin, rows.end) of a [max_rows, width] buffer.
template <class T>
void LocalCommunicator::copy_rows(T* to, int from_rank, const T* from, Range rows, int64_t width, const Lane& lane) {
  const Range share = share_of(rows.size(), lane.thread, lane.num_threads);
  if (share.empty()) return;
  const int64_t begin = (rows.begin + share.begin) * width;
  device_.copy(rank_, to + begin, from_rank, from + begin, share.size() * width * static_cast<int64_t>(sizeof(T)));
}

void LocalCommunicator::gather_rows(const Range* homes, const Lane& lane) { fetch(homes, false, lane); }
void LocalCommunicator::dispatch(const Range* homes, const Lane& lane) { fetch(homes, true, lane); }

void LocalCommunicator::fetch(const Range* homes, bool choices, const Lane& lane) {
  meet();
  if (const Ops& ops = device_.ops(); ops.fetch_rows != nullptr) {
    ops.fetch_rows({size(), rank_, homes, widths_.hidden, widths_.choices, x_.data(), choices ? ids_.data() : nullptr, choices ? weights_.data() : nullptr}, lane);
    return;
  }
  const ExchangeBuffers& mine = buffers_[rank_];
  for (int r = 0; r < size(); ++r) {
    if (r == rank_) continue;
    copy_rows(mine.x, r, buffers_[r].x, homes[r], widths_.hidden, lane);
    if (!choices) continue;
    copy_rows(mine.expert_ids, r, buffers_[r].expert_ids, homes[r], widths_.choices, lane);
    copy_rows(mine.expert_weights, r, buffers_[r].expert_weights, homes[r], widths_.choices, lane);
  }
  rank_barrier();
}

const float* const* LocalCommunicator::collect_logits(int64_t num_rows) {
  meet();
  const int64_t first = share_of(num_rows, rank_, size()).begin * widths_.logit_columns;
  for (size_t r = 0; r < buffers_.size(); ++r) logits_[r] = buffers_[r].logits + first;
  return logits_.data();
}

}  // namespace moebius
