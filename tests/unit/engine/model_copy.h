// A checkpoint's copy that a test may change: its config's text, single weights, or all of them.
#pragma once

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
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
    for (const auto& entry : std::filesystem::directory_iterator(model))
      if (const std::string file = entry.path().filename(); file.find("reference") == std::string::npos)
        std::filesystem::copy_file(entry.path(), path_ / file);
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

  using Choice = std::function<bool(const std::string& tensor)>;

  // Other weights throughout, or in these tensors: signs, and sizes by tensor, so that a layer's largest values and with them its scales are
  // others.
  void change_all(const Choice& chosen = [](const std::string&) { return true; }) {
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      if (entry.path().extension() != ".safetensors") continue;
      std::fstream f(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
      std::string bytes((std::istreambuf_iterator<char>(f)), {});
      uint64_t header = 0;
      std::memcpy(&header, bytes.data(), 8);
      const nlohmann::json tensors = nlohmann::json::parse(bytes.substr(8, header));
      for (const auto& [name, info] : tensors.items()) {
        if (name == "__metadata__" || !chosen(name)) continue;
        REQUIRE(info.at("dtype") == "BF16");
        const auto& offsets = info.at("data_offsets");
        change(name, bytes.data() + 8 + header + offsets.at(0).get<size_t>(), offsets.at(1).get<size_t>() - offsets.at(0).get<size_t>());
      }
      f.seekp(0);
      f.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
      REQUIRE(f.good());
    }
  }

  // Of model.safetensors only these tensors, and no config.
  void keep(const Choice& chosen) {
    const auto path = path_ / "model.safetensors";
    std::ifstream in(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), {});
    uint64_t size = 0;
    std::memcpy(&size, bytes.data(), 8);
    const nlohmann::json tensors = nlohmann::json::parse(bytes.substr(8, size));
    nlohmann::json kept = nlohmann::json::object();
    std::string data;
    for (const auto& [name, info] : tensors.items()) {
      if (name == "__metadata__" || !chosen(name)) continue;
      const size_t begin = info.at("data_offsets").at(0), end = info.at("data_offsets").at(1);
      kept[name] = {{"dtype", info.at("dtype")}, {"shape", info.at("shape")}, {"data_offsets", {data.size(), data.size() + end - begin}}};
      data += bytes.substr(8 + size + begin, end - begin);
    }
    const std::string header = kept.dump();
    size = header.size();
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(&size), 8) << header << data;
    remove("config.json");
  }

 private:
  static void change(const std::string& name, char* values, size_t bytes) {
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    const int doublings = has("v_proj") ? 3 : has("o_proj") ? -12 : has("down_proj") || has("w2") ? -14 : has("norm") ? 1 : 0;
    for (size_t i = 0; i < bytes; i += 2) {
      uint16_t bits;
      std::memcpy(&bits, values + i, 2);
      if (i % 6 == 0 && doublings == 0) bits ^= 0x8000;
      if ((bits & 0x7f80) > 20 << 7) bits = static_cast<uint16_t>(bits + doublings * (1 << 7));
      std::memcpy(values + i, &bits, 2);
    }
  }

  std::filesystem::path path_;
};

}  // namespace moebius::test
