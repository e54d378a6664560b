// Checked reading of untrusted JSON: every value knows its path ("pre_tokenizer.pretokenizers[1].pattern"), so that
// what is missing or of the wrong type is reported by place and fact. All complaints are Error(kCorruptModel).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lib/base/json_tree.h"

namespace moebius::tokenizer {

// Borrows a value of a tree that outlives it.
class JsonNode {
 public:
  JsonNode(const nlohmann::json& value, std::string path) : value_(&value), path_(std::move(path)) {}

  const std::string& path() const { return path_; }
  const nlohmann::json& value() const { return *value_; }

  JsonNode at(std::string_view key) const;                   // required member of an object
  std::optional<JsonNode> find(std::string_view key) const;  // none if absent or null
  std::vector<JsonNode> elements() const;                    // of an array
  const nlohmann::json& object() const;                      // the value itself, known to be an object

  const std::string& as_string() const;
  bool as_bool() const;
  int32_t as_id() const;  // an integer in [0, 2³¹)

  bool bool_or(std::string_view key, bool absent) const;
  // The member "type", which names the kind of a component.
  const std::string& type() const { return at("type").as_string(); }

 private:
  JsonNode child(const nlohmann::json& value, std::string_view key) const;
  [[noreturn]] void fail_type(std::string_view expected) const;

  const nlohmann::json* value_;
  std::string path_;  // empty: the whole file
};

}  // namespace moebius::tokenizer
