// What the engine tells its host, in the order it happened. Of fixed size: a step that emits events allocates nothing.
#pragma once

#include <array>
#include <cstdint>

#include "lib/base/fixed_text.h"
#include "lib/layout/types.h"
#include "lib/runtime/sampling_params.h"

namespace moebius {

enum class EventType : int32_t {
  kArrived = 1,         // the request entered the queue
  kToken = 2,           // one more token of a request
  kFinished = 3,        // final; finish_reason says why
  kPreempted = 4,       // its KV was given up; it will be recomputed
  kCancelled = 5,       // a cancel took effect; kFinished (abort) follows
  kSwitchStarted = 6,
  kSeam = 7,            // the seam moved to `seam`
  kSwitchFinished = 8,
  kSwitchRefused = 9,   // nothing was changed; `reason` says by how much it does not fit
  kRolledBack = 10,     // a failure moved the seam back
  kDecision = 11,       // a policy decided; `reason` is its record
};

enum class FinishReason : int32_t { kNone = 0, kStop = 1, kLength = 2, kAbort = 3, kError = 4 };

struct TokenLogprob {
  int32_t token = -1;
  float logprob = 0;
};

// Holds a decision's record (some 250 bytes), what failed before it (60), and the text of a refusal (150), with room for longer
// numbers; as much as moebius_event's reason.
using Reason = FixedText<511>;

// What a sample took, and when (CLOCK_MONOTONIC, ns; 0: never).
struct RequestUsage {
  int32_t prompt_tokens = 0, cached_tokens = 0;  // cached: of the prompt, found in the prefix cache when first scheduled
  int32_t generated_tokens = 0, preemptions = 0;
  int64_t queued_ns = 0, scheduled_ns = 0, first_token_ns = 0;
};

struct Event {
  EventType type = EventType::kToken;
  uint64_t step = 0;            // the step before or in which it happened
  uint64_t request = 0;         // engine's number of the request, 0 where none
  uint64_t user_data = 0;       // the request's
  int64_t time_ns = 0;          // when it was emitted, CLOCK_MONOTONIC
  int32_t sample = 0;           // of its n
  int32_t token = -1;           // kToken
  float logprob = 0;            // kToken with logprobs
  int32_t num_top = 0;          // entries of `top`
  std::array<TokenLogprob, kMaxTopLogprobs> top{};
  FinishReason finish_reason = FinishReason::kNone;  // kFinished; of a kToken that is the last one, kStop or kLength
  Layout from = Layout::kTp, to = Layout::kTp;
  int32_t seam = 0;             // layers [0, seam) in TP
  int64_t bytes = 0;            // written by the switch (weights and KV, all ranks)
  int64_t bytes_changed = 0;    // of these, to a new owner
  double seconds = 0;
  RequestUsage usage;           // kFinished
  Reason reason;                // rare events have one
};

}  // namespace moebius
