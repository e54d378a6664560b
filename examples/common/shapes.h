// Models of known shapes, without weights: what benchmarks run with seeded random ones.
#pragma once

#include <string>
#include <vector>

namespace moebius_examples {

// "s", "m", and those of published models.
std::vector<std::string> shape_names();

// A folder with the config.json of a shape, removed at the end.
class ShapeFolder {
 public:
  // layers 0: the shape's.
  explicit ShapeFolder(const std::string& shape, int layers = 0);
  ~ShapeFolder();
  ShapeFolder(const ShapeFolder&) = delete;
  ShapeFolder& operator=(const ShapeFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace moebius_examples
