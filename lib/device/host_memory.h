// Large memory of the host as an engine takes it: mapped by the library, or given by its host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace moebius {

struct HostAllocator {
  std::function<void*(size_t bytes, size_t alignment)> allocate;  // null: there is no more. The contents may be anything
  std::function<void(void* memory, size_t bytes)> release;
  explicit operator bool() const { return allocate != nullptr; }
};

}  // namespace moebius
