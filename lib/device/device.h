// Where ranks keep their memory and do their work: host memory and the threads that call (the CPU), or devices and streams (CUDA).
//
// A Device serves one world. What a rank asks for is done in the order asked, on its queue; where host_memory(), when it is asked.
// Memory of one rank can be read and written by what any rank queues, unless there are collectives(); by the host only where host_memory().
// Every function may be called by the threads of its rank; those of several ranks at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <utility>

#include "lib/device/collectives.h"
#include "lib/device/ops.h"

namespace moebius {

inline constexpr int64_t kKeptBlockBytes = 24;  // of a rank's memory, for each block that is kept

class Device {
 public:
  virtual ~Device() = default;
  virtual const char* name() const = 0;
  virtual bool host_memory() const = 0;
  virtual const Ops& ops() const = 0;
  virtual int place(int rank) const = 0;            // ranks of one place share its memory: a device's number
  virtual int64_t total_bytes(int rank) const = 0;  // of the rank's place
  virtual int64_t free_bytes(int rank) const = 0;   // the rank's share of what its place has to give now

  // Zeroed, aligned to 256 bytes at least. Throws kOutOfMemory.
  virtual std::byte* allocate(int rank, int64_t bytes) = 0;
  virtual void release(int rank, std::byte* memory, int64_t bytes) noexcept = 0;

  // What ops queue on (Lane::queue).
  virtual void* queue(int rank) = 0;
  // From the host's memory into the rank's; `from` may be used again on return, or, where it is pinned, once the rank is idle.
  virtual void write(int rank, void* to, const void* from, int64_t bytes) = 0;
  // From the rank's memory into the host's: `height` rows of `width` bytes. What was read is there once the rank is idle().
  virtual void read(int rank, void* to, int64_t to_pitch, const void* from, int64_t from_pitch, int64_t width, int64_t height) = 0;
  // Host memory that is often read into or written from: it goes there directly, and read() never waits. (Elsewhere it may wait for the rank.)
  virtual void pin(void* /*host*/, int64_t /*bytes*/) {}
  virtual void unpin(void* /*host*/) noexcept {}
  // From a rank's memory into this rank's.
  virtual void copy(int rank, void* to, int from_rank, const void* from, int64_t bytes) = 0;
  // The same of a block that is written once and read much later (a switch): bytes a multiple of 64, addresses aligned to it. Blocks need not
  // begin before finish_blocks(rank), and are in order with what is queued afterwards.
  virtual void copy_block(int rank, void* to, int from_rank, const void* from, int64_t bytes) = 0;
  virtual void finish_blocks(int rank) = 0;
  // Keeps the blocks that were asked for and not yet begun, as a table in the rank's memory (kKeptBlockBytes for each, and once more), instead
  // of copying them; its number. Copying bytes [begin, end) of its blocks laid end to end, multiples of 64, then needs nothing of the host. Not
  // where host_memory().
  virtual int keep_blocks(int /*rank*/) { return -1; }
  virtual void copy_kept(int /*rank*/, int /*number*/, int64_t /*begin*/, int64_t /*end*/) {}

  // Where ranks do not read each other's memory, what they use instead; else null.
  virtual Collectives* collectives() { return nullptr; }

  // Orders ranks: what any rank queued before its mark comes before what this one queues after passing. Between mark and pass stands
  // a barrier of all ranks' threads.
  virtual void mark(int rank) = 0;
  virtual void pass(int rank) = 0;
  // By one thread while no rank is at work: from now on all have set as many. In a region that fails they may have set different numbers.
  virtual void align_marks() {}
  // Captured work: what a rank queues between is kept, to be done again and again, and not done now. Each rank begins and ends its own; or,
  // where they capture together, it is one for all of them: rank 0 begins and ends it, the others join after it has begun, and rank 0 passes
  // their last marks before it ends. Reading, writing and idle() are not for captured work. Where can_capture() is false nothing of it may
  // be called.
  virtual bool can_capture() const { return false; }
  virtual bool captures_together() const { return false; }
  virtual void begin_capture(int /*rank*/) {}
  virtual void join_capture(int /*rank*/) {}            // rank 0's
  virtual int end_capture(int /*rank*/) { return -1; }  // its number, counted for each rank
  virtual void replay(int /*rank*/, int /*number*/) {}  // queues what this rank began and ended
  virtual void forget_captures(int /*rank*/) {}         // gives up what it ended; numbers begin again. The rank is idle
  // What the runtime of the device keeps for the calling thread (CUDA's current device): the host's, which a call into the library must
  // leave as it was (CallersDevice).
  virtual int current() { return 0; }
  virtual void set_current(int /*current*/) {}
  // Whether everything that the rank has queued is done. Throws what went wrong meanwhile.
  virtual bool idle(int rank) = 0;
};

// At the end of a scope that is left by an exception: waits until what the rank has queued is done, so that it writes nothing more
// once its thread has stopped. (A device that never ends keeps its thread, which the world then takes for stuck.)
class DrainOnError {
 public:
  DrainOnError(Device& device, int rank) : device_(device), rank_(rank), exceptions_(std::uncaught_exceptions()) {}
  ~DrainOnError() {
    if (std::uncaught_exceptions() == exceptions_) return;
    try {
      if (Collectives* collectives = device_.collectives()) collectives->give_up(rank_);
      device_.finish_blocks(rank_);
      while (!device_.idle(rank_)) {
      }
    } catch (...) {  // it has stopped by an error of its own
    }
  }
  DrainOnError(const DrainOnError&) = delete;
  DrainOnError& operator=(const DrainOnError&) = delete;

 private:
  Device& device_;
  int rank_, exceptions_;
};

// Keeps the calling thread's current device for the time of a scope.
class CallersDevice {
 public:
  explicit CallersDevice(Device& device) : device_(device) { take(); }
  ~CallersDevice() { restore(); }
  void take() { before_ = device_.current(); }
  void restore() { device_.set_current(before_); }
  CallersDevice(const CallersDevice&) = delete;
  CallersDevice& operator=(const CallersDevice&) = delete;

 private:
  Device& device_;
  int before_ = 0;
};

// Owns memory of a rank.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device& device, int rank, int64_t bytes)
      : device_(&device), rank_(rank), bytes_(bytes), data_(bytes > 0 ? device.allocate(rank, bytes) : nullptr) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(rank_, other.rank_);
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) device_->release(rank_, data_, bytes_);
  }

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  Device* device_ = nullptr;
  int rank_ = 0;
  int64_t bytes_ = 0;
  std::byte* data_ = nullptr;
};

}  // namespace moebius
