// A mutex that lets its waiters in as they came. Under std::mutex a thread that unlocks and locks again at once, as one that steps does,
// keeps out whoever waits.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace moebius {

class FairMutex {
 public:
  void lock() {
    std::unique_lock lock(mutex_);
    const uint64_t number = next_++;
    left_.wait(lock, [&] { return turn_ == number; });
  }
  void unlock() {
    {
      std::lock_guard lock(mutex_);
      ++turn_;
    }
    left_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable left_;
  uint64_t next_ = 0, turn_ = 0;
};

}  // namespace moebius
