// How long a thread has waited for another, which may have to end it.
#pragma once

#include <algorithm>

#include "lib/base/time.h"

namespace moebius {

// Time spent waiting as the waiter sees it, added up look by look. Waiters look several times in kLongestLook; a longer gap is the process
// that stood still (stopped, frozen, a debugger's) or a machine without cores to spare, and says nothing of whom it waits for.
class Waited {
 public:
  static constexpr std::chrono::milliseconds kLongestLook{100};

  bool exceeds(std::chrono::nanoseconds limit) {
    const auto now = Clock::now();
    total_ += std::min<std::chrono::nanoseconds>(now - last_look_, kLongestLook);
    last_look_ = now;
    return total_ > limit;
  }

 private:
  Clock::time_point last_look_ = Clock::now();
  std::chrono::nanoseconds total_{};
};

}  // namespace moebius
