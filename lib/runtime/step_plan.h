// What one step computes: plain data that every rank reads. Rows are ordered by home, so that an EP layer's rows are one range.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "lib/device/ops.h"
#include "lib/layout/types.h"

namespace moebius {

struct Sequence;

// What kernels are started for: that of a plan, or of a captured step, which has room for rows and chunks that a plan lacks.
struct StepShape {
  int64_t num_rows = 0, num_chunks = 0;
  int64_t max_tokens = 0;             // that a row may see
  int32_t seam = 0;                   // layers [0, seam) run in TP
  std::vector<Range> homes;           // [ranks] rows of each home; of a captured TP step none: rows stand as the plan has them
  std::vector<Range> chunks_of_home;  // [ranks] likewise

  // Where this shape has a home's rows and chunks, less where `plan` has them.
  int64_t row_shift(const StepShape& plan, size_t home) const { return homes.empty() ? 0 : homes[home].begin - plan.homes[home].begin; }
  int64_t chunk_shift(const StepShape& plan, size_t home) const {
    return homes.empty() ? 0 : chunks_of_home[home].begin - plan.chunks_of_home[home].begin;
  }
};

// A sequence's rows of this step.
struct ScheduledChunk {
  Sequence* sequence = nullptr;
  int32_t row_begin = 0;
  int32_t num_rows = 0;
  bool samples = false;  // its last row is the sequence's last token: a new token is chosen from it
};

// A row whose logits are wanted: to sample from, to keep, or both.
struct LogitRow {
  int32_t row = 0;
  int32_t chunk = 0;
  int64_t position = 0;
  bool sample = false;
  bool on_device = false;  // the device chooses the token
};

// Capacities are fixed at construction; a step only changes sizes.
struct StepPlan {
  StepPlan(int64_t max_rows, int64_t max_chunks, int ranks) {
    shape.homes.resize(ranks);
    shape.chunks_of_home.resize(ranks);
    tokens.reserve(max_rows);
    logit_rows.reserve(max_rows);
    choices.reserve(max_rows);
    chunks.reserve(max_chunks);
    for (int layout : {0, 1}) {
      places[layout].reserve(max_rows);
      attention[layout].reserve(max_chunks);
    }
  }

  std::vector<int32_t> tokens;                            // [rows]
  std::vector<ScheduledChunk> chunks;                     // ordered by home, then by schedule
  std::array<std::vector<RowPlace>, 2> places;            // [Layout][rows]
  std::array<std::vector<SequenceChunk>, 2> attention;    // [Layout][chunks]
  std::vector<LogitRow> logit_rows;
  std::vector<TokenChoice> choices;                       // [logit rows] where the device chooses, else empty
  StepShape shape;
  int32_t decode_rows = 0, prefill_rows = 0;

  int64_t num_rows() const { return static_cast<int64_t>(tokens.size()); }
};

}  // namespace moebius
