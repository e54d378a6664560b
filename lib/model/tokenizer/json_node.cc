#include "lib/model/tokenizer/json_node.h"

#include <limits>

#include "lib/base/error.h"

namespace moebius::tokenizer {

using nlohmann::json;

JsonNode JsonNode::child(const json& value, std::string_view key) const {
  return {value, path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key)};
}

void JsonNode::fail_type(std::string_view expected) const {
  fail(Code::kCorruptModel, "{} is a JSON {}, not {}", path_.empty() ? "the file" : path_, value_->type_name(),
       expected);
}

const json& JsonNode::object() const {
  if (!value_->is_object()) fail_type("an object");
  return *value_;
}

std::optional<JsonNode> JsonNode::find(std::string_view key) const {
  const auto member = object().find(key);
  if (member == value_->end() || member->is_null()) return std::nullopt;
  return child(*member, key);
}

JsonNode JsonNode::at(std::string_view key) const {
  std::optional<JsonNode> member = find(key);
  if (!member) fail(Code::kCorruptModel, "{}{}\"{}\" is missing", path_, path_.empty() ? "" : ": ", key);
  return *member;
}

std::vector<JsonNode> JsonNode::elements() const {
  if (!value_->is_array()) fail_type("an array");
  std::vector<JsonNode> elements;
  elements.reserve(value_->size());
  for (const json& element : *value_) elements.emplace_back(element, fmt::format("{}[{}]", path_, elements.size()));
  return elements;
}

const std::string& JsonNode::as_string() const {
  if (!value_->is_string()) fail_type("a string");
  return value_->get_ref<const std::string&>();
}

bool JsonNode::as_bool() const {
  if (!value_->is_boolean()) fail_type("true or false");
  return value_->get<bool>();
}

int32_t JsonNode::as_id() const {
  if (!value_->is_number_integer()) fail_type("an integer");
  const bool fits = value_->is_number_unsigned() && value_->get<uint64_t>() <= std::numeric_limits<int32_t>::max();
  if (!fits) fail(Code::kCorruptModel, "{} is {}, which is no token id", path_, value_->dump());
  return value_->get<int32_t>();
}

bool JsonNode::bool_or(std::string_view key, bool absent) const {
  const std::optional<JsonNode> member = find(key);
  return member ? member->as_bool() : absent;
}

}  // namespace moebius::tokenizer
