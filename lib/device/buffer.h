// Large, page-aligned, zero-initialised memory of the host that is committed as it is touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "lib/base/error.h"
#include "lib/base/numbers.h"

namespace moebius {

inline constexpr int64_t kHugePage = 2 << 20;  // of x86-64

// An anonymous mapping of `bytes`, rounded up to huge pages and aligned to them. Huge pages are asked for: streaming weights through
// 4 KiB pages costs a TLB miss a page.
inline std::byte* map_memory(int64_t bytes) {
  const int64_t size = round_up(bytes > 0 ? bytes : 1, kHugePage), with_slack = size + kHugePage;
  void* mapping = mmap(nullptr, static_cast<size_t>(with_slack), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) fail(Code::kOutOfMemory, "cannot reserve {} bytes of memory", with_slack);
  std::byte* begin = static_cast<std::byte*>(mapping);
  std::byte* data = reinterpret_cast<std::byte*>(round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin)), kHugePage));
  if (data > begin) munmap(begin, static_cast<size_t>(data - begin));
  if (data + size < begin + with_slack) munmap(data + size, static_cast<size_t>(begin + with_slack - (data + size)));
  madvise(data, static_cast<size_t>(size), MADV_HUGEPAGE);  // a hint: refusal is fine
  return data;
}

inline void unmap_memory(std::byte* data, int64_t bytes) noexcept {
  munmap(data, static_cast<size_t>(round_up(bytes > 0 ? bytes : 1, kHugePage)));
}

// Owns such a mapping.
class HostBuffer {
 public:
  HostBuffer() = default;
  explicit HostBuffer(int64_t bytes) : bytes_(bytes), data_(map_memory(bytes)) {}
  HostBuffer(HostBuffer&& other) noexcept { *this = std::move(other); }
  HostBuffer& operator=(HostBuffer&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~HostBuffer() {
    if (data_ != nullptr) unmap_memory(data_, bytes_);
  }

  std::byte* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
  std::byte* data_ = nullptr;
};

}  // namespace moebius
