// What one rank's layer code asks of the other ranks. All threads of every rank call each function, with the same step.
//
// Sums are handed back as a list of partial sums to be added as integers (the reading op does it): in any order, the same
// bits. A rank may overwrite a buffer it handed out only after the next world-wide exchange; accumulators used in turn
// (attention, MLP) satisfy this.
#pragma once

#include <cstdint>

#include "lib/device/ops.h"

namespace moebius {

// [num] accumulators and flags of the same rows, to be summed; or, where whole_rows is above 0, each row whole in one of them
// (AddNormArgs::whole_rows).
struct PartialSums {
  int num = 0;
  int64_t whole_rows = 0;
  const int64_t* const* sums = nullptr;
  const uint8_t* const* flags = nullptr;
};

// kLocal is never handed to peers: a dense MLP in EP has no exchange that would order peers' reads of kMlp before its writes.
enum class Accumulator : int { kAttention = 0, kMlp = 1, kLocal = 2 };
inline constexpr int kNumAccumulators = 3;

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Orders what this rank's threads wrote before what they read.
  virtual void rank_barrier() = 0;
  // TP: every rank's partial sums of rows [0, num_rows).
  virtual PartialSums all_reduce(Accumulator which, int64_t num_rows) = 0;
  // EP, inside a rank: this rank's own sum, complete as it is.
  virtual PartialSums local_sum(Accumulator which) = 0;
  // EP: brings the normed rows and routing choices of every home to this rank. homes[r] = rows of rank r.
  virtual void dispatch(const Range* homes, const Lane& lane) = 0;
  // EP: the partial sums for this rank's own rows, from every rank that ran experts for them. homes as above.
  virtual PartialSums combine(Accumulator which, const Range* homes) = 0;
  // Brings the final rows of every home to this rank (LM head shares).
  virtual void gather_rows(const Range* homes, const Lane& lane) = 0;
  // Logits that lie with the ranks that computed them, by shares of the vocabulary. The result has an entry for each rank: its share of row
  // share_of(num_rows, rank(), size()).begin + i at i · the row's stride. They are left alone until release_logits(). By the rank's one thread.
  virtual const float* const* collect_logits(int64_t num_rows) = 0;
  virtual void release_logits() = 0;
};

}  // namespace moebius
