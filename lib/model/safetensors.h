// Reading safetensors files that nobody vouches for: everything is checked before anything is allocated from it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moebius {

enum class Dtype { kBf16, kF16, kF32, kOther };

struct TensorInfo {
  Dtype dtype = Dtype::kOther;
  std::string dtype_name;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes from the start of the file's data
};

// One file, mapped read-only. A file that shrinks while it is mapped ends the process with SIGBUS, as any mapped file does;
// its size is checked again after mapping.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& name() const { return name_; }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  // Unaligned bytes of a tensor of this file.
  const std::byte* data(const TensorInfo& tensor) const { return mapping_ + data_start_ + tensor.begin; }

 private:
  std::string name_;
  std::byte* mapping_ = nullptr;
  uint64_t size_ = 0, data_start_ = 0;
  std::map<std::string, TensorInfo> tensors_;
};

// Parses a header (the JSON text) for a file whose data has data_bytes bytes. `file` is for messages.
std::map<std::string, TensorInfo> parse_safetensors_header(const std::string& file, std::string_view json, uint64_t data_bytes);

// A folder with model.safetensors, or model.safetensors.index.json and its shards.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& model_dir);

  struct Tensor {
    const SafetensorsFile* file = nullptr;
    const TensorInfo* info = nullptr;
    const std::byte* data() const { return file->data(*info); }
  };
  const Tensor* find(const std::string& name) const;
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const std::string& name() const { return name_; }

 private:
  void read_index(const std::filesystem::path& model_dir, const std::filesystem::path& index);

  std::string name_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace moebius
