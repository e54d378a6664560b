// The models and clusters that are part of the program, by name.
#pragma once

#include <span>
#include <string>

namespace moebius::plan {

struct Shipped {
  const char* name;
  const char* text;
};
extern const std::span<const Shipped> kClusters, kModels;

// The text of a shipped one or of a file. Throws kNotFound that names those that there are; `what` is for the message.
std::string read_shipped(std::span<const Shipped> all, const std::string& name_or_file, const char* what);

}  // namespace moebius::plan
