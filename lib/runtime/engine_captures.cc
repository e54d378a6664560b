// Steps that were captured when the engine was made, and how a step takes one.
#include <algorithm>

#include "lib/comm/waits.h"
#include "lib/runtime/engine_impl.h"

namespace moebius {

// Ranks can exchange; a connection that replaces one whose rank failed needs the steps captured again.
void Engine::Impl::prepare_ranks() {
  join_ranks(world_, *device_);
  const Collectives* collectives = device_->collectives();
  const int connection = collectives != nullptr ? collectives->connection() : 1;
  if (connection == captured_connection_) return;
  capture_steps();
  captured_connection_ = connection;
}

// Captured are decode steps in pure layouts for 1, 2, 4, … rows (in EP rows of each home, in TP of all). Nothing is computed: weights may be in either
// layout, and what the rank's tables hold does not matter.
void Engine::Impl::capture_steps() {
  for (auto& steps : captured_) steps.clear();
  if (!config_.capture_steps || !device_->can_capture()) return;
  for (int r = 0; r < config_.ranks; ++r) device_->forget_captures(r);
  for (Layout layout : {Layout::kTp, Layout::kEp}) {
    const int homes = layout == Layout::kTp ? 1 : config_.ranks;
    for (int64_t rows = 1;; rows *= 2) {
      CapturedStep step;
      step.rows_of_home = std::min<int64_t>(rows, config_.max_batch);
      step.shape.num_rows = step.shape.num_chunks = homes * step.rows_of_home;
      if (step.shape.num_rows > shape_.max_rows) break;
      step.shape.max_tokens = config_.max_context;
      step.shape.seam = layout == Layout::kTp ? model_.shape.num_layers() : 0;
      for (int64_t h = 0; h < config_.ranks && layout == Layout::kEp; ++h)
        step.shape.homes.push_back({h * step.rows_of_home, (h + 1) * step.rows_of_home});
      step.shape.chunks_of_home = step.shape.homes;
      const StepShape& shape = step.shape;
      int* const number = &step.number;
      try {
        world_.run_long([this, &shape, number](int rank, int) { capture(shape, rank, number); });
      } catch (...) {  // also what a rank has begun and not ended
        for (int r = 0; r < config_.ranks; ++r) device_->forget_captures(r);
        throw;
      }
      captured_[static_cast<int>(layout)].push_back(std::move(step));
      if (rows >= config_.max_batch) break;
    }
  }
}

void Engine::Impl::capture(const StepShape& shape, int rank, int* number) {
  const bool alone = !device_->captures_together();
  if (rank == 0 || alone) device_->begin_capture(rank);
  world_.world_barrier();
  if (rank != 0 && !alone) device_->join_capture(rank);
  RankContext& context = executors_[rank]->context();
  const RankContext served = context;
  context.tokens = tables_[rank].view().tokens;
  context.routes = nullptr;  // whatever the last step kept
  executors_[rank]->forward(shape, tables_[rank].view(), {0, 1, workspaces_[rank]->scratch(0), device_->queue(rank)});
  context = served;
  if (!alone) device_->mark(rank);
  world_.world_barrier();
  if (rank != 0 && !alone) return;
  if (!alone) device_->pass(0);
  const int captured = device_->end_capture(rank);
  if (rank == 0) *number = captured;
}

// The smallest captured shape that holds the step, or the step's own.
const StepShape& Engine::Impl::choose_shape() {
  captured_now_ = nullptr;
  const StepShape& own = plan_.shape;
  const int layers = model_.shape.num_layers();
  if (own.num_chunks != own.num_rows || (own.seam > 0 && own.seam < layers)) return own;  // a prompt's rows, or a seam inside
  if (executors_[0]->context().routes != nullptr) return own;
  const bool is_tp = own.seam == layers;
  int64_t most = is_tp ? own.num_rows : 0;
  for (const Range& home : own.homes) most = std::max(most, home.size());
  for (const CapturedStep& step : captured_[is_tp ? 0 : 1])
    if (step.rows_of_home >= most) {
      captured_now_ = &step;
      return step.shape;
    }
  return own;
}

// Queues the captured work: of all ranks by rank 0, after what each has queued and before what it queues next, or each rank's by itself.
void Engine::Impl::replay(int rank) {
  if (!device_->captures_together()) {
    device_->replay(rank, captured_now_->number);
    return;
  }
  const auto meet = [&] {
    device_->mark(rank);
    world_.world_barrier();
  };
  meet();
  if (rank == 0) {
    device_->pass(0);
    device_->replay(0, captured_now_->number);
  }
  meet();
  device_->pass(rank);
}

}  // namespace moebius
