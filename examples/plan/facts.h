// Facts in a JSON file that a user wrote, each asked for by its key: what is missing or cannot be is refused with the file and the key.
#pragma once

#include <set>
#include <string>

#include <nlohmann/json.hpp>

#include "lib/base/error.h"

namespace moebius::plan {

class Facts {
 public:
  Facts(const nlohmann::json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) fail(Code::kCorruptModel, "{} is {}, must be an object", where_, object.type_name());
  }
  bool has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }
  const nlohmann::json& at(const char* key) const {
    asked_.insert(key);
    if (!has(key)) fail(Code::kCorruptModel, "{}: {} is missing", where_, key);
    return object_[key];
  }
  double number(const char* key, double least, double most) const {
    const nlohmann::json& v = at(key);
    if (!v.is_number() || !(v.get<double>() >= least && v.get<double>() <= most))
      fail(Code::kCorruptModel, "{}: {} is {}, must be a number from {} to {}", where_, key, v.dump(), least, most);
    return v.get<double>();
  }
  double number_or(const char* key, double absent, double least, double most) const {
    asked_.insert(key);
    return has(key) ? number(key, least, most) : absent;
  }
  int64_t integer(const char* key, int64_t least, int64_t most) const {
    const nlohmann::json& v = at(key);
    if (!v.is_number_integer() || number(key, static_cast<double>(least), static_cast<double>(most)) < static_cast<double>(least))
      fail(Code::kCorruptModel, "{}: {} is {}, must be an integer from {} to {}", where_, key, v.dump(), least, most);
    return v.get<int64_t>();
  }
  int64_t integer_or(const char* key, int64_t absent, int64_t least, int64_t most) const {
    asked_.insert(key);
    return has(key) ? integer(key, least, most) : absent;
  }
  std::string text(const char* key) const {
    const nlohmann::json& v = at(key);
    if (!v.is_string()) fail(Code::kCorruptModel, "{}: {} is {}, must be a string", where_, key, v.dump());
    return v.get<std::string>();
  }
  std::string text_or(const char* key, const char* absent) const {
    asked_.insert(key);
    return has(key) ? text(key) : absent;
  }
  Facts facts(const char* key) const { return {at(key), where_ + ": " + key}; }
  const std::string& where() const { return where_; }
  // A misspelt key would change nothing in silence.
  void refuse_others() const {
    for (const auto& [key, value] : object_.items())
      if (asked_.count(key) == 0) fail(Code::kCorruptModel, "{}: {} is not known", where_, key);
  }

 private:
  const nlohmann::json& object_;
  std::string where_;
  mutable std::set<std::string> asked_;
};

}  // namespace moebius::plan
