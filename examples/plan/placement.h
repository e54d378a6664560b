// What fits, and what a switch costs: the engine's own slices, owners, arena and transfer plans for a model on a cluster's ranks.
#pragma once

#include <optional>
#include <string>

#include "examples/inspect/plan.h"
#include "examples/plan/cluster.h"
#include "examples/plan/model.h"
#include "lib/runtime/regret.h"

namespace moebius::plan {

struct Settings {
  int ranks = 0;              // of a world; 0: the cluster's
  int slices_per_expert = 0;  // 0: the default rule; also raised to what so many ranks need
  int page_tokens = 16, chunk_tokens = 8192, max_batch = 4096;
  double memory_share = 0.9;  // of a device's memory that is planned with; the rest is the driver's, the communicator's and captured steps'
  int64_t memory_bytes = 0;   // instead of this share
};

struct Placement {
  int ranks = 1, replicas = 1;
  EngineConfig engine;
  bool fits = false;
  std::string why_not;
  inspect::MemoryPlan memory;  // with one page of KV where it does not fit
  int64_t least_memory_bytes = 0;
};

// Ranks that share the model, and how many times the cluster has room for them. Throws kInvalidArgument where P is not possible.
Placement place(const Model& model, const Cluster& cluster, const Settings& settings);
// slices_per_expert that so many ranks need: the setting, the default rule's, or the fewest above it that divide every MLP.
int slices_for(const Model& model, int ranks, int setting);

// Seconds that a switch takes at once: what the rank that gets most gets, over its link, and a fence for each layer.
class SwitchModel {
 public:
  SwitchModel(const inspect::MemoryPlan& memory, const Cluster& cluster, int page_tokens);

  // kv_tokens: of all requests, on homes evenly.
  double seconds(Layout to, double kv_tokens) const { return seconds_of(weight_bytes(to) + kv_tokens * kv_bytes_per_token(to)); }
  double seconds_of(double most_bytes) const { return fences_s_ + most_bytes / rate_; }
  // Of the rank that gets most.
  double weight_bytes(Layout to) const { return weight_bytes_[static_cast<size_t>(to)]; }
  double kv_bytes_per_token(Layout to) const { return kv_bytes_[static_cast<size_t>(to)]; }

 private:
  double weight_bytes_[2] = {}, kv_bytes_[2] = {};
  double rate_, fences_s_;
};

}  // namespace moebius::plan
