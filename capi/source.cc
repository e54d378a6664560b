#include "capi/source.h"

#include <algorithm>

#include <fmt/ranges.h>

#include "capi/guarded.h"

namespace moebius::capi {
namespace {

class MemoryFile final : public ModelFile {
 public:
  MemoryFile(std::string name, std::span<const std::byte> bytes) : ModelFile(std::move(name), bytes.size()), bytes_(bytes) {}
  void read(uint64_t offset, void* out, size_t bytes) const override {
    if (offset > bytes_.size() || bytes > bytes_.size() - offset)
      fail(Code::kCorruptModel, "{}: ends at byte {}, {} were read from {} on", name_, bytes_.size(), bytes, offset);
    if (bytes > 0) std::memcpy(out, bytes_.data() + offset, bytes);
  }

 private:
  std::span<const std::byte> bytes_;
};

class ReaderFile final : public ModelFile {
 public:
  ReaderFile(std::string name, uint64_t size, std::string file, moebius_read_fn read, void* user)
      : ModelFile(std::move(name), size), file_(std::move(file)), read_(read), user_(user) {}
  void read(uint64_t offset, void* out, size_t bytes) const override {
    if (bytes == 0) return;
    if (const int32_t status = read_(user_, file_.c_str(), offset, out, bytes); status != 0)
      fail(Code::kIo, "{}: the host's reader says {} for {} bytes from {} on", name_, status, bytes, offset);
  }

 private:
  const std::string file_;
  moebius_read_fn read_;
  void* user_;
};

// Tensors one after another behind a header that says so: what a safetensors file is.
class TensorsFile final : public ModelFile {
 public:
  TensorsFile(std::string name, const std::map<std::string, HostFiles::Tensor>& tensors) : ModelFile(std::move(name), 0), head_(8, '\0') {
    uint64_t data = 0;
    for (const auto& [tensor, t] : tensors) {
      head_ += fmt::format("{}{}:{{\"dtype\":{},\"shape\":[{}],\"data_offsets\":[{},{}]}}", data_.empty() ? '{' : ',', quoted(tensor),
                           quoted(t.dtype), fmt::join(t.shape, ","), data, data + t.bytes.size());
      data += t.bytes.size();
      data_.push_back(t.bytes);
    }
    head_ += '}';
    const uint64_t header = head_.size() - 8;
    std::memcpy(head_.data(), &header, 8);
    data_.insert(data_.begin(), std::as_bytes(std::span<const char>(head_)));
    for (std::span<const std::byte> part : data_) begins_.push_back(std::exchange(size_, size_ + part.size()));
  }
  void read(uint64_t offset, void* out, size_t bytes) const override {
    if (offset > size_ || bytes > size_ - offset)
      fail(Code::kCorruptModel, "{}: ends at byte {}, {} were read from {} on", name_, size_, bytes, offset);
    auto* to = static_cast<std::byte*>(out);
    auto part = static_cast<size_t>(std::upper_bound(begins_.begin(), begins_.end(), offset) - begins_.begin()) - 1;
    for (; bytes > 0; ++part) {
      const std::span<const std::byte> from = data_[part].subspan(offset - begins_[part]);
      const size_t n = std::min(bytes, from.size());
      if (n > 0) std::memcpy(to, from.data(), n);
      to += n, offset += n, bytes -= n;
    }
  }

 private:
  static std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text)
      if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < 0x20) out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
      else out += c;
    return out + '"';
  }

  std::string head_;                              // the header and its length
  std::vector<std::span<const std::byte>> data_;  // that, then the tensors'
  std::vector<uint64_t> begins_;                  // of each, in the file
};

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

}  // namespace

int64_t HostFiles::size_of(const std::string& file) const {
  if (size_ == nullptr) return -1;
  const int64_t size = size_(user_, file.c_str());
  if (size < -1) fail(Code::kIo, "{}: the host's reader says {} when asked for its size", name_of(file), size);
  return size;
}

bool HostFiles::has(const std::string& file) const {
  if (!tensors_.empty() && (file == kSingle || file == kIndex)) return file == kSingle;
  return memory_.contains(file) || size_of(file) >= 0;
}

std::unique_ptr<ModelFile> HostFiles::open(const std::string& file) const {
  if (!tensors_.empty() && file == kSingle) return std::make_unique<TensorsFile>(name_of(file), tensors_);
  if (const auto it = memory_.find(file); it != memory_.end()) return std::make_unique<MemoryFile>(name_of(file), it->second);
  const int64_t size = size_of(file);
  if (size < 0) fail(Code::kNotFound, "{}: the source has no such file", name_of(file));
  return std::make_unique<ReaderFile>(name_of(file), static_cast<uint64_t>(size), file, read_, user_);
}

}  // namespace moebius::capi

using moebius::Code;
using moebius::fail;
using moebius::capi::check_length;
using moebius::capi::guarded;
using moebius::capi::not_null;

extern "C" {

moebius_status moebius_source_create(const char* name, moebius_source** out_source, moebius_error** err) {
  return guarded(err, [&] {
    not_null(name, "name");
    not_null(out_source, "out_source");
    *out_source = new moebius_source{moebius::capi::HostFiles(name)};
  });
}

void moebius_source_destroy(moebius_source* source) { delete source; }

moebius_status moebius_source_add_memory(moebius_source* source, const char* file_name, const void* data, size_t size, moebius_error** err) {
  return guarded(err, [&] {
    moebius_source& s = not_null(source, "source");
    not_null(file_name, "file_name");
    const auto* bytes = static_cast<const std::byte*>(data);
    if (size > 0) not_null(bytes, "data");
    s.files.add(file_name, {bytes, size});
  });
}

moebius_status moebius_source_add_tensor(moebius_source* source, const char* name, const char* dtype, const int64_t* shape, size_t num_dims,
                                         const void* data, size_t size, moebius_error** err) {
  return guarded(err, [&] {
    moebius_source& s = not_null(source, "source");
    not_null(name, "name");
    not_null(dtype, "dtype");
    check_length("num_dims", num_dims);
    if (num_dims > 0) not_null(shape, "shape");
    const auto* bytes = static_cast<const std::byte*>(data);
    if (size > 0) not_null(bytes, "data");
    s.files.add_tensor(name, dtype, std::vector<int64_t>(shape, shape + num_dims), {bytes, size});
  });
}

moebius_status moebius_source_set_reader(moebius_source* source, moebius_size_fn size_fn, moebius_read_fn read_fn, void* user,
                                         moebius_error** err) {
  return guarded(err, [&] {
    moebius_source& s = not_null(source, "source");
    if (size_fn == nullptr || read_fn == nullptr) fail(Code::kInvalidArgument, "size_fn or read_fn is NULL");
    s.files.set_reader(size_fn, read_fn, user);
  });
}

}  // extern "C"
