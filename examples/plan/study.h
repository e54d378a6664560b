// A model on a cluster under a workload, as one JSON object, from which the table and the page are made.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "examples/plan/placement.h"
#include "examples/plan/simulate.h"
#include "examples/plan/step_model.h"
#include "examples/plan/workload.h"

namespace moebius::plan {

inline constexpr double kDefaultSkew = 0.3;

// Everything that a prediction of a model on a cluster rests on.
class Prediction {
 public:
  Prediction(const Model& model, const Cluster& cluster, const Settings& settings, double skew);
  const Model& model() const { return model_; }
  const Cluster& cluster() const { return cluster_; }
  const Placement& placement() const { return placement_; }
  const StepModel& steps() const { return steps_; }
  const SwitchModel& switches() const { return switches_; }
  // Output tokens a second in each layout over so many requests at a time.
  double tokens_per_second(Layout layout, double requests, double context) const {
    return requests / steps_.seconds(layout, steps_.decode(requests, context));
  }

 private:
  Model model_;
  Cluster cluster_;
  Placement placement_;
  Routing routing_;
  StepModel steps_;
  SwitchModel switches_;
};

// The fewest requests, if any up to `most`, from which on the other layout than that of one request is faster.
struct Crossover {
  Layout first = Layout::kTp;  // the faster one for one request
  std::optional<double> at;
};
Crossover crossover_of(const StepModel& steps, double context, double most);

// The workload under both layouts and the policy `measured`; empty for a model that does not fit.
nlohmann::ordered_json study(const Prediction& prediction, const std::optional<Workload>& workload);

std::string table_of(const nlohmann::ordered_json& study);
std::string page_of(const nlohmann::ordered_json& study);

}  // namespace moebius::plan
