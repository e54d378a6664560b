#include "lib/model/regular_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "lib/base/error.h"

namespace moebius {

RegularFile::RegularFile(const std::filesystem::path& path)
    : name_(path.string()), descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {  // a FIFO may not block us
  if (descriptor_ < 0) fail(errno == ENOENT ? Code::kNotFound : Code::kIo, "{}: {}", name_, std::strerror(errno));
  struct stat status {};
  if (fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(std::exchange(descriptor_, -1));
    fail(Code::kCorruptModel, "{}: is not a regular file", name_);
  }
  size_ = static_cast<uint64_t>(status.st_size);
}

RegularFile::~RegularFile() { close(descriptor_); }

void RegularFile::read(uint64_t offset, void* out, size_t bytes) const {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = pread(descriptor_, static_cast<char*>(out) + done, bytes - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(Code::kIo, "{}: cannot be read: {}", name_, std::strerror(errno));
    if (n == 0) fail(Code::kCorruptModel, "{}: ends at byte {}, {} were read from there on", name_, offset + done, bytes - done);
    done += static_cast<size_t>(n);
  }
}

std::string read_text_file(const std::filesystem::path& path, uint64_t max_bytes) {
  const RegularFile file(path);
  if (file.size() > max_bytes) fail(Code::kCorruptModel, "{}: has {} bytes, at most {} are read", file.name(), file.size(), max_bytes);
  std::string text(file.size(), '\0');
  file.read(0, text.data(), text.size());
  return text;
}

}  // namespace moebius
