#include "lib/base/fair_mutex.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/catch.h"

namespace moebius {
namespace {

// A thread that locks once and says when it has the lock. Made when it sleeps in there, so that it has its place in the queue.
class Waiter {
 public:
  Waiter(FairMutex& mutex, std::vector<int>& order, int name)
      : thread_([this, &mutex, &order, name] {
          tid_ = gettid();
          std::lock_guard lock(mutex);
          order.push_back(name);
        }) {
    while (!sleeps()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ~Waiter() { thread_.join(); }

 private:
  bool sleeps() const {
    if (tid_ == 0) return false;
    std::string line;
    std::getline(std::ifstream("/proc/self/task/" + std::to_string(tid_) + "/stat"), line);
    return line.find(") S") != std::string::npos;
  }

  std::atomic<pid_t> tid_{0};
  std::thread thread_;
};

TEST_CASE("who unlocks and locks again at once comes after all who waited, and these come in order") {
  for (int round = 0; round < 20; ++round) {  // an unfair one passes now and then
    FairMutex mutex;
    std::vector<int> order;
    mutex.lock();
    {
      const Waiter first(mutex, order, 1), second(mutex, order, 2), third(mutex, order, 3);
      mutex.unlock();
      mutex.lock();
      order.push_back(0);
      mutex.unlock();
    }
    CHECK(order == std::vector<int>{1, 2, 3, 0});
  }
}

}  // namespace
}  // namespace moebius
