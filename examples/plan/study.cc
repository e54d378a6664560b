#include "examples/plan/study.h"

#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "examples/inspect/report.h"
#include "lib/base/error.h"

namespace moebius::plan {
namespace {

using json = nlohmann::ordered_json;
using inspect::kLayouts;

int sparse_experts(const Model& model) {
  int experts = 0;
  for (const MlpShape& mlp : model.shape().mlps) experts = std::max(experts, mlp.num_experts);
  return experts;
}

// A rank's weights of the last layer.
json layer_row(const ArenaPlan& arena) {
  const int l = arena.num_layers() - 1;
  json row = {{"layer", l}};
  for (Layout layout : kLayouts) {
    double experts = 0, attention = 0;
    for (size_t i = 0; i < arena.table().layer(l).size(); ++i) {
      const Slice& s = arena.table().layer(l)[i];
      if (arena.slice_offset(0, layout, l, static_cast<int>(i)) < 0) continue;
      (s.kind != SliceKind::kAttentionGroup && s.kind != SliceKind::kKvProjection ? experts : attention) += static_cast<double>(s.bytes);
    }
    row[std::string(name_of(layout)) + "_expert_bytes"] = experts;
    row[std::string(name_of(layout)) + "_attention_bytes"] = attention;
  }
  return row;
}

json switch_rows(const Prediction& p) {
  json rows = json::array();
  const inspect::MemoryPlan& memory = p.placement().memory;
  const double half = 0.5 * static_cast<double>(memory.arena.tp_pages() * p.placement().engine.page_tokens);
  for (Layout to : {Layout::kEp, Layout::kTp}) {
    json row = inspect::switch_row(memory, to, p.placement().engine.page_tokens);
    row["rank_weight_bytes"] = p.switches().weight_bytes(to);
    row["weight_seconds"] = p.switches().seconds(to, 0);
    row["half_full_kv_tokens"] = half;
    row["half_full_seconds"] = p.switches().seconds(to, half);
    rows.push_back(std::move(row));
  }
  return rows;
}

json step_rows(const Prediction& p, double context, double capacity[2]) {
  json rows = json::array();
  for (double n = 1; n <= p.placement().engine.max_batch; n *= 2) {
    json row = {{"requests", n}, {"context", context}};
    for (Layout layout : kLayouts) {
      const StepSeconds t = p.steps().step(layout, p.steps().decode(n, context));
      const std::string name = name_of(layout);
      row[name + "_seconds"] = t.total();
      row[name + "_tokens_per_second"] = n / t.total();
      row[name + "_parts"] = {
          {"attention", t.attention}, {"experts", t.experts}, {"exchange", t.exchange}, {"head", t.head}, {"launches", t.launches}};
      row[name + "_holds"] = n * (context + 1) <= capacity[static_cast<size_t>(layout)];
    }
    row["ep_over_tp"] = row["tp_seconds"].get<double>() / row["ep_seconds"].get<double>();
    rows.push_back(std::move(row));
  }
  return rows;
}

json run_row(const SimulatedRun& run) {
  return {{"seconds", run.seconds},
          {"tokens", run.tokens},
          {"tokens_per_second", run.tokens_per_second()},
          {"first_token_s", run.first_token_s},
          {"answer_s", run.answer_s},
          {"token_gap_s", run.token_gap_s},
          {"steps", run.steps},
          {"most_running", run.most_running},
          {"preemptions", run.preemptions},
          {"switches", run.switches},
          {"switch_seconds", run.switch_s},
          {"refusals", run.refusals}};
}

json moments_of(const SimulatedRun& run) {
  json out = json::array();
  for (const Moment& m : run.moments) out.push_back({m.at_s, m.running, m.waiting, name_of(m.layout)});
  return out;
}

json serve(const Prediction& p, const Workload& w) {
  const int replicas = p.placement().replicas;
  const moebius_examples::Load load = load_of(w, replicas);
  json out = {{"name", w.name}, {"text", w.text}, {"replicas", replicas}, {"runs", json::object()}, {"measured_moments", json::array()}};
  PolicyConfig manual, measured;
  manual.kind = PolicyKind::kManual;
  const auto run = [&](const char* name, const PolicyConfig& policy, Layout start) {
    const SimulatedRun r = simulate(p.placement(), p.steps(), p.switches(), load, policy, start);
    out["runs"][name] = run_row(r);
    return r;
  };
  // A rollout is done when its last answer is; of an online load, whose end the arrivals set, the mean answer counts.
  const bool all = w.load.arrivals == moebius_examples::Arrivals::kOnce;
  const auto figure = [&](const SimulatedRun& r) { return all ? r.seconds : r.answer_s; };
  const double tp = figure(run("tp", manual, Layout::kTp)), ep = figure(run("ep", manual, Layout::kEp));
  // A server that has been there for a while begins where its load has put it.
  const SimulatedRun best = run("measured", measured, tp <= ep ? Layout::kTp : Layout::kEp);
  out["gain_of"] = all ? "seconds" : "answer_s";
  out["better_static"] = tp <= ep ? "tp" : "ep";
  out["gain"] = std::min(tp, ep) / figure(best);
  out["hindsight_seconds"] = best.hindsight_s;
  out["hindsight_gain"] = std::min(out["runs"]["tp"]["seconds"].get<double>(), out["runs"]["ep"]["seconds"].get<double>()) / best.hindsight_s;
  out["decisions"] = best.decisions;
  out["measured_moments"] = moments_of(best);
  return out;
}

std::string sentence(const json& s) {
  const auto gb = [](const json& bytes) { return bytes.get<double>() / 1e9; };
  if (!s["fits"].get<bool>())
    return fmt::format("Simulated: {} does not fit {} ranks of {}: {:.1f} GB are planned with on each, {:.1f} are needed.",
                       s["model"]["name"].get<std::string>(), s["ranks"].get<int>(), s["cluster"]["name"].get<std::string>(), gb(s["memory_bytes"]),
                       gb(s["least_memory_bytes"]));
  const json& c = s["crossover"];
  const std::string first = c["first"].get<std::string>(), second = first == "tp" ? "ep" : "tp";
  const std::string steady =
      c["requests"].is_null()
          ? fmt::format("{} is the faster layout at every load up to {} requests at a time", first, s["max_batch"].get<int>())
          : fmt::format("{} is faster below about {:.0f} requests at a time and {} above", first, c["requests"].get<double>(), second);
  if (!s.contains("workload")) return fmt::format("Simulated: {}.", steady);
  const json& w = s["workload"];
  const double gain = w["gain"];
  if (w["runs"]["measured"]["switches"].get<int>() > 0 && gain >= 1.01)
    return fmt::format(
        "Simulated: switch; {}, and for {} the policy `measured` {} {:.2f} times as fast as {}, the better of the two ({} switches, {:.0f} ms in "
        "all).",
        steady, w["text"].get<std::string>(), w["gain_of"] == "seconds" ? "is" : "answers", gain, w["better_static"].get<std::string>(),
        w["runs"]["measured"]["switches"].get<int>(), 1e3 * w["runs"]["measured"]["switch_seconds"].get<double>());
  const double possible = w["hindsight_gain"];
  const std::string could =
      w["gain_of"] == "seconds" && possible >= 1.02 ? fmt::format("; the best schedule in hindsight would be {:.2f} times as fast", possible) : "";
  return fmt::format("Simulated: stay in {}; {}, and for {} the policy `measured` gains nothing worth having (factor {:.3f}){}.",
                     w["better_static"].get<std::string>(), steady, w["text"].get<std::string>(), gain, could);
}

}  // namespace

Prediction::Prediction(const Model& model, const Cluster& cluster, const Settings& settings, double skew)
    : model_(model),
      cluster_(cluster),
      placement_(place(model, cluster, settings)),
      routing_(sparse_experts(model), model.config.top_k, placement_.ranks, skew),
      steps_(model, cluster, placement_.ranks, placement_.engine.slices_per_expert, routing_),
      switches_(placement_.memory, cluster, placement_.engine.page_tokens) {}

Crossover crossover_of(const StepModel& steps, double context, double most) {
  const auto tp_wins = [&](double n) {
    const StepWork work = steps.decode(n, context);
    return steps.seconds(Layout::kTp, work) <= steps.seconds(Layout::kEp, work);
  };
  const bool first = tp_wins(1);
  Crossover c{first ? Layout::kTp : Layout::kEp, std::nullopt};
  double last = 0;  // the largest power of two at which the first one wins
  for (double n = 1; n <= most; n *= 2)
    if (tp_wins(n) == first) last = n;
  double low = last, high = std::min(2 * last, most);
  if (tp_wins(high) == first) return c;
  while (high - low > std::max(1.0, low / 64)) {
    const double middle = std::floor((low + high) / 2);
    (tp_wins(middle) == first ? low : high) = middle;
  }
  c.at = high;
  return c;
}

json study(const Prediction& p, const std::optional<Workload>& workload) {
  const Model& model = p.model();
  const Placement& place = p.placement();
  const Cluster& cluster = p.cluster();
  const inspect::MemoryPlan& memory = place.memory;
  const ModelShape& shape = model.shape();
  const json ranks = inspect::rank_rows(memory.arena, place.engine.page_tokens);
  const SliceCounts counts = memory.arena.table().counts();
  json s = {{"what", "plan"},
            {"simulated", true},
            {"model",
             {{"name", model.name},
              {"family", model.config.family},
              {"served", model.served},
              {"note", model.note},
              {"layers", shape.num_layers()},
              {"hidden", shape.hidden},
              {"experts", sparse_experts(model)},
              {"top_k", model.config.top_k},
              {"heads", shape.num_heads},
              {"kv_heads", shape.num_kv_heads},
              {"head_dim", shape.head_dim}}},
            {"cluster",
             {{"name", cluster.name},
              {"devices", cluster.devices},
              {"memory_bytes", cluster.memory_bytes},
              {"memory_bandwidth", cluster.memory_bandwidth},
              {"matrix_flops", cluster.matrix_flops},
              {"link_bandwidth", cluster.inside.bandwidth},
              {"efficiency",
               {{"memory", cluster.efficiency.memory},
                {"matrix", cluster.efficiency.matrix},
                {"link", cluster.efficiency.link},
                {"copy", cluster.efficiency.copy}}},
              {"sources", cluster.sources}}},
            {"ranks", place.ranks},
            {"replicas", place.replicas},
            {"slices_per_expert", counts.cuts},
            {"head_groups", counts.head_groups},
            {"page_tokens", place.engine.page_tokens},
            {"max_batch", place.engine.max_batch},
            {"fits", place.fits},
            {"why_not", place.why_not},
            {"memory_bytes", place.engine.memory_bytes},
            {"least_memory_bytes", place.least_memory_bytes},
            {"slices", inspect::slices_by_kind(memory.arena.table())},
            {"memory", inspect::memory_report(memory, ranks)},
            {"per_rank", ranks},
            {"layer", layer_row(memory.arena)}};
  const double context = workload ? workload->mean_context() : 1024;
  double capacity[2] = {s["memory"]["tp_tokens"].get<double>(), s["memory"]["ep_tokens"].get<double>()};
  s["switches"] = switch_rows(p);
  s["steps"] = step_rows(p, context, capacity);
  const Crossover c = crossover_of(p.steps(), context, place.engine.max_batch);
  s["crossover"] = {{"first", name_of(c.first)}, {"requests", c.at ? json(*c.at) : json(nullptr)}, {"context", context}};
  if (workload && place.fits) s["workload"] = serve(p, *workload);
  s["recommendation"] = sentence(s);
  return s;
}

}  // namespace moebius::plan
