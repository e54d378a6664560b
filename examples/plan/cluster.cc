#include "examples/plan/cluster.h"

#include <algorithm>

#include "examples/plan/facts.h"
#include "examples/plan/shipped.h"
#include "lib/base/json_tree.h"

namespace moebius::plan {
namespace {

Link link_of(const Facts& f) {
  const Link link{f.number("bandwidth", 1e6, 1e16), f.number("latency_s", 0, 1)};
  f.refuse_others();
  return link;
}

}  // namespace

Cluster parse_cluster(const std::string& text, const std::string& name) {
  const JsonTree tree = parse_json(text, name);
  const Facts f(tree.root(), name);
  Cluster c;
  c.name = name;
  c.devices = static_cast<int>(f.integer("devices", 1, 1 << 20));
  c.devices_per_node = static_cast<int>(f.integer("devices_per_node", 1, c.devices));
  c.ranks = static_cast<int>(f.integer_or("ranks", c.devices_per_node, 1, c.devices));
  c.memory_bytes = f.integer("memory_bytes", 1, int64_t{1} << 50);
  c.memory_bandwidth = f.number("memory_bandwidth", 1e6, 1e16);
  c.matrix_flops = f.number("matrix_flops", 1e6, 1e19);
  c.inside = link_of(f.facts("inside"));
  c.between = f.has("between") ? link_of(f.facts("between")) : c.inside;
  c.launch_s = f.number("launch_s", 0, 1);
  c.sum_bytes = static_cast<int>(f.integer_or("sum_bytes", 4, 2, 8));
  c.all_to_all_s = f.number_or("all_to_all_s", 0, 0, 1);
  if (f.has("efficiency")) {
    const Facts e = f.facts("efficiency");
    c.efficiency = {e.number("memory", 0.01, 1), e.number("matrix", 0.01, 1), e.number("link", 0.01, 1)};
    c.efficiency.copy = e.number_or("copy", c.efficiency.link, 0.01, 1);
    e.refuse_others();
  }
  for (const nlohmann::json& s : f.at("sources")) {
    if (!s.is_string()) fail(Code::kCorruptModel, "{}: sources holds {}, must be strings", name, s.dump());
    c.sources.push_back(s.get<std::string>());
  }
  f.refuse_others();
  return c;
}

Cluster read_cluster(const std::string& name) { return parse_cluster(read_shipped(kClusters, name, "cluster"), name); }

Exchanges::Exchanges(const Cluster& c, int ranks) : ranks_(ranks) {
  const int here = std::min(ranks, c.devices_per_node);
  latency_s_ = ranks > here ? c.between.latency_s : c.inside.latency_s;
  all_to_all_s_ = c.all_to_all_s;
  copying_ = c.efficiency.copy / c.efficiency.link;
  inside_rate_ = c.inside.bandwidth * c.efficiency.link;
  between_rate_ = c.between.bandwidth * c.efficiency.link;
  const int fewest = ranks % here == 0 ? here : ranks % here;  // on one node: its ranks have the fewest neighbours, and are waited for
  leaving_ = ranks > 1 ? static_cast<double>(ranks - fewest) / (ranks - 1) : 0;
}

// Both links work at once.
double Exchanges::move(double bytes) const { return std::max(bytes * (1 - leaving_) / inside_rate_, bytes * leaving_ / between_rate_); }

double Exchanges::copy_rate() const { return copying_ / move(1); }

double Exchanges::all_reduce(double bytes) const {
  if (ranks_ == 1) return 0;
  const double others = ranks_ - 1;
  return std::min(rounds(2) + move(bytes * others), rounds(3) + move(2 * bytes * others / ranks_));
}

double Exchanges::collect(double bytes) const { return ranks_ == 1 ? 0 : rounds(2) + move(bytes); }
double Exchanges::all_to_all(double bytes) const { return ranks_ == 1 ? 0 : all_to_all_s_ + move(bytes); }

}  // namespace moebius::plan
