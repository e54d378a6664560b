#include "lib/model/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "lib/base/error.h"

namespace moebius {
namespace {

class RegularFile final : public ModelFile {
 public:
  RegularFile(std::string name, int descriptor, uint64_t size) : ModelFile(std::move(name), size), descriptor_(descriptor) {}
  ~RegularFile() override { close(descriptor_); }

  void read(uint64_t offset, void* out, size_t bytes) const override {
    for (size_t done = 0; done < bytes;) {
      const ssize_t n = pread(descriptor_, static_cast<char*>(out) + done, bytes - done, static_cast<off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail(Code::kIo, "{}: cannot be read: {}", name_, std::strerror(errno));
      if (n == 0) fail(Code::kIo, "{}: ends at byte {}, {} were read from there on", name_, offset + done, bytes - done);
      done += static_cast<size_t>(n);
    }
  }

 private:
  int descriptor_;
};

}  // namespace

FolderFiles::FolderFiles(std::filesystem::path folder) : folder_(std::move(folder)) {
  std::error_code error;
  if (!std::filesystem::is_directory(folder_, error))
    fail(Code::kNotFound, "'{}': no such directory; a model is a folder with config.json and *.safetensors", folder_.string());
}

std::string FolderFiles::label() const {
  const std::filesystem::path path = std::filesystem::absolute(folder_).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();  // "a/b/" has an empty file name
}

bool FolderFiles::has(const std::string& file) const {
  std::error_code error;
  return std::filesystem::exists(folder_ / file, error);
}

std::unique_ptr<ModelFile> FolderFiles::open(const std::string& file) const {
  const std::string name = (folder_ / file).string();
  const int descriptor = ::open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO may not block us
  if (descriptor < 0) fail(errno == ENOENT ? Code::kNotFound : Code::kIo, "{}: {}", name, std::strerror(errno));
  struct stat status {};
  if (fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode))
    return std::make_unique<RegularFile>(name, descriptor, static_cast<uint64_t>(status.st_size));
  close(descriptor);
  fail(Code::kCorruptModel, "{}: is not a regular file", name);
}

std::string read_text(const ModelFiles& files, const std::string& file, uint64_t max_bytes) {
  const std::unique_ptr<ModelFile> opened = files.open(file);
  if (opened->size() > max_bytes)
    fail(Code::kCorruptModel, "{}: has {} bytes, at most {} are read", opened->name(), opened->size(), max_bytes);
  std::string text(opened->size(), '\0');
  opened->read(0, text.data(), text.size());
  return text;
}

}  // namespace moebius
