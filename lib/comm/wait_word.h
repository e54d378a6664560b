// What threads of a world wait on: a word that changes, and the barrier made of it.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>

namespace moebius {

// Sleeps are cut into slices so that an abort is seen soon without waking every sleeper for it.
inline constexpr auto kSleepSlice = std::chrono::milliseconds(20);

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  const timespec slice{0, std::chrono::nanoseconds(kSleepSlice).count()};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, &slice, nullptr, 0);
}

inline void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// A word that threads wait on until it changes: spinning first (a step's barriers are microseconds apart), then asleep.
struct alignas(64) WaitWord {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> sleepers{0};

  void advance() {
    value.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0) futex_wake_all(value);
  }

  // Returns true once value != old; false when stop() says so (asked about every kSleepSlice, and while spinning).
  template <class Stop>
  bool wait(uint32_t old, int spins, Stop&& stop) {
    for (int i = 0; i < spins; ++i) {
      if (value.load(std::memory_order_acquire) != old) return true;
      if ((i & 255) == 255 && stop()) return false;
      _mm_pause();
    }
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    bool changed;
    while (!(changed = value.load(std::memory_order_seq_cst) != old) && !stop()) futex_wait(value, old);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
    return changed;
  }
};

struct alignas(64) Barrier {
  std::atomic<uint32_t> arrived{0};
  WaitWord generation;
};

}  // namespace moebius
