// JSON that a user wrote.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

namespace moebius_examples {

// Throws BadInput that names `where` for what is no JSON, nested too deep or gives a key twice.
nlohmann::json parse_strictly(const std::string& text, const std::string& where);

}  // namespace moebius_examples
