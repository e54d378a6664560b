#include "lib/runtime/step_tables.h"

#include <algorithm>
#include <cstring>

#include "lib/base/error.h"

namespace moebius {
namespace {

// Pages that a chunk's kernels may look up: those of the tokens before its last row and of that row itself.
int64_t pages_of(const SequenceChunk& chunk, int page_tokens) {
  return chunk.pages == nullptr ? 0 : div_up(int64_t{chunk.first_position} + chunk.num_rows, page_tokens);
}

template <class T>
T* at(std::byte* base, int64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}
template <class T>
const T* at(const std::byte* base, int64_t offset) {
  return reinterpret_cast<const T*>(base + offset);
}

}  // namespace

StepBlock::StepBlock(const StepLimits& limits) : limits_(limits) {
  const auto place = [this](int64_t count, size_t size) {
    return std::exchange(bytes_, bytes_ + round_up(count * static_cast<int64_t>(size), 16));
  };
  tokens_ = place(limits.rows, sizeof(int32_t));
  logit_rows_ = place(limits.rows, sizeof(int32_t));
  choices_ = place(limits.rows, sizeof(TokenChoice));
  for (int layout : {0, 1}) {
    places_[layout] = place(limits.rows, sizeof(RowPlace));
    chunks_[layout] = place(limits.chunks, sizeof(SequenceChunk));
  }
  pages_ = place(2 * limits.sequences * limits.pages_per_sequence, sizeof(int32_t));
}

StepView StepBlock::view(const std::byte* base) const {
  StepView v;
  v.tokens = at<int32_t>(base, tokens_);
  v.logit_rows = at<int32_t>(base, logit_rows_);
  v.choices = at<TokenChoice>(base, choices_);
  for (int layout : {0, 1}) {
    v.places[layout] = at<RowPlace>(base, places_[layout]);
    v.chunks[layout] = at<SequenceChunk>(base, chunks_[layout]);
  }
  return v;
}

int64_t StepBlock::write(const StepPlan& plan, const StepShape& shape, const std::byte* base, std::byte* out) const {
  MOEBIUS_ASSERT(shape.num_rows <= limits_.rows && shape.num_chunks <= limits_.chunks && static_cast<int64_t>(plan.chunks.size()) <= limits_.sequences);
  int32_t* const tokens = at<int32_t>(out, tokens_);
  if (shape.num_rows > plan.num_rows() || shape.num_chunks > plan.shape.num_chunks) {
    std::fill_n(tokens, shape.num_rows, -1);
    for (int layout : {0, 1}) {
      std::fill_n(at<RowPlace>(out, places_[layout]), shape.num_rows, RowPlace{});
      std::fill_n(at<SequenceChunk>(out, chunks_[layout]), shape.num_chunks, SequenceChunk{});
    }
  }
  std::copy(plan.choices.begin(), plan.choices.end(), at<TokenChoice>(out, choices_));
  int64_t next = pages_;
  size_t logit = 0;
  for (size_t h = 0; h < plan.shape.homes.size(); ++h) {
    const Range from = plan.shape.homes[h], chunks = plan.shape.chunks_of_home[h];
    const int64_t row_shift = shape.row_shift(plan.shape, h), chunk_shift = shape.chunk_shift(plan.shape, h);
    MOEBIUS_ASSERT(from.end + row_shift <= (shape.homes.empty() ? shape.num_rows : shape.homes[h].end) &&
                   chunks.end + chunk_shift <= (shape.homes.empty() ? shape.num_chunks : shape.chunks_of_home[h].end));
    std::copy_n(plan.tokens.begin() + from.begin, from.size(), tokens + from.begin + row_shift);
    for (; logit < plan.logit_rows.size() && plan.logit_rows[logit].row < from.end; ++logit)
      at<int32_t>(out, logit_rows_)[logit] = static_cast<int32_t>(plan.logit_rows[logit].row + row_shift);
    for (int layout : {0, 1})
      for (int64_t c = chunks.begin; c < chunks.end; ++c) {
        SequenceChunk chunk = plan.attention[layout][static_cast<size_t>(c)];
        const int64_t bytes = pages_of(chunk, limits_.page_tokens) * static_cast<int64_t>(sizeof(int32_t));
        MOEBIUS_ASSERT(next + bytes <= bytes_);
        if (bytes > 0) {
          std::memcpy(out + next, chunk.pages, static_cast<size_t>(bytes));
          chunk.pages = at<int32_t>(base, next);
        }
        next += bytes;
        for (int32_t row = chunk.row_begin; row < chunk.row_begin + chunk.num_rows; ++row)
          at<RowPlace>(out, places_[layout])[row + row_shift] = {plan.places[layout][static_cast<size_t>(row)].position, chunk.pages};
        chunk.row_begin += static_cast<int32_t>(row_shift);
        at<SequenceChunk>(out, chunks_[layout])[c + chunk_shift] = chunk;
      }
  }
  return next;
}

StepTables::StepTables(Device& device, int rank, const StepLimits& limits)
    : device_(device), rank_(rank), block_(limits), memory_(device, rank, bytes(device, limits)) {
  if (device.host_memory()) {
    logit_rows_.resize(static_cast<size_t>(limits.rows));
    return;
  }
  staging_ = PinnedBuffer(device, block_.bytes());
  view_ = block_.view(memory_.data());
}

void StepTables::send(const StepPlan& plan, const StepShape& shape) {
  if (!device_.host_memory()) {
    const int64_t bytes = block_.write(plan, shape, memory_.data(), staging_.data());
    device_.write(rank_, memory_.data(), staging_.data(), bytes);
    return;
  }
  MOEBIUS_ASSERT(shape.num_rows == plan.num_rows());
  for (size_t i = 0; i < plan.logit_rows.size(); ++i) logit_rows_[i] = plan.logit_rows[i].row;
  view_ = {plan.tokens.data(), logit_rows_.data(), nullptr, {plan.places[0].data(), plan.places[1].data()},
           {plan.attention[0].data(), plan.attention[1].data()}};
}

}  // namespace moebius
