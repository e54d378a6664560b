// The engine's outgoing events: pushed by the stepping thread, polled by any. A ring that grows only while nobody polls.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <span>
#include <vector>

#include "lib/base/time.h"
#include "lib/runtime/event.h"

namespace moebius {

class EventQueue {
 public:
  explicit EventQueue(size_t capacity) : ring_(capacity) {}

  void push(Event&& event) {
    {
      std::lock_guard lock(mutex_);
      if (count_ == ring_.size()) grow();
      ring_[(first_ + count_++) % ring_.size()] = std::move(event);
    }
    pushed_.notify_one();
  }

  // Up to out.size() events in order, waiting at most timeout_ms for the first (NaN: not at all; infinity: as long as it takes).
  size_t poll(std::span<Event> out, double timeout_ms) {
    std::unique_lock lock(mutex_);
    if (count_ == 0 && timeout_ms > 0) pushed_.wait_for(lock, clamped_ms(timeout_ms), [&] { return count_ > 0; });
    size_t n = 0;
    for (; n < out.size() && count_ > 0; ++n, --count_) {
      out[n] = std::move(ring_[first_]);
      first_ = (first_ + 1) % ring_.size();
    }
    return n;
  }

 private:
  void grow() {
    std::vector<Event> larger(ring_.size() * 2);
    for (size_t i = 0; i < count_; ++i) larger[i] = std::move(ring_[(first_ + i) % ring_.size()]);
    ring_.swap(larger);
    first_ = 0;
  }

  std::mutex mutex_;
  std::condition_variable pushed_;
  std::vector<Event> ring_;
  size_t first_ = 0, count_ = 0;
};

}  // namespace moebius
