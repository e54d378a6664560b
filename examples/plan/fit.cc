#include "examples/plan/fit.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>

#include <fmt/format.h>

#include "examples/common/shapes.h"
#include "examples/common/statistics.h"
#include "examples/plan/facts.h"
#include "examples/plan/step_model.h"
#include "lib/base/json_tree.h"

namespace moebius::plan {
namespace {

using json = nlohmann::ordered_json;
using moebius_examples::median;

// A shape of moebius-bench, or a model that it was given.
Model model_of(const std::string& shape) {
  const std::vector<std::string> names = moebius_examples::shape_names();
  if (std::find(names.begin(), names.end(), shape) == names.end()) return read_model(shape);
  const moebius_examples::ShapeFolder folder(shape);
  return read_model(folder.path());
}

}  // namespace

const MeasuredModels::Entry& MeasuredModels::of(const std::string& shape, int ranks) {
  const std::pair key(shape, ranks);
  if (const auto found = entries_.find(key); found != entries_.end()) return found->second;
  Model model = model_of(shape);
  const Routing routing(model.shape().mlps.back().num_experts, model.config.top_k, ranks, 0);
  return entries_.emplace(key, Entry{std::move(model), routing}).first->second;
}

std::string Measured::group() const {
  return fmt::format("{} {} ranks, batch {:.0f}, context {:.0f}, prompt {:.0f}", shape, ranks, batch, context, tokens);
}

std::vector<Measured> parse_measured(const std::string& text, const std::string& file) {
  std::map<std::string, std::vector<Measured>> found;
  std::istringstream lines(text);
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.empty()) continue;
    const std::string where = fmt::format("{}:{}", file, number);
    const JsonTree tree = parse_json(line, where);
    const Facts f(tree.root(), where);
    const std::string what = f.text("what");
    if (what != "decode" && what != "prefill") continue;
    Measured m;
    m.shape = f.text("shape");
    m.layout = f.text("layout");
    if (m.layout != "tp" && m.layout != "ep") fail(Code::kCorruptModel, "{}: layout is \"{}\", must be tp or ep", where, m.layout);
    m.ranks = static_cast<int>(f.integer("ranks", 1, 64));
    m.slices_per_expert = static_cast<int>(f.integer_or("slices_per_expert", 0, 0, 1 << 20));
    m.batch = f.number("batch", 1, 1e6);
    m.context = f.number_or("context", 0, 0, 1e9);
    m.tokens = what == "prefill" ? f.number("tokens", 1, 1e9) : 0;
    m.exact = f.text_or("mode", "exact") == "exact";
    m.read_rate = f.number("read_bytes_per_second", 1, 1e18);
    m.matrix_rate = f.number("bf16_flops", 1, 1e21);
    m.seconds = (m.tokens > 0 ? m.tokens : m.batch) / f.number("tokens_per_second", 1e-9, 1e15);
    found[m.group() + m.layout].push_back(m);
  }
  if (found.empty()) fail(Code::kCorruptModel, "{}: has no decode or prefill row of moebius-bench --format json", file);
  std::vector<Measured> out;
  for (auto& [key, rows] : found) {
    std::sort(rows.begin(), rows.end(), [](const Measured& a, const Measured& b) { return a.seconds < b.seconds; });
    out.push_back(rows[rows.size() / 2]);
  }
  return out;
}

double predicted_seconds(const Measured& m, const Cluster& given, MeasuredModels& models) {
  constexpr double kChunk = 512;  // moebius-bench's
  Cluster c = given;
  const double scale = m.read_rate / m.ranks / c.memory_bandwidth;
  c.memory_bandwidth *= scale;
  c.inside.bandwidth *= scale;
  c.between.bandwidth *= scale;
  c.matrix_flops = m.matrix_rate / m.ranks;
  c.sum_bytes = m.exact ? 8 : 4;
  c.devices = c.devices_per_node = std::max(c.devices, m.ranks);
  const MeasuredModels::Entry& e = models.of(m.shape, m.ranks);
  const StepModel steps(e.model, c, m.ranks, m.slices_per_expert, e.routing);
  const Layout layout = m.layout == "tp" ? Layout::kTp : Layout::kEp;
  if (m.tokens == 0) return steps.seconds(layout, steps.decode(m.batch, m.context));
  double seconds = 0;
  for (double first = 0; first < m.tokens; first += kChunk)
    seconds += steps.seconds(layout, steps.prefill(first, std::min(kChunk, m.tokens - first)));
  return seconds;
}

json fit(const std::vector<Measured>& points, const Cluster& cluster, const std::string& shape) {
  std::map<std::string, bool> fitted;  // by group
  for (const Measured& m : points) fitted[m.group()] = m.shape == shape;
  if (shape.empty()) {
    bool next = true;
    for (auto& [group, is] : fitted) is = std::exchange(next, !next);
  }
  std::vector<const Measured*> half, other;
  for (const Measured& m : points) (fitted[m.group()] ? half : other).push_back(&m);
  if (half.empty() || other.empty())
    fail(Code::kInvalidArgument, "{} points to fit and {} to judge by: both are needed{}", half.size(), other.size(),
         shape.empty() ? "" : "; is the shape among the rows?");

  MeasuredModels models;
  Cluster c = cluster;
  const auto loss = [&](const Efficiencies& e) {
    c.efficiency = e;
    double sum = 0;
    for (const Measured* m : half) sum += std::abs(std::log(predicted_seconds(*m, c, models) / m->seconds));
    return sum;
  };
  // Each in turn by ever smaller steps, from several beginnings.
  Efficiencies best = cluster.efficiency;
  double least = loss(best);
  for (double start : {0.3, 0.6, 0.9}) {
    Efficiencies at{start, start, start};
    double now = loss(at);
    for (double step = 0.3; step > 0.002;) {
      bool better = false;
      for (double Efficiencies::*field : {&Efficiencies::memory, &Efficiencies::matrix, &Efficiencies::link})
        for (double factor : {1 + step, 1 / (1 + step)}) {
          Efficiencies trial = at;
          trial.*field = std::clamp(trial.*field * factor, 0.01, 1.0);
          if (const double l = loss(trial); l < now) at = trial, now = l, better = true;
        }
      if (!better) step /= 2;
    }
    if (now < least) best = at, least = now;
  }
  c.efficiency = best;

  json rows = json::array();
  std::vector<double> errors[2];                                                  // [judged]
  std::map<std::string, std::map<std::string, std::pair<double, double>>> sides;  // judged: [group][layout] measured, predicted
  for (const Measured& m : points) {
    const bool judged = !fitted[m.group()];
    const double seconds = predicted_seconds(m, c, models), error = seconds / m.seconds - 1;
    errors[judged].push_back(std::abs(error));
    if (judged && m.ranks > 1) sides[m.group()][m.layout] = {m.seconds, seconds};
    rows.push_back({{"point", m.group()},
                    {"layout", m.layout},
                    {"used", judged ? "judged" : "fitted"},
                    {"measured_seconds", m.seconds},
                    {"simulated_seconds", seconds},
                    {"error", error}});
  }
  int pairs = 0, right = 0;
  for (const auto& [group, of] : sides) {
    if (of.size() < 2) continue;
    ++pairs;
    right += (of.at("tp").first < of.at("ep").first) == (of.at("tp").second < of.at("ep").second);
  }
  return {{"what", "fit"},
          {"simulated", true},
          {"cluster", cluster.name},
          {"efficiency", {{"memory", best.memory}, {"matrix", best.matrix}, {"link", best.link}}},
          {"fitted_points", half.size()},
          {"judged_points", other.size()},
          {"fitted_median_error", median(errors[0])},
          {"judged_median_error", median(errors[1])},
          {"judged_worst_error", *std::max_element(errors[1].begin(), errors[1].end())},
          {"sides", {{"right", right}, {"of", pairs}}},
          {"points", rows}};
}

json fit(const std::string& file, const Cluster& cluster, const std::string& shape) {
  std::ifstream in(file, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  if (!in || !std::filesystem::is_regular_file(file)) fail(Code::kNotFound, "{}: no such file", file);
  return fit(parse_measured(text, file), cluster, shape);
}

std::string table_of_fit(const json& r) {
  const json& e = r["efficiency"];
  std::string out = fmt::format("SIMULATED beside measured, {}: efficiencies memory {:.3f}, matrix {:.3f}, link {:.3f}, fitted on {} points\n\n",
                                r["cluster"].get<std::string>(), e["memory"].get<double>(), e["matrix"].get<double>(), e["link"].get<double>(),
                                r["fitted_points"].get<size_t>());
  for (const json& p : r["points"])
    out += fmt::format("  {:6}  {}  {:10.3f} ms measured  {:10.3f} ms simulated  {:+6.1f} %  {}\n", p["used"].get<std::string>(),
                       p["layout"].get<std::string>(), 1e3 * p["measured_seconds"].get<double>(), 1e3 * p["simulated_seconds"].get<double>(),
                       100 * p["error"].get<double>(), p["point"].get<std::string>());
  return out + fmt::format(
                   "\n  {} judged points: median error {:.1f} %, worst {:.1f} %; the faster layout is right in {} of {} pairs (fitted points: median "
                   "{:.1f} %)\n",
                   r["judged_points"].get<size_t>(), 100 * r["judged_median_error"].get<double>(), 100 * r["judged_worst_error"].get<double>(),
                   r["sides"]["right"].get<int>(), r["sides"]["of"].get<int>(), 100 * r["fitted_median_error"].get<double>());
}

}  // namespace moebius::plan
