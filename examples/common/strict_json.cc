#include "examples/common/strict_json.h"

#include <charconv>
#include <set>
#include <vector>

#include <fmt/format.h>

#include "examples/common/options.h"

namespace moebius_examples {

using nlohmann::json;

std::optional<int32_t> token_id(const std::string& text) {
  int32_t id = -1;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, id);
  return error == std::errc() && rest == end && id >= 0 ? std::optional(id) : std::nullopt;
}

json parse_strictly(const std::string& text, const std::string& where) {
  // Duplicate keys would be lost silently by the parser: they are looked for on the way.
  std::vector<std::set<std::string>> seen;
  const json::parser_callback_t callback = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > 16) throw BadInput(where + ": is nested too deep");
    if (event == json::parse_event_t::object_start) seen.emplace_back();
    if (event == json::parse_event_t::object_end) seen.pop_back();
    if (event == json::parse_event_t::key && !seen.back().insert(parsed.get<std::string>()).second)
      throw BadInput(fmt::format("{}: key '{}' is given twice", where, parsed.get<std::string>()));
    return true;
  };
  if (text.find('\0') != std::string::npos) throw BadInput(where + " is not valid JSON: it holds a NUL");  // the parser's end of a text
  try {
    return json::parse(text, callback);
  } catch (const json::exception& e) {
    const std::string what = e.what();  // "[json.exception.parse_error.101] parse error at line 1, column 2: …"
    const size_t code = what.find("] ");
    throw BadInput(fmt::format("{} is not valid JSON: {}", where, what.substr(code == std::string::npos ? 0 : code + 2)));
  }
}

}  // namespace moebius_examples
