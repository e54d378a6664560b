// What a study found, as a table, as JSON lines and as one HTML page.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "examples/rollout/compare.h"

namespace moebius_examples {

// One load under every choice: rounds of runs, the choices in turn.
struct Comparison {
  int64_t concurrency = 0;  // of an operating point; else 0
  std::vector<std::string> choices;
  std::map<std::string, std::vector<Run>> runs;  // by choice, one a round; only the last keeps its steps and gaps
  std::map<std::string, std::vector<Figures>> figures;
  std::string better;  // of the layouts that stay; empty: fewer than two were asked for
  std::optional<double> hindsight_s;
};

// By the median of tokens a second; empty where one of the two was not asked for.
std::string better_layout(const Comparison& c);

// Its tokens a second divided by those of the better layout in the same round; of one value where there is none.
Median ratio_to_better(const Comparison& c, const std::string& choice);

std::string table_of(const Comparison& c);
nlohmann::json summary_of(const Comparison& c, const std::string& choice);
nlohmann::json row_of(const Figures& f);
std::string page_of(const std::string& title, const std::string& said, const std::vector<Comparison>& comparisons);

}  // namespace moebius_examples
