#include "lib/base/json_tree.h"

#include <unordered_set>
#include <vector>

#include "lib/base/error.h"

namespace moebius {

using nlohmann::json;

JsonTree parse_json(std::string_view text, const std::string& file) {
  constexpr int kMaxDepth = 32;  // what is read has a few levels, and whoever walks it may recurse
  std::vector<std::unordered_set<std::string>> keys;  // of the objects that are open; a vocabulary has 150,000
  const json::parser_callback_t watch = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kMaxDepth) fail(Code::kCorruptModel, "{}: nested deeper than {} levels", file, kMaxDepth);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(parsed.get_ref<const std::string&>()).second)
      fail(Code::kCorruptModel, "{}: key '{}' is given twice", file, parsed.get_ref<const std::string&>());
    return true;
  };
  if (text.find('\0') != std::string_view::npos) fail(Code::kCorruptModel, "{}: not valid JSON: it holds a NUL", file);  // the parser's end of a text
  try {
    return JsonTree(json::parse(text.begin(), text.end(), watch));
  } catch (const json::exception& e) {
    fail(Code::kCorruptModel, "{}: not valid JSON: {}", file, e.what());
  }
}

}  // namespace moebius
