// The engine's outgoing events: pushed by the stepping thread, polled by any. A ring that grows only while nobody polls, and for events
// that are promised room. A step shows its events when it has published what they count for, so that a host which has seen one finds it in
// the statistics.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "lib/base/error.h"
#include "lib/base/time.h"
#include "lib/runtime/event.h"

namespace moebius {

class EventQueue {
 public:
  explicit EventQueue(size_t capacity) : ring_(capacity) {}
  ~EventQueue() {
    if (fd_ >= 0) close(fd_);
  }
  EventQueue(const EventQueue&) = delete;
  EventQueue& operator=(const EventQueue&) = delete;

  // A descriptor that is readable while there are events; made when first asked for, closed with the queue. Only to be waited on.
  int descriptor() {
    std::lock_guard lock(mutex_);
    if (fd_ < 0) {
      fd_ = eventfd(count_ > 0 ? 1 : 0, EFD_NONBLOCK | EFD_CLOEXEC);
      if (fd_ < 0) fail(Code::kOutOfMemory, "the system gives no event descriptor: too many files are open");
    }
    return fd_;
  }

  void push(Event&& event) {
    std::lock_guard lock(mutex_);
    make_room(1);
    append(std::move(event));
  }

  // Room for so many events, kept whatever else is pushed: their push_promised cannot fail.
  void promise(size_t num) {
    std::lock_guard lock(mutex_);
    make_room(num);
    promised_ += num;
  }
  void push_promised(Event&& event) {
    std::lock_guard lock(mutex_);
    --promised_;
    append(std::move(event));
  }
  void forgo_promised() {
    std::lock_guard lock(mutex_);
    --promised_;
  }

  void show() {
    {
      std::lock_guard lock(mutex_);
      if (hidden_ == 0) return;
      if (count_ == 0) signal();
      count_ += std::exchange(hidden_, 0);
    }
    shown_.notify_all();
  }

  // Whether poll waits. Who waits when it no longer does returns.
  void set_waits(bool waits) {
    {
      std::lock_guard lock(mutex_);
      waits_ = waits;
    }
    if (!waits) shown_.notify_all();
  }

  // Up to out.size() events in order, waiting at most timeout_ms for the first (NaN: not at all; infinity: as long as it takes).
  size_t poll(std::span<Event> out, double timeout_ms) {
    std::unique_lock lock(mutex_);
    if (timeout_ms > 0) shown_.wait_for(lock, clamped_ms(timeout_ms), [&] { return count_ > 0 || !waits_; });
    size_t n = 0;
    for (; n < out.size() && count_ > 0; ++n, --count_) {
      out[n] = std::move(ring_[first_]);
      first_ = (first_ + 1) % ring_.size();
    }
    if (n > 0 && count_ == 0) unsignal();
    return n;
  }

 private:
  void signal() const {
    if (fd_ >= 0) (void)eventfd_write(fd_, 1);
  }
  void unsignal() const {
    eventfd_t value = 0;
    if (fd_ >= 0) (void)eventfd_read(fd_, &value);
  }
  void make_room(size_t num) {
    const size_t all = count_ + hidden_, needed = all + promised_ + num;
    if (needed <= ring_.size()) return;
    std::vector<Event> larger(std::max(ring_.size() * 2, needed));
    for (size_t i = 0; i < all; ++i) larger[i] = std::move(ring_[(first_ + i) % ring_.size()]);
    ring_.swap(larger);
    first_ = 0;
  }
  void append(Event&& event) {
    ring_[(first_ + count_ + hidden_) % ring_.size()] = std::move(event);
    ++hidden_;
  }

  std::mutex mutex_;
  std::condition_variable shown_;
  std::vector<Event> ring_;
  size_t first_ = 0, count_ = 0, hidden_ = 0, promised_ = 0;
  bool waits_ = true;
  int fd_ = -1;
};

}  // namespace moebius
