// moebius-plan: predicts a model on a cluster. Links the library's inner parts: slices, arena, transfer plans, scheduler, switcher and policy
// are the engine's own; kernels and links are models.
#include <cstdio>
#include <optional>
#include <string>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "examples/common/checks.h"
#include "examples/common/inner_main.h"
#include "examples/common/output_file.h"
#include "examples/common/strict_json.h"
#include "examples/plan/fit.h"
#include "examples/plan/published.h"
#include "examples/plan/shipped.h"
#include "examples/plan/study.h"
#include "examples/plan/sweep.h"

namespace moebius::plan {
namespace {

struct Options {
  std::string config = "qwen3-235b-a22b", cluster = "8xh200", workload = "rollout", format = "table", html, fit, fit_shape;
  Settings settings;
  double skew = kDefaultSkew;
  bool list = false, published = false, sweep = false;
};

// Every result has one way out.
void print(const Options& o, const nlohmann::ordered_json& result, const std::string& table) {
  fmt::print("{}", o.format == "json" ? moebius_examples::line_of(result) + "\n" : table);
}

void list(const Options& o) {
  nlohmann::ordered_json names;
  std::string lines;
  for (const Shipped& s : kModels) names["models"].push_back(s.name), lines += fmt::format("model {}\n", s.name);
  for (const Shipped& s : kClusters) names["clusters"].push_back(s.name), lines += fmt::format("cluster {}\n", s.name);
  print(o, names, lines);
}

void run(const Options& o) {
  if (o.list) return list(o);
  if (o.published) {
    const nlohmann::ordered_json rows = published();
    return print(o, rows, table_of_published(rows));
  }
  moebius_examples::OutputFile page(o.html, "--html");
  const Cluster cluster = read_cluster(o.cluster);
  if (!o.fit.empty()) {
    const nlohmann::ordered_json result = fit(o.fit, cluster, o.fit_shape);
    return print(o, result, table_of_fit(result));
  }
  std::optional<Workload> workload;
  if (o.workload != "none") workload = read_workload(o.workload);
  const Model model = read_model(o.config);
  if (workload) check_context(*workload, model);
  if (o.sweep) {
    const nlohmann::ordered_json result = sweep(model, cluster, o.settings, workload, o.format == "json");
    return print(o, result, table_of_sweep(result));
  }
  const Prediction prediction(model, cluster, o.settings, o.skew);
  const nlohmann::ordered_json result = study(prediction, workload);
  print(o, result, table_of(result));
  if (page) page.fill(page_of(result));
}

int start(int argc, char** argv) {
  Options o;
  Settings& s = o.settings;
  CLI::App app{
      "Predicts a MoE model on a cluster: what fits, the step time of TP and EP over the number of requests, the crossover, what a switch takes,\n"
      "and what switching gains for a workload. Everything that it prints is simulated. Slices, arena, transfer plans, scheduler, switcher and\n"
      "policy are the engine's own, run in simulated time; kernels and links are models (docs/plan.md)."};
  app.add_option("--config", o.config, "model: a shipped one (--list), a config.json, or a folder with one")->capture_default_str();
  app.add_option("--cluster", o.cluster, "cluster: a shipped one (--list), or a JSON file")->capture_default_str();
  app.add_option("--ranks", s.ranks,
                 "ranks that share the model (0: the cluster's); the cluster's devices hold as many replicas as they have room for")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  app.add_option("--memory-bytes", s.memory_bytes, "planned with on each device (0: 90 % of what it has)")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 50))
      ->capture_default_str();
  app.add_option("--slices-per-expert", s.slices_per_expert, "cuts of each MLP (0: the default rule, or what so many ranks need)")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--page-tokens", s.page_tokens, "tokens of a KV page, a multiple of 16")->check(CLI::Range(1, 1 << 16))->capture_default_str();
  app.add_option("--chunk-tokens", s.chunk_tokens, "prompt tokens that a step takes over all requests")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--max-batch", s.max_batch, "running requests of a replica")->check(CLI::Range(1, 1 << 16))->capture_default_str();
  app.add_option("--workload", o.workload, "what is asked of it: rollout, bursts, steady, a JSON file, or none")->capture_default_str();
  app.add_option("--routing-skew", o.skew, "how unevenly experts are hit: deviation of the logarithm of their weights; 0: evenly")
      ->check(moebius_examples::within(0, 4))
      ->capture_default_str();
  app.add_flag("--sweep", o.sweep, "some 10,000 variants of the cluster and the load by the step model; the workload for two of them");
  app.add_flag("--published", o.published, "predictions beside published figures, with the error; says which figures were fitted");
  app.add_option("--fit", o.fit,
                 "JSON lines of moebius-bench: fits the cluster's efficiencies to half of them and judges by the other half")
      ->default_str("none");
  app.add_option("--fit-shape", o.fit_shape, "with --fit: fit on rows of this shape only, judge by the others")
      ->default_str("every other group of rows");
  app.add_flag("--list", o.list, "names of shipped models and clusters");
  app.add_option("--format", o.format, "table, or json (one object)")->check(CLI::IsMember({"table", "json"}))->capture_default_str();
  app.add_option("--html", o.html, "writes the result as one page that needs nothing else")->default_str("none");
  for (const char* mode : {"--sweep", "--published", "--fit", "--list"}) {
    app.get_option(mode)->excludes(app.get_option("--html"));  // of a plan alone
    for (const char* other : {"--sweep", "--published", "--fit", "--list"})
      if (std::string(mode) < other) app.get_option(mode)->excludes(app.get_option(other));
  }
  app.get_option("--fit-shape")->needs(app.get_option("--fit"));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  run(o);
  return 0;
}

}  // namespace
}  // namespace moebius::plan

int main(int argc, char** argv) {
  return moebius_examples::inner_main("moebius-plan", [&] { return moebius::plan::start(argc, argv); });
}
