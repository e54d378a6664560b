// Large, page-aligned, zero-initialised memory that is committed as it is touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <algorithm>
#include <utility>

#include "lib/base/error.h"
#include "lib/base/numbers.h"

namespace moebius {

// Owns an anonymous mapping. Huge pages are asked for: streaming weights through 4 KiB pages costs a TLB miss a page.
class HostBuffer {
 public:
  HostBuffer() = default;
  explicit HostBuffer(int64_t bytes) : bytes_(static_cast<size_t>(round_up(bytes > 0 ? bytes : 1, kAlignment))) {
    // Over-allocate, so that the start can be aligned to a huge page.
    mapped_bytes_ = bytes_ + kAlignment;
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) {
      mapping_ = nullptr;
      fail(Code::kOutOfMemory, "cannot reserve {} bytes of memory", mapped_bytes_);
    }
    data_ = reinterpret_cast<std::byte*>(round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(mapping_)), kAlignment));
    madvise(data_, bytes_, MADV_HUGEPAGE);  // a hint: refusal is fine
  }
  HostBuffer(HostBuffer&& other) noexcept { *this = std::move(other); }
  HostBuffer& operator=(HostBuffer&& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~HostBuffer() {
    if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
  }

  std::byte* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 2 << 20;  // the huge page of x86-64

  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace moebius
