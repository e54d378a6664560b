// Predictions beside figures that others have published, each with its error.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

namespace moebius::plan {

// One object: rows of {group, figure, unit, published, simulated, error, note, fitted}.
nlohmann::ordered_json published();
std::string table_of_published(const nlohmann::ordered_json& rows);

}  // namespace moebius::plan
