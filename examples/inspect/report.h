// A memory plan as JSON: what moebius-inspect prints of a checkpoint and moebius-plan of a model on a cluster.
#pragma once

#include <nlohmann/json.hpp>

#include "examples/inspect/plan.h"

namespace moebius::inspect {

inline constexpr Layout kLayouts[] = {Layout::kTp, Layout::kEp};

// Each kind and size: count, bytes_each, bytes.
nlohmann::ordered_json slices_by_kind(const SliceTable& table);
// What each rank holds. Moving: owned in one layout only.
nlohmann::ordered_json rank_rows(const ArenaPlan& arena, int page_tokens);
// As moebius_engine_memory; `ranks` as rank_rows gives them.
nlohmann::ordered_json memory_report(const MemoryPlan& plan, const nlohmann::ordered_json& ranks);
// Weights, and KV for each token of a request, averaged over homes.
nlohmann::ordered_json switch_row(const MemoryPlan& plan, Layout to, int page_tokens);

}  // namespace moebius::inspect
