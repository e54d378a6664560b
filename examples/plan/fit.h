// The efficiencies of a cluster from what moebius-bench measured on it: half of the points are fitted, the other half judges.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "examples/plan/cluster.h"
#include "examples/plan/model.h"
#include "examples/plan/routing.h"

namespace moebius::plan {

// A decode or prefill row of moebius-bench, the median of equal ones.
struct Measured {
  std::string shape, layout;
  int ranks = 1, slices_per_expert = 0;
  double batch = 0, context = 0, tokens = 0;  // tokens > 0: a prompt of so many
  bool exact = true;
  double read_rate = 0, matrix_rate = 0;  // of all ranks, in the same run
  double seconds = 0;                     // of the step, or of the prompt
  // The same but for the layout: such points are fitted or judged together.
  std::string group() const;
};
std::vector<Measured> parse_measured(const std::string& text, const std::string& file);

// Models and routings by shape and ranks, made once.
class MeasuredModels {
 public:
  struct Entry {
    Model model;
    Routing routing;  // dummy weights hit experts evenly
  };
  const Entry& of(const std::string& shape, int ranks);

 private:
  std::map<std::pair<std::string, int>, Entry> entries_;
};

// Seconds that the cluster would take, whose memory and matrix rates are those of the row and whose links are scaled as its memory is.
double predicted_seconds(const Measured& point, const Cluster& cluster, MeasuredModels& models);

// Reads the file. shape: fit on its rows and judge by the others; empty: every other group.
nlohmann::ordered_json fit(const std::string& file, const Cluster& cluster, const std::string& shape);
nlohmann::ordered_json fit(const std::vector<Measured>& points, const Cluster& cluster, const std::string& shape);
std::string table_of_fit(const nlohmann::ordered_json& result);

}  // namespace moebius::plan
