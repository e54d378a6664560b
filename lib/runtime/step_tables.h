// A step's plan as a rank's kernels read it: where the host's memory is the rank's, the plan's own arrays; elsewhere a copy in the
// rank's memory, with the page tables of the step's sequences and every pointer into it.
#pragma once

#include <cstdint>
#include <vector>

#include "lib/device/device.h"
#include "lib/device/pinned.h"
#include "lib/runtime/step_plan.h"

namespace moebius {

// Arrays in the rank's memory.
struct StepView {
  const int32_t* tokens = nullptr;             // [rows]
  const int32_t* logit_rows = nullptr;         // [logit rows]
  const TokenChoice* choices = nullptr;        // [logit rows]; not where the host's memory is the rank's
  const RowPlace* places[2] = {};              // [Layout][rows]
  const SequenceChunk* chunks[2] = {};         // [Layout][chunks]
};

struct StepLimits {
  int64_t rows = 0, chunks = 0;    // of the largest shape
  int64_t sequences = 0;           // of a step
  int64_t pages_per_sequence = 0;  // of the longest page table
  int page_tokens = 0;
};

// The block that is sent to a rank: arrays at the same offsets in every step, then the page tables, one after the other.
class StepBlock {
 public:
  explicit StepBlock(const StepLimits& limits);
  int64_t bytes() const { return bytes_; }
  StepView view(const std::byte* base) const;
  // Writes the plan to `out` with pointers as they are once the block lies at `base`; returns how many bytes are in use. Each home's
  // rows and chunks stand where `shape` has them; what is left of the shape's are rows of token −1 and chunks of no rows.
  int64_t write(const StepPlan& plan, const StepShape& shape, const std::byte* base, std::byte* out) const;

 private:
  StepLimits limits_;
  int64_t tokens_ = 0, logit_rows_ = 0, choices_ = 0, places_[2] = {}, chunks_[2] = {}, pages_ = 0, bytes_ = 0;  // offsets
};

// Of one rank.
class StepTables {
 public:
  StepTables(Device& device, int rank, const StepLimits& limits);
  // In the rank's memory.
  static int64_t bytes(const Device& device, const StepLimits& limits) { return device.host_memory() ? 0 : StepBlock(limits).bytes(); }

  // By the rank's first thread; the plan stays as it is until the rank is idle. The shape is the plan's own where the host's memory is
  // the rank's. Allocates nothing.
  void send(const StepPlan& plan, const StepShape& shape);
  const StepView& view() const { return view_; }

 private:
  Device& device_;
  int rank_;
  StepBlock block_;
  DeviceBuffer memory_;
  PinnedBuffer staging_;
  std::vector<int32_t> logit_rows_;  // host: the plan has them among other things
  StepView view_;
};

}  // namespace moebius
