// The files of a model that a host keeps in memory or reads itself; tensors that it has by themselves are one file, model.safetensors.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "lib/model/files.h"
#include "moebius/moebius.h"

namespace moebius::capi {

class HostFiles final : public ModelFiles {
 public:
  explicit HostFiles(std::string name) : name_(std::move(name)) {}
  void add(const std::string& file, std::span<const std::byte> bytes) { memory_[file] = bytes; }
  void add_tensor(const std::string& name, std::string dtype, std::vector<int64_t> shape, std::span<const std::byte> bytes) {
    tensors_[name] = {std::move(dtype), std::move(shape), bytes};
  }
  void set_reader(moebius_size_fn size, moebius_read_fn read, void* user) { size_ = size, read_ = read, user_ = user; }

  std::string name() const override { return name_; }
  std::string label() const override { return name_; }
  bool has(const std::string& file) const override;
  std::unique_ptr<ModelFile> open(const std::string& file) const override;

  struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    std::span<const std::byte> bytes;  // the host's
  };

 private:
  int64_t size_of(const std::string& file) const;  // −1: there is none

  std::string name_;
  std::map<std::string, std::span<const std::byte>> memory_;  // the host's bytes
  std::map<std::string, Tensor> tensors_;
  moebius_size_fn size_ = nullptr;
  moebius_read_fn read_ = nullptr;
  void* user_ = nullptr;
};

}  // namespace moebius::capi

struct moebius_source {
  moebius::capi::HostFiles files;
};
