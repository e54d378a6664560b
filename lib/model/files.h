// Where a model's files come from: a folder, or whatever a host reads them from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace moebius {

// One file, read by any number of threads.
class ModelFile {
 public:
  ModelFile(std::string name, uint64_t size) : name_(std::move(name)), size_(size) {}
  virtual ~ModelFile() = default;
  ModelFile(const ModelFile&) = delete;
  ModelFile& operator=(const ModelFile&) = delete;

  const std::string& name() const { return name_; }  // for messages
  uint64_t size() const { return size_; }            // when it was opened
  // All of the bytes, or throws kCorruptModel (the file ends before) or kIo.
  virtual void read(uint64_t offset, void* out, size_t bytes) const = 0;

 protected:
  const std::string name_;
  uint64_t size_;
};

// A model's files by their plain names. Any thread.
class ModelFiles {
 public:
  virtual ~ModelFiles() = default;
  virtual std::string name() const = 0;   // of all of it, for messages
  virtual std::string label() const = 0;  // a short one, for metrics
  virtual bool has(const std::string& file) const = 0;
  virtual std::unique_ptr<ModelFile> open(const std::string& file) const = 0;  // throws kNotFound, kIo, kCorruptModel
  std::string name_of(const std::string& file) const { return name() + "/" + file; }
};

// A folder's regular files: a FIFO, a device or a socket is refused (kCorruptModel) without waiting for it.
class FolderFiles final : public ModelFiles {
 public:
  explicit FolderFiles(std::filesystem::path folder);  // throws kNotFound
  std::string name() const override { return folder_.string(); }
  std::string label() const override;
  bool has(const std::string& file) const override;
  std::unique_ptr<ModelFile> open(const std::string& file) const override;

 private:
  std::filesystem::path folder_;
};

// Throws kCorruptModel beyond max_bytes.
std::string read_text(const ModelFiles& files, const std::string& file, uint64_t max_bytes);

}  // namespace moebius
