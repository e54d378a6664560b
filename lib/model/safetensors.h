// Reading safetensors files that nobody vouches for: everything is checked before anything is allocated from it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lib/model/files.h"

namespace moebius {

enum class Dtype { kBf16, kF16, kF32, kOther };

struct TensorInfo {
  Dtype dtype = Dtype::kOther;
  std::string dtype_name;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes from the start of the file's data
};

// One file, read piece by piece: one that shrinks or cannot be read while it is open is an error with a message, where a mapping
// would end the host process with SIGBUS.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(std::unique_ptr<ModelFile> file);

  const std::string& name() const { return file_->name(); }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  // Bytes [offset, offset + bytes) of a tensor of this file. Throws kCorruptModel where the file ends early, or kIo; the message
  // names the file, the tensor and the offset. Any number of threads may read.
  void read(const std::string& tensor, const TensorInfo& info, uint64_t offset, void* out, size_t bytes) const;

 private:
  std::unique_ptr<ModelFile> file_;
  uint64_t data_start_ = 0;
  std::map<std::string, TensorInfo> tensors_;
};

// Parses a header (the JSON text) for a file whose data has data_bytes bytes. `file` is for messages.
std::map<std::string, TensorInfo> parse_safetensors_header(const std::string& file, std::string_view json, uint64_t data_bytes);

// model.safetensors, or model.safetensors.index.json and its shards. Of `files` nothing is kept but what it opened.
class Checkpoint {
 public:
  explicit Checkpoint(const ModelFiles& files);
  explicit Checkpoint(const std::filesystem::path& model_dir) : Checkpoint(FolderFiles(model_dir)) {}

  struct Tensor {
    const SafetensorsFile* file = nullptr;
    const std::string* name = nullptr;
    const TensorInfo* info = nullptr;
    void read(uint64_t offset, void* out, size_t bytes) const { file->read(*name, *info, offset, out, bytes); }
  };
  const Tensor* find(const std::string& name) const;
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const std::string& name() const { return name_; }

 private:
  void read_index(const ModelFiles& files, const std::string& index);

  std::string name_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace moebius
