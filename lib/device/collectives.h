// What ranks add up and exchange where none reads another's memory (NCCL), as functions of a device.
//
// A rank asks for any number of them, then exchange(rank) starts all at once, in order with what its queue holds; nothing more may be
// queued before exchanged(rank) says that they have been taken up. All ranks ask for the same sums in the same order, and for each send
// there is a receive of the same size, in the same order between two ranks. Data is in the rank's memory, and sums stand where the
// addends were.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace moebius {

enum class Element : int32_t { kInt64 = 0, kFloat = 1, kUint8 = 2 };  // integers wrap; of bytes the largest is taken, not the sum

// Names a connection to all that take part in it (ncclUniqueId).
struct ConnectionId {
  std::byte bytes[128] = {};
};

class Collectives {
 public:
  virtual ~Collectives() = default;

  // A number that no earlier connection had; 0 where ranks are not connected: at first, and once one has given up. Connecting: prepare() by
  // one thread while no rank is at work, then connect() by each rank's, which then waits for exchanged().
  int connection() const { return connection_.load(std::memory_order_acquire); }
  virtual void prepare() = 0;
  virtual void connect(int rank) = 0;

  virtual void all_reduce(int rank, void* data, int64_t count, Element element) = 0;
  virtual void reduce(int rank, void* data, int64_t count, Element element, int root) = 0;  // elsewhere than at the root data stays as it is
  virtual void send(int rank, const void* data, int64_t bytes, int to) = 0;
  virtual void receive(int rank, void* data, int64_t bytes, int from) = 0;
  virtual void exchange(int rank) = 0;
  virtual bool exchanged(int rank) = 0;
  // Ends what the rank has under way, whatever the others do, and forgets what it has captured. Nothing can be exchanged until all ranks are
  // connected again.
  virtual void give_up(int rank) noexcept = 0;

 protected:
  void connection_begins() { connection_ = ++connections_; }
  void connection_ends() { connection_ = 0; }

 private:
  std::atomic<int> connection_{0};
  int connections_ = 0;
};

}  // namespace moebius
