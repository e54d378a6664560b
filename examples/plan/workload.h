// What is asked of a cluster: a preset by name, or a JSON file with the same keys.
#pragma once

#include <string>

#include "examples/plan/model.h"
#include "examples/rollout/load.h"

namespace moebius::plan {

struct Workload {
  std::string name, text;  // in words
  moebius_examples::LoadOptions load;
  double mean_context() const;  // tokens of a request half-way, by the medians
};

// Throws kNotFound, kCorruptModel with file and key.
Workload read_workload(const std::string& name_or_file);
// Throws kInvalidArgument where its longest request is longer than the model's context: an engine would refuse that one.
void check_context(const Workload& workload, const Model& model);
// One replica's part of it.
moebius_examples::Load load_of(const Workload& workload, int replicas);

}  // namespace moebius::plan
