// One rank's activation buffers, sized once for the largest step and carved from one allocation.
#pragma once

#include "lib/comm/exchange_buffers.h"
#include "lib/device/device.h"
#include "lib/moe/layer_backend.h"

namespace moebius {

struct WorkspaceShape {
  int64_t max_rows = 0, max_logit_rows = 0;
  int64_t hidden = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, choices = 0;
  int64_t max_act_bytes = 0;      // rows·choices × padded neurons that a rank may have, over layers and layouts
  int64_t max_pairs = 0, num_experts = 0, all_experts = 0;  // of a layer, without and with shared ones
  int64_t logit_columns = 0;      // of its share of the vocabulary, where it keeps logits itself (not in the host's memory)
  int64_t collected_rows = 0;     // logit rows with all shares that it collects from ranks whose memory it does not read
  int64_t mlp_addends = 0, attention_addends = 0;
  int threads = 1;
  size_t scratch_bytes = 0;       // per thread
  bool plain_sums = false;
  bool two_residuals = false;     // RankBuffers::h_other
};

// Walks the buffers in a fixed order: once without memory to learn the size, once to place them.
class Workspace {
 public:
  Workspace(Device& device, int rank, const WorkspaceShape& shape) : memory_(device, rank, lay_out(shape, nullptr)) {
    lay_out(shape, memory_.data());
  }
  static int64_t bytes(const WorkspaceShape& shape) {
    Workspace probe;
    return probe.lay_out(shape, nullptr);
  }

  RankBuffers buffers;
  float* logits() const { return logits_; }             // [max_logit_rows, logit_columns]
  int32_t* chosen() const { return chosen_; }           // [max_logit_rows] tokens that the device chose
  std::byte* scratch(int thread) const { return scratch_ + static_cast<size_t>(thread) * scratch_stride_; }
  ExchangeBuffers exchange() const {
    ExchangeBuffers e{buffers.x, buffers.expert_ids, buffers.expert_weights, {}, {}, logits_, shares_};
    for (int i = 0; i < kNumAccumulators; ++i) e.sums[i] = buffers.sums[i].sum, e.flags[i] = buffers.sums[i].flags;
    return e;
  }

 private:
  Workspace() = default;
  int64_t lay_out(const WorkspaceShape& s, std::byte* base);

  DeviceBuffer memory_;
  float* logits_ = nullptr;
  float* shares_ = nullptr;
  int32_t* chosen_ = nullptr;
  std::byte* scratch_ = nullptr;
  size_t scratch_stride_ = 0;
};

}  // namespace moebius
