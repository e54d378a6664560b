// Makes model folders and safetensors files, right and wrong ones, in a temporary folder.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace moebius::test {

inline const std::string kData = MOEBIUS_TEST_DATA;

class TempFolder {
 public:
  TempFolder() {
    char name[] = "/tmp/moebius-test-XXXXXX";
    path_ = mkdtemp(name);
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// 8 bytes of header length, the header, `data_bytes` zero bytes.
inline std::string safetensors(const std::string& header, size_t data_bytes) {
  std::string out(8, '\0');
  const uint64_t n = header.size();
  std::memcpy(out.data(), &n, 8);
  return out + header + std::string(data_bytes, '\0');
}

inline std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" + offsets + "]}";
}

// A checkpoint's tensors in memory, to be changed and written again.
struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using Tensors = std::map<std::string, StoredTensor>;

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline Tensors read_tensors(const std::filesystem::path& path) {
  const std::string file = read_file(path);
  uint64_t header = 0;
  std::memcpy(&header, file.data(), 8);
  const nlohmann::json entries = nlohmann::json::parse(file.substr(8, header));
  Tensors out;
  for (const auto& [name, info] : entries.items()) {
    if (name == "__metadata__") continue;
    const uint64_t begin = info["data_offsets"][0], end = info["data_offsets"][1];
    out[name] = {info["dtype"], info["shape"], file.substr(8 + header + begin, end - begin)};
  }
  return out;
}

// Of a model's folder, all shards.
inline Tensors read_tensors_of(const std::filesystem::path& folder) {
  Tensors out;
  for (const auto& file : std::filesystem::directory_iterator(folder))
    if (file.path().extension() == ".safetensors" && file.path().filename() != "reference.safetensors") out.merge(read_tensors(file.path()));
  return out;
}

// In the order of their names; header_padding spaces end the header, so that the data begin at any address.
inline void write_tensors(const std::filesystem::path& path, const Tensors& tensors, size_t header_padding = 0) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, t] : tensors) {
    header[name] = {{"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {data.size(), data.size() + t.bytes.size()}}};
    data += t.bytes;
  }
  std::filesystem::remove(path);  // a link to a shipped file stays what it is
  write_file(path, safetensors(header.dump() + std::string(header_padding, ' '), 0) + data);
}

}  // namespace moebius::test
