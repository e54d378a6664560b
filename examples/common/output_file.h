// A file for results beside stdout.
#pragma once

#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "examples/common/program.h"

namespace moebius_examples {

// Is opened before anything runs, so that a bad path costs nothing; what it held is kept until start(). That something could not be written
// is told at the end, by close().
class OutputFile {
 public:
  // None where the path is empty.
  OutputFile(const std::string& path, const char* flag) : path_(path) {
    if (path.empty()) return;
    file_ = std::fopen(path.c_str(), "ab");
    if (file_ == nullptr) throw BadInput(fmt::format("{}: cannot write {}: {}", flag, path, std::strerror(errno)));
    if (is_same_file(fileno(file_), STDOUT_FILENO)) {
      std::fclose(file_);
      throw BadInput(fmt::format("{}: {} is the file that stdout goes to", flag, path));
    }
  }
  ~OutputFile() {
    if (file_ != nullptr) std::fclose(file_);
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  explicit operator bool() const { return file_ != nullptr; }
  bool is_same_file(const OutputFile& other) const {
    return file_ != nullptr && other.file_ != nullptr && is_same_file(fileno(file_), fileno(other.file_));
  }
  void start() {
    if (file_ != nullptr && ftruncate(fileno(file_), 0) != 0 && errno != EINVAL)
      throw std::runtime_error("cannot write " + path_);  // EINVAL: a pipe
  }
  void write(const void* data, size_t bytes) { std::fwrite(data, 1, bytes, file_); }
  void close() {
    if (file_ == nullptr) return;
    const bool whole = std::ferror(file_) == 0;
    if (std::fclose(std::exchange(file_, nullptr)) != 0 || !whole) throw std::runtime_error("cannot write " + path_);
  }
  // All of it.
  void fill(const std::string& text) {
    start();
    write(text.data(), text.size());
    close();
  }

 private:
  // Devices and pipes take what several write.
  static bool is_same_file(int one, int other) {
    struct stat a, b;
    return fstat(one, &a) == 0 && fstat(other, &b) == 0 && S_ISREG(a.st_mode) && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
  }

  std::string path_;
  std::FILE* file_ = nullptr;
};

}  // namespace moebius_examples
