#include "examples/plan/shipped.h"

#include <filesystem>
#include <fstream>
#include <iterator>

#include "examples/plan/shipped_texts.h"  // generated from clusters/ and models/
#include "lib/base/error.h"

namespace moebius::plan {

const std::span<const Shipped> kClusters = kClusterTexts, kModels = kModelTexts;

std::string read_shipped(std::span<const Shipped> all, const std::string& name, const char* what) {
  std::string known;
  for (const Shipped& s : all) {
    if (name == s.name) return s.text;
    known += (known.empty() ? "" : ", ") + std::string(s.name);
  }
  const std::filesystem::path path = std::filesystem::is_directory(name) ? std::filesystem::path(name) / "config.json" : std::filesystem::path(name);
  std::ifstream in(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(in), {}};
  if (!in || !std::filesystem::is_regular_file(path)) fail(Code::kNotFound, "{}: no such file, and no {} that is known: {}", name, what, known);
  return text;
}

}  // namespace moebius::plan
