#include "examples/plan/workload.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "examples/plan/facts.h"
#include "examples/plan/shipped.h"
#include "lib/base/json_tree.h"

namespace moebius::plan {
namespace {

using moebius_examples::Arrivals;
using moebius_examples::Length;

constexpr Shipped kWorkloads[] = {
    {"rollout", R"({"kind": "rollout", "prompts": 256, "samples": 8, "prompt": {"median": 512, "most": 2048, "sigma": 0.5},
                    "answer": {"median": 1024, "most": 8192, "sigma": 1}})"},
    {"bursts", R"({"kind": "steps", "prompts": 2000, "samples": 1, "prompt": {"median": 512, "most": 4096, "sigma": 1},
                   "answer": {"median": 256, "most": 2048, "sigma": 1}, "rate": 80, "low_rate": 2, "period_s": 15})"},
    {"steady", R"({"kind": "random", "prompts": 1000, "samples": 1, "prompt": {"median": 512, "most": 4096, "sigma": 1},
                   "answer": {"median": 256, "most": 2048, "sigma": 1}, "rate": 20, "variation": 2})"},
};

Length length_of(const Facts& f) {
  const Length length{f.integer("median", 1, 1 << 22), f.integer("most", 1, 1 << 22), f.number("sigma", 0, 4)};
  f.refuse_others();
  return length;
}

// Of a log-normal that is cut off, about.
double mean_of(const Length& l) { return std::min(static_cast<double>(l.most), static_cast<double>(l.median) * std::exp(l.sigma * l.sigma / 2)); }

}  // namespace

double Workload::mean_context() const { return mean_of(load.prompt) + mean_of(load.answer) / 2; }

Workload read_workload(const std::string& name) {
  const JsonTree tree = parse_json(read_shipped(kWorkloads, name, "workload"), name);
  const Facts f(tree.root(), name);
  static const std::map<std::string, Arrivals> kinds = {{"rollout", Arrivals::kOnce}, {"random", Arrivals::kRandom}, {"steps", Arrivals::kSteps}};
  Workload w;
  w.name = name;
  const std::string kind = f.text("kind");
  if (kinds.count(kind) == 0) fail(Code::kCorruptModel, "{}: kind is \"{}\", must be rollout, random or steps", name, kind);
  moebius_examples::LoadOptions& l = w.load;
  l.arrivals = kinds.at(kind);
  l.prompts = f.integer("prompts", 1, 1 << 20);
  l.samples = f.integer_or("samples", 1, 1, 1 << 16);
  l.prompt = length_of(f.facts("prompt"));
  l.answer = length_of(f.facts("answer"));
  l.seed = static_cast<uint64_t>(f.integer_or("seed", 1, 0, INT64_MAX));
  if (l.arrivals != Arrivals::kOnce) l.rate = f.number("rate", 1e-6, 1e9);
  if (l.arrivals == Arrivals::kRandom) l.variation = f.number_or("variation", 1, 0.01, 100);
  if (l.arrivals == Arrivals::kSteps) l.low_rate = f.number("low_rate", 1e-6, 1e9), l.period_s = f.number("period_s", 1e-3, 1e9);
  f.refuse_others();
  const std::string requests = fmt::format("{} requests of about {} + {} tokens", l.prompts * l.samples, l.prompt.median, l.answer.median);
  w.text = l.arrivals == Arrivals::kOnce     ? fmt::format("a rollout of {}", requests)
           : l.arrivals == Arrivals::kRandom ? fmt::format("{}, {:g} a second", requests, l.rate)
                                             : fmt::format("{}, {:g} and {:g} a second in turn for {:g} s", requests, l.rate, l.low_rate, l.period_s);
  return w;
}

void check_context(const Workload& w, const Model& model) {
  const int64_t most = w.load.prompt.most + w.load.answer.most;
  if (most > model.config.max_position_embeddings)
    fail(Code::kInvalidArgument, "{}: prompts of up to {} tokens and answers of up to {}, {} was made for {} in all: give a --workload file with shorter ones",
         w.name, w.load.prompt.most, w.load.answer.most, model.name, model.config.max_position_embeddings);
}

moebius_examples::Load load_of(const Workload& w, int replicas) {
  moebius_examples::LoadOptions l = w.load;
  l.prompts = std::max<int64_t>(1, (l.prompts + replicas - 1) / replicas);
  l.rate /= replicas;
  l.low_rate /= replicas;
  constexpr int32_t kTokens = 1 << 30;  // no two prompts begin alike
  return moebius_examples::make_load(l, kTokens);
}

}  // namespace moebius::plan
