// JSON that a user wrote, and that one reads.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

namespace moebius_examples {

// Throws BadInput that names `where` for what is no JSON, nested too deep or gives a key twice.
nlohmann::json parse_strictly(const std::string& text, const std::string& where);

// A key that is a token id in decimal, and nothing else.
std::optional<int32_t> token_id(const std::string& text);

// On one line; what is no UTF-8, as a folder's name may be, is replaced.
template <class Json>
std::string line_of(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace moebius_examples
