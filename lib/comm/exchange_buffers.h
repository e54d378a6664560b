// A rank's buffers that others read or are sent; indexed by the step's row.
#pragma once

#include <cstdint>

#include "lib/comm/communicator.h"

namespace moebius {

struct ExchangeBuffers {
  bf16* x = nullptr;               // [max_rows, hidden]
  int32_t* expert_ids = nullptr;   // [max_rows, choices]
  float* expert_weights = nullptr; // [max_rows, choices]
  int64_t* sums[kNumAccumulators] = {};  // [max_rows, hidden], by Accumulator
  uint8_t* flags[kNumAccumulators] = {}; // [max_rows]
  float* logits = nullptr;         // [max_logit_rows, logit_columns] its share of the vocabulary; null in the host's memory
  float* shares = nullptr;         // [ranks][share of max_logit_rows][logit_columns] others' logits of its rows; null where it reads them
};

// Elements of a row, what the sums are, and from how many bytes of them on they are added in two shots.
struct ExchangeWidths {
  int64_t hidden = 0, choices = 0, logit_columns = 0;
  bool plain_sums = false;  // floats
  int64_t two_shot_bytes = 0;
};

}  // namespace moebius
