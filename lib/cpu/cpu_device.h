// The host as a device: a rank's threads compute when they are asked to, and all ranks share one memory.
#pragma once

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "lib/cpu/stream_copy.h"
#include "lib/device/buffer.h"
#include "lib/device/device.h"
#include "lib/device/host_memory.h"

namespace moebius {

class CpuDevice final : public Device {
 public:
  CpuDevice(int ranks, const Ops& ops, HostAllocator allocator = {}) : ranks_(ranks), ops_(ops), allocator_(std::move(allocator)) {}
  const char* name() const override { return "cpu"; }
  bool host_memory() const override { return true; }
  const Ops& ops() const override { return ops_; }
  int place(int) const override { return 0; }
  int64_t total_bytes(int) const override { return pages_bytes(_SC_PHYS_PAGES); }
  int64_t free_bytes(int) const override { return available_bytes() / 2 / ranks_; }  // the host has other work

  std::byte* allocate(int, int64_t bytes) override {
    if (!allocator_) return map_memory(bytes);
    void* const memory = allocator_.allocate(static_cast<size_t>(bytes), kAlignment);
    if (memory == nullptr) fail(Code::kOutOfMemory, "the host's allocator has no {} bytes", bytes);
    if (reinterpret_cast<uintptr_t>(memory) % kAlignment != 0) {
      allocator_.release(memory, static_cast<size_t>(bytes));
      fail(Code::kInvalidArgument, "the host's allocator gave memory that is not aligned to {} bytes", kAlignment);
    }
    return static_cast<std::byte*>(std::memset(memory, 0, static_cast<size_t>(bytes)));
  }
  void release(int, std::byte* memory, int64_t bytes) noexcept override {
    if (allocator_) allocator_.release(memory, static_cast<size_t>(bytes));
    else unmap_memory(memory, bytes);
  }

  void* queue(int) override { return nullptr; }
  void write(int, void* to, const void* from, int64_t bytes) override { std::memcpy(to, from, static_cast<size_t>(bytes)); }
  void read(int, void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height) override {
    for (int64_t i = 0; i < height; ++i)
      std::memcpy(static_cast<std::byte*>(to) + i * to_pitch, static_cast<const std::byte*>(from) + i * from_pitch, static_cast<size_t>(width));
  }
  void copy(int, void* to, int, const void* from, int64_t bytes) override { std::memcpy(to, from, static_cast<size_t>(bytes)); }
  void copy_block(int, void* to, int, const void* from, int64_t bytes) override { stream_copy(to, from, bytes); }
  void finish_blocks(int) override { stream_fence(); }

  void mark(int) override {}
  void pass(int) override {}
  bool idle(int) override { return true; }

 private:
  static int64_t pages_bytes(int kind) { return static_cast<int64_t>(sysconf(kind)) * static_cast<int64_t>(sysconf(_SC_PAGE_SIZE)); }
  // What the system could give: files that it caches (the model's, once it was read) are no memory in use.
  static int64_t available_bytes() {
    std::ifstream file("/proc/meminfo");
    for (std::string key; file >> key; file.ignore(std::numeric_limits<std::streamsize>::max(), '\n'))
      if (int64_t kib = 0; key == "MemAvailable:" && file >> kib) return kib * 1024;
    return pages_bytes(_SC_AVPHYS_PAGES);
  }

  static constexpr size_t kAlignment = 4096;

  int ranks_;
  const Ops& ops_;
  const HostAllocator allocator_;
};

}  // namespace moebius
