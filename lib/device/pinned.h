// Memory of the host that a device reads from and writes to without a copy in between.
#pragma once

#include <utility>

#include "lib/device/buffer.h"
#include "lib/device/device.h"

namespace moebius {

class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(Device& device, int64_t bytes) : device_(&device), memory_(bytes) { device.pin(memory_.data(), memory_.bytes()); }
  PinnedBuffer(PinnedBuffer&& other) noexcept { *this = std::move(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~PinnedBuffer() {
    if (device_ != nullptr) device_->unpin(memory_.data());
  }
  std::byte* data() const { return memory_.data(); }

 private:
  Device* device_ = nullptr;
  HostBuffer memory_;
};

}  // namespace moebius
