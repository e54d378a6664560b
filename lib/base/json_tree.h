// A parsed JSON text that can be given back without memory: nlohmann's own destructor allocates when it meets a nested value, and a
// failure there would end the process.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace moebius {

class JsonTree {
 public:
  explicit JsonTree(nlohmann::json&& root) noexcept : root_(std::move(root)) {}
  JsonTree(JsonTree&&) noexcept = default;
  JsonTree& operator=(JsonTree&&) = delete;
  ~JsonTree() { clear(root_); }
  const nlohmann::json& root() const { return root_; }

 private:
  // Innermost first; as deep as the parser allowed.
  static void clear(nlohmann::json& value) noexcept {
    if (!value.is_structured()) return;
    for (nlohmann::json& child : value) clear(child);
    value.clear();
  }
  nlohmann::json root_;
};

// JSON that nobody vouches for: bounded in depth, and no key twice (the DOM alone would keep the last in silence). `file` is for messages.
// Throws kCorruptModel.
JsonTree parse_json(std::string_view text, const std::string& file);

}  // namespace moebius
