#include "lib/runtime/step_tables.h"

#include <cstring>

#include "lib/base/error.h"

namespace moebius {
namespace {

int64_t place_array(StepBlock& block, int64_t bytes) {
  const int64_t at = block.bytes;
  block.bytes += round_up(bytes, 16);
  return at;
}

StepBlock block_of(int64_t rows, int64_t logit_rows, int64_t chunks, const int64_t (&pages)[2]) {
  StepBlock b;
  b.tokens = place_array(b, rows * static_cast<int64_t>(sizeof(int32_t)));
  b.logit_rows = place_array(b, logit_rows * static_cast<int64_t>(sizeof(int32_t)));
  for (int layout : {0, 1}) {
    b.places[layout] = place_array(b, rows * static_cast<int64_t>(sizeof(RowPlace)));
    b.chunks[layout] = place_array(b, chunks * static_cast<int64_t>(sizeof(SequenceChunk)));
    b.pages[layout] = place_array(b, pages[layout] * static_cast<int64_t>(sizeof(int32_t)));
  }
  return b;
}

// Pages that a chunk's kernels may look up: those of the tokens before its last row and of that row itself.
int64_t pages_of(const SequenceChunk& chunk, int page_tokens) {
  return chunk.pages == nullptr ? 0 : div_up(int64_t{chunk.first_position} + chunk.num_rows, page_tokens);
}

template <class T>
const T* at(const std::byte* base, int64_t offset) {
  return reinterpret_cast<const T*>(base + offset);
}

}  // namespace

StepBlock lay_out_step(const StepPlan& plan, int page_tokens, const std::byte* base, std::byte* out) {
  int64_t pages[2] = {};
  for (int layout : {0, 1})
    for (const SequenceChunk& chunk : plan.attention[layout]) pages[layout] += pages_of(chunk, page_tokens);
  const StepBlock block = block_of(plan.num_rows(), static_cast<int64_t>(plan.logit_rows.size()), static_cast<int64_t>(plan.chunks.size()), pages);
  if (out == nullptr) return block;

  std::memcpy(out + block.tokens, plan.tokens.data(), plan.tokens.size() * sizeof(int32_t));
  for (size_t i = 0; i < plan.logit_rows.size(); ++i) reinterpret_cast<int32_t*>(out + block.logit_rows)[i] = plan.logit_rows[i].row;
  for (int layout : {0, 1}) {
    auto* places = reinterpret_cast<RowPlace*>(out + block.places[layout]);
    auto* chunks = reinterpret_cast<SequenceChunk*>(out + block.chunks[layout]);
    int64_t next = block.pages[layout];
    for (size_t c = 0; c < plan.attention[layout].size(); ++c) {
      SequenceChunk chunk = plan.attention[layout][c];
      const int64_t bytes = pages_of(chunk, page_tokens) * static_cast<int64_t>(sizeof(int32_t));
      if (bytes > 0) {
        std::memcpy(out + next, chunk.pages, static_cast<size_t>(bytes));
        chunk.pages = at<int32_t>(base, next);
      }
      next += bytes;
      chunks[c] = chunk;
      for (int32_t row = chunk.row_begin; row < chunk.row_begin + chunk.num_rows; ++row)
        places[row] = {plan.places[layout][static_cast<size_t>(row)].position, chunk.pages};
    }
  }
  return block;
}

StepTables::StepTables(Device& device, int rank, int64_t max_rows, int64_t max_chunks, int64_t pages_per_sequence, int page_tokens)
    : device_(device), rank_(rank), page_tokens_(page_tokens) {
  if (device.host_memory()) {
    staging_.resize(static_cast<size_t>(max_rows) * sizeof(int32_t));  // rows of the logits, which the plan has among other things
    return;
  }
  const int64_t size = bytes(max_rows, max_chunks, pages_per_sequence);
  memory_ = DeviceBuffer(device, rank, size);
  staging_.resize(static_cast<size_t>(size));
}

int64_t StepTables::bytes(int64_t max_rows, int64_t max_chunks, int64_t pages_per_sequence) {
  const int64_t chunks = std::min(max_rows, max_chunks), pages[2] = {chunks * pages_per_sequence, chunks * pages_per_sequence};
  return block_of(max_rows, max_rows, chunks, pages).bytes;
}

const StepView& StepTables::send(const StepPlan& plan) {
  if (device_.host_memory()) {
    auto* rows = reinterpret_cast<int32_t*>(staging_.data());
    for (size_t i = 0; i < plan.logit_rows.size(); ++i) rows[i] = plan.logit_rows[i].row;
    view_ = {plan.tokens.data(), rows, {plan.places[0].data(), plan.places[1].data()}, {plan.attention[0].data(), plan.attention[1].data()}};
    return view_;
  }
  const StepBlock block = lay_out_step(plan, page_tokens_, memory_.data(), nullptr);
  MOEBIUS_ASSERT(block.bytes <= memory_.bytes());
  lay_out_step(plan, page_tokens_, memory_.data(), staging_.data());
  device_.write(rank_, memory_.data(), staging_.data(), block.bytes);
  const std::byte* base = memory_.data();
  view_.tokens = at<int32_t>(base, block.tokens);
  view_.logit_rows = at<int32_t>(base, block.logit_rows);
  for (int layout : {0, 1}) {
    view_.places[layout] = at<RowPlace>(base, block.places[layout]);
    view_.chunks[layout] = at<SequenceChunk>(base, block.chunks[layout]);
  }
  return view_;
}

}  // namespace moebius
