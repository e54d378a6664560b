// Many variants of one cluster and one load, by the step model alone.
#pragma once

#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "examples/plan/study.h"

namespace moebius::plan {

// Ranks × memory rate × link rate × link latency × skew × context × requests. all: every row, else where layouts cross. The workload is
// simulated for the two variants of the cluster's own ranks whose crossovers are the lowest and the highest.
nlohmann::ordered_json sweep(const Model& model, const Cluster& cluster, const Settings& settings, const std::optional<Workload>& workload, bool all);
std::string table_of_sweep(const nlohmann::ordered_json& result);

}  // namespace moebius::plan
