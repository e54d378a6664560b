#include "examples/plan/published.h"

#include <algorithm>

#include <fmt/format.h>

#include "examples/plan/shipped.h"
#include "examples/plan/study.h"

namespace moebius::plan {
namespace {

using json = nlohmann::ordered_json;

json row(const char* group, const std::string& figure, const char* unit, double published, double simulated, bool fitted = false,
         const std::string& note = "") {
  return {{"group", group},         {"figure", figure},
          {"unit", unit},           {"published", published},
          {"simulated", simulated}, {"error", simulated / published - 1},
          {"fitted", fitted},       {"note", note}};
}

// Weights of a rank in one layer.
double layer_mib(const ArenaPlan& arena, Layout layout, bool experts) {
  double bytes = 0;
  for (size_t i = 0; i < arena.table().layer(0).size(); ++i) {
    const Slice& s = arena.table().layer(0)[i];
    if (arena.slice_offset(0, layout, 0, static_cast<int>(i)) >= 0 && (s.kind == SliceKind::kExpertCut) == experts)
      bytes += static_cast<double>(s.bytes);
  }
  return bytes / (1 << 20);
}

// The published system sums in bf16 and sends rows to the ranks of their experts alone, by NCCL's point-to-point messages: 8.4 µs and 3.4 for each
// of seven peers by NCCL's tuning table (Simple protocol).
Cluster as_published(const char* name) {
  Cluster c = read_cluster(name);
  c.sum_bytes = 2;
  c.all_to_all_s = 32.2e-6;
  return c;
}

void add_qwen3_235b(json& rows) {
  const char* const group = "Qwen3-235B on 8×H200";
  constexpr int64_t kArena = int64_t{130} << 30;
  const Model model = read_model("qwen3-235b-a22b");
  const inspect::MemoryPlan plan = inspect::plan_slices(model.slices(0), 8, model.kv_slice_bytes(16), kArena, 0);
  const ArenaPlan& arena = plan.arena;
  rows.push_back(row(group, "experts of a layer, EP", "MiB", 576, layer_mib(arena, Layout::kEp, true)));
  rows.push_back(row(group, "attention of a layer, EP", "MiB", 136, layer_mib(arena, Layout::kEp, false)));
  rows.push_back(row(group, "experts of a layer, TP", "MiB", 576, layer_mib(arena, Layout::kTp, true)));
  rows.push_back(row(group, "attention of a layer, TP", "MiB", 18, layer_mib(arena, Layout::kTp, false)));
  rows.push_back(row(group, "KV tokens of a rank, EP, arena of 130 GiB", "tokens", 356873, static_cast<double>(arena.ep_pages()[0] * 16)));
  rows.push_back(row(group, "KV tokens, TP, arena of 130 GiB", "tokens", 1576152, static_cast<double>(arena.tp_pages() * 16)));
  rows.push_back(row(group, "memory for both layouts", "%", 2.4, 100.0 * static_cast<double>(arena.lead(0)) / static_cast<double>(kArena), false,
                     "the lead alone"));

  const Cluster cluster = as_published("8xh200");
  const SwitchModel switches(plan, cluster, 16);
  rows.push_back(row(group, "weights, EP → TP", "ms", 152, 1e3 * switches.seconds(Layout::kTp, 0), true, "copy efficiency of every NVLink cluster"));
  rows.push_back(row(group, "weights, TP → EP", "ms", 152, 1e3 * switches.seconds(Layout::kEp, 0), false,
                     "attention comes back too; the direction of 152 ms is not published"));
  const double full = static_cast<double>(arena.tp_pages() * 16);
  rows.push_back(row(group, "whole switch, least", "ms", 215, 1e3 * switches.seconds(Layout::kTp, full / 4), false,
                     "KV in flight is not published: a quarter full"));
  rows.push_back(
      row(group, "whole switch, most", "ms", 434, 1e3 * switches.seconds(Layout::kTp, full), false, "KV in flight is not published: full"));

  Settings settings;
  const Prediction prediction(model, cluster, settings, kDefaultSkew);
  const Workload rollout = read_workload("rollout");
  const json served = study(prediction, rollout)["workload"];
  const std::string note =
      fmt::format("the published lengths are not known: {}; best schedule in hindsight {:.2f}", rollout.text, served["hindsight_gain"].get<double>());
  rows.push_back(row(group, "rollout, gain over the better static, least", "×", 1.16, served["gain"], false, note));
  rows.push_back(row(group, "rollout, gain over the better static, most", "×", 1.25, served["gain"]));
}

void add_qwen3_30b(json& rows) {
  const char* const group = "Qwen3-30B on 8×A100";
  Settings settings;
  const Prediction prediction(read_model("qwen3-30b-a3b"), as_published("8xa100"), settings, kDefaultSkew);
  for (double context : {256.0, 1024.0})  // not published: two of them
    for (const auto& [requests, ratio] : {std::pair{8.0, 0.42}, {64.0, 0.49}, {512.0, 0.76}, {1024.0, 1.0}, {2048.0, 1.5}})
      rows.push_back(row(group, fmt::format("EP ÷ TP throughput, {:.0f} requests", requests), "×", ratio,
                         prediction.tokens_per_second(Layout::kEp, requests, context) / prediction.tokens_per_second(Layout::kTp, requests, context),
                         false, fmt::format("contexts are not published: {:.0f} tokens", context)));
}

void add_gpt_oss(json& rows) {
  const char* const group = "GPT-OSS-120B on 8×A100";
  const Cluster cluster = as_published("8xa100");
  for (bool quantised : {true, false}) {
    json config = json::parse(read_shipped(kModels, "gpt-oss-120b", "model"));
    if (!quantised) config.erase("quantization_config");
    const Model model = parse_model(config.dump(), "gpt-oss-120b");
    const inspect::MemoryPlan plan = inspect::plan_slices(model.slices(0), 8, model.kv_slice_bytes(16), cluster.memory_bytes, 0);
    rows.push_back(row(group, fmt::format("weights by direct copies, experts in {}", quantised ? "MXFP4" : "bf16"), "ms", 130,
                       1e3 * SwitchModel(plan, cluster, 16).seconds(Layout::kTp, 0), false,
                       "which of the two is not published; an A100 computes in bf16"));
  }
}

}  // namespace

json published() {
  json rows = json::array();
  add_qwen3_235b(rows);
  add_qwen3_30b(rows);
  add_gpt_oss(rows);
  return {{"what", "published"}, {"simulated", true}, {"rows", rows}};
}

std::string table_of_published(const json& result) {
  std::string out = "SIMULATED beside published figures\n", group;
  for (const json& r : result["rows"]) {
    if (r["group"] != group) out += "\n" + (group = r["group"].get<std::string>()) + "\n";
    out += fmt::format("  {:46} {:>12.6g} {:6} simulated {:>12.6g}  {:+7.1f} %  {}{}\n", r["figure"].get<std::string>(), r["published"].get<double>(),
                       r["unit"].get<std::string>(), r["simulated"].get<double>(), 100 * r["error"].get<double>(),
                       r["fitted"].get<bool>() ? "FITTED " : "", r["note"].get<std::string>());
  }
  return out;
}

}  // namespace moebius::plan
