// A regular file of a model's folder, opened for reading: a FIFO, a device or a socket is refused without waiting for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace moebius {

class RegularFile {
 public:
  // Throws kNotFound, kIo, or kCorruptModel for what is no regular file.
  explicit RegularFile(const std::filesystem::path& path);
  ~RegularFile();
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;

  const std::string& name() const { return name_; }
  uint64_t size() const { return size_; }  // when it was opened
  // All of the bytes, or throws kCorruptModel (the file ends before) or kIo.
  void read(uint64_t offset, void* out, size_t bytes) const;

 private:
  std::string name_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

// Throws kCorruptModel beyond max_bytes.
std::string read_text_file(const std::filesystem::path& path, uint64_t max_bytes);

}  // namespace moebius
