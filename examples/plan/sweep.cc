#include "examples/plan/sweep.h"

#include <algorithm>
#include <chrono>
#include <map>

#include <fmt/format.h>

#include "lib/base/error.h"

namespace moebius::plan {
namespace {

using json = nlohmann::ordered_json;

constexpr double kMemory[] = {0.5, 1, 2}, kLink[] = {0.25, 0.5, 1, 2}, kLatency[] = {0.5, 1, 2}, kSkew[] = {0, 0.5},
                 kContext[] = {256, 1024, 4096, 16384};

struct Variant {
  int ranks = 1;
  double memory = 1, link = 1, latency = 1, skew = 0, context = 0;
};

Cluster changed(Cluster c, const Variant& v) {
  c.memory_bandwidth *= v.memory;
  for (Link* link : {&c.inside, &c.between}) link->bandwidth *= v.link, link->latency_s *= v.latency;
  return c;
}

json row_of(const Variant& v) {
  return {{"ranks", v.ranks}, {"memory", v.memory}, {"link", v.link}, {"latency", v.latency}, {"skew", v.skew}, {"context", v.context}};
}

// 2, 4, 8 … that the model can be divided over.
std::vector<int> ranks_of(const Model& model, const Cluster& cluster, int slices_per_expert) {
  std::vector<int> out;
  for (int p = 2; p <= std::min(64, cluster.devices); p *= 2) {
    try {
      check_ranks(model.shape(), slice_counts(model.shape(), slices_for(model, p, slices_per_expert)), p);
      out.push_back(p);
    } catch (const Error& e) {
      if (e.code() != Code::kInvalidArgument) throw;
    }
  }
  return out;
}

json simulated(const Model& model, const Cluster& cluster, const Settings& settings, const Variant& v, const Workload& workload) {
  Settings s = settings;
  s.ranks = v.ranks;
  const Prediction p(model, changed(cluster, v), s, v.skew);
  json out = row_of(v);
  if (!p.placement().fits) return out;
  const json result = study(p, workload);
  out["gain"] = result["workload"]["gain"];
  out["better_static"] = result["workload"]["better_static"];
  out["switches"] = result["workload"]["runs"]["measured"]["switches"];
  return out;
}

}  // namespace

json sweep(const Model& model, const Cluster& cluster, const Settings& settings, const std::optional<Workload>& workload, bool all) {
  const auto begin = std::chrono::steady_clock::now();
  int64_t points = 0;
  json rows = json::array(), crossings = json::array();
  std::optional<Variant> lowest, highest;
  double low = 0, high = 0;
  for (int ranks : ranks_of(model, cluster, settings.slices_per_expert))
    for (double skew : kSkew) {
      int experts = 0;
      for (const MlpShape& mlp : model.shape().mlps) experts = std::max(experts, mlp.num_experts);
      const Routing routing(experts, model.config.top_k, ranks, skew);
      for (double memory : kMemory)
        for (double link : kLink)
          for (double latency : kLatency) {
            Variant v{ranks, memory, link, latency, skew, 0};
            const StepModel steps(model, changed(cluster, v), ranks, slices_for(model, ranks, settings.slices_per_expert), routing);
            for (double context : kContext) {
              v.context = context;
              for (double n = 1; n <= settings.max_batch; n *= 2, ++points) {
                const StepWork work = steps.decode(n, context);
                const double tp = steps.seconds(Layout::kTp, work), ep = steps.seconds(Layout::kEp, work);
                if (!all) continue;
                json row = row_of(v);
                row["requests"] = n, row["tp_seconds"] = tp, row["ep_seconds"] = ep;
                rows.push_back(std::move(row));
              }
              const Crossover c = crossover_of(steps, context, settings.max_batch);
              json row = row_of(v);
              row["first"] = name_of(c.first);
              row["crossover"] = c.at ? json(*c.at) : json(nullptr);
              crossings.push_back(std::move(row));
              if (!c.at || ranks != (settings.ranks > 0 ? settings.ranks : cluster.ranks)) continue;
              if (!lowest || *c.at < low) lowest = v, low = *c.at;
              if (!highest || *c.at > high) highest = v, high = *c.at;
            }
          }
    }
  json out = {{"what", "sweep"}, {"simulated", true}, {"model", model.name}, {"cluster", cluster.name}, {"points", points}};
  out["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (all) out["rows"] = std::move(rows);
  out["crossovers"] = std::move(crossings);
  json chosen = json::array();
  if (workload && lowest) chosen.push_back(simulated(model, cluster, settings, *lowest, *workload));
  if (workload && highest) chosen.push_back(simulated(model, cluster, settings, *highest, *workload));
  out["chosen"] = std::move(chosen);
  return out;
}

std::string table_of_sweep(const json& r) {
  std::string out = fmt::format(
      "SIMULATED: {} on {}, {} points by the step model in {:.1f} s\n\n  where TP and EP are equally fast, over contexts and skews; memory, link, "
      "latency are factors\n",
      r["model"].get<std::string>(), r["cluster"].get<std::string>(), r["points"].get<int64_t>(), r["seconds"].get<double>());
  std::map<std::string, std::vector<double>> by;
  std::map<std::string, int> never;
  for (const json& c : r["crossovers"]) {
    const std::string key = fmt::format("{:2} ranks, memory × {:<4g} link × {:<4g} latency × {:<4g}", c["ranks"].get<int>(),
                                        c["memory"].get<double>(), c["link"].get<double>(), c["latency"].get<double>());
    by[key];
    if (c["crossover"].is_null())
      ++never[key];
    else
      by[key].push_back(c["crossover"].get<double>());
  }
  for (const auto& [key, at] : by) {
    if (at.empty())
      out += fmt::format("  {}  never\n", key);
    else
      out += fmt::format("  {}  {:.0f} – {:.0f} requests{}\n", key, *std::min_element(at.begin(), at.end()), *std::max_element(at.begin(), at.end()),
                         never[key] > 0 ? fmt::format("; never in {} of {}", never[key], never[key] + static_cast<int>(at.size())) : "");
  }
  for (const json& c : r["chosen"]) {
    out += fmt::format("\n  simulated: {} ranks, memory × {:g}, link × {:g}, latency × {:g}, skew {:g}: ", c["ranks"].get<int>(),
                       c["memory"].get<double>(), c["link"].get<double>(), c["latency"].get<double>(), c["skew"].get<double>());
    out += c.contains("gain") ? fmt::format("`measured` is {:.2f} times as fast as {} ({} switches)", c["gain"].get<double>(),
                                            c["better_static"].get<std::string>(), c["switches"].get<int>())
                              : "does not fit";
  }
  return out + "\n";
}

}  // namespace moebius::plan
