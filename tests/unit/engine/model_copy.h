// A checkpoint's copy that a test may spoil: its config's text, or single weights.
#pragma once

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <nlohmann/json.hpp>

#include "tests/catch.h"

namespace moebius::test {

class ModelCopy {
 public:
  explicit ModelCopy(const std::string& model) {
    char name[] = "/tmp/moebius-model-XXXXXX";
    REQUIRE(mkdtemp(name) != nullptr);
    path_ = name;
    for (const char* file : {"config.json", "generation_config.json", "model.safetensors"})
      std::filesystem::copy_file(std::filesystem::path(model) / file, path_ / file);
  }
  ~ModelCopy() { std::filesystem::remove_all(path_); }
  std::string path() const { return path_.string(); }

  void set(const char* file, const char* key, const nlohmann::json& value) {
    nlohmann::json all = nlohmann::json::parse(std::ifstream(path_ / file));
    all[key] = value;
    std::ofstream(path_ / file) << all;
  }
  void remove(const char* file) { std::filesystem::remove(path_ / file); }

  // The bf16 at this index of a tensor.
  void set_weight(const std::string& tensor, int64_t index, uint16_t bits) {
    std::fstream f(path_ / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    uint64_t size = 0;
    f.read(reinterpret_cast<char*>(&size), 8);
    std::string header(size, '\0');
    f.read(header.data(), static_cast<std::streamsize>(size));
    const int64_t begin = nlohmann::json::parse(header).at(tensor).at("data_offsets").at(0).get<int64_t>();
    f.seekp(static_cast<std::streamoff>(8 + size) + begin + index * 2);
    f.write(reinterpret_cast<const char*>(&bits), 2);
    REQUIRE(f.good());
  }

 private:
  std::filesystem::path path_;
};

}  // namespace moebius::test
