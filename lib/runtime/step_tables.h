// A step's plan as a rank's kernels read it: where the host's memory is the rank's, the plan's own arrays; elsewhere a copy in the
// rank's memory, with the page tables of the step's sequences and every pointer into it.
#pragma once

#include <cstdint>
#include <vector>

#include "lib/device/device.h"
#include "lib/runtime/step_plan.h"

namespace moebius {

// Arrays in the rank's memory.
struct StepView {
  const int32_t* tokens = nullptr;             // [rows]
  const int32_t* logit_rows = nullptr;         // [logit rows]
  const RowPlace* places[2] = {};              // [Layout][rows]
  const SequenceChunk* chunks[2] = {};         // [Layout][chunks]
};

// Where things lie in the block that is sent to a rank; all offsets are multiples of 16.
struct StepBlock {
  int64_t tokens = 0, logit_rows = 0, places[2] = {}, chunks[2] = {}, pages[2] = {}, bytes = 0;
};

class StepTables {
 public:
  // pages_per_sequence: the longest page table. Nothing is allocated after construction.
  StepTables(Device& device, int rank, int64_t max_rows, int64_t max_chunks, int64_t pages_per_sequence, int page_tokens);
  // Of a rank, beside the host's staging.
  static int64_t bytes(int64_t max_rows, int64_t max_chunks, int64_t pages_per_sequence);

  // By the rank's first thread; the plan stays as it is until the rank is idle.
  const StepView& send(const StepPlan& plan);
  const StepView& view() const { return view_; }

 private:
  Device& device_;
  int rank_, page_tokens_;
  StepView view_;
  DeviceBuffer memory_;
  std::vector<std::byte> staging_;
};

// Writes the block of `plan` to `out`, with pointers as they are once it lies at `base`. out null: only where things lie.
StepBlock lay_out_step(const StepPlan& plan, int page_tokens, const std::byte* base, std::byte* out);

}  // namespace moebius
