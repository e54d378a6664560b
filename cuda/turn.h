// A captured step that several ranks' threads queue into is one graph, which CUDA does not let them write at once: while there is such a
// capture, every call that queues takes its turn. (Otherwise there is nothing to wait for.)
#pragma once

#include <atomic>
#include <mutex>

namespace moebius::cuda {

inline std::atomic<int> shared_captures{0};  // under way in this process
inline std::mutex turn_mutex;

class Turn {
 public:
  Turn() {
    if (shared_captures.load(std::memory_order_acquire) > 0) lock_ = std::unique_lock(turn_mutex);
  }

 private:
  std::unique_lock<std::mutex> lock_;
};

}  // namespace moebius::cuda
