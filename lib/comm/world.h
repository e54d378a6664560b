// A world of P ranks × T computing threads in one process, and every wait among them.
//
// run() is the only way work reaches the threads: all of them execute one function, and its return is a fence — every write
// made inside is visible, and nobody is still writing. The outcome of a fence is decided in one place, by the caller of
// run(); ranks never conclude alone. Invariants:
//   1. A region ends in exactly one of: done; failed with everyone stopped (the world lives on, the caller may undo); dead.
//   2. Failure: the first thread that throws, or a wait that outlasts the deadline, raises the abort flag. Every barrier and
//      every check_abort() of that region then throws, so each thread stops writing and acknowledges by leaving the region.
//   3. Undoing may begin only after every thread has acknowledged. A thread that does not within one more deadline makes the
//      world dead: its memory is kept (keep_alive) because it may still write, and nothing runs any more.
//   4. The caller's own thread is the exception: nobody can return in its place. When it does not leave a region within one
//      deadline of another thread, that thread raises the abort flag, so the region fails once the caller comes back; alone
//      (one rank of one thread) it waits for no one.
// A deadline is waiting as the waiter saw it: the time in which the whole process stood still does not count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>

namespace moebius {

// A small callable, copied: a thread that is stuck in it must not find it gone. What it captures by reference has to live as
// long as the world's memory (keep_alive), or the region must be one that cannot outlast its caller.
class RegionFunction {
 public:
  RegionFunction() = default;
  template <class F>
  RegionFunction(const F& f) : call_([](const void* o, int r, int t) { (*static_cast<const F*>(o))(r, t); }) {
    static_assert(std::is_trivially_copyable_v<F> && sizeof(F) <= sizeof(object_));
    std::memcpy(object_, &f, sizeof(F));
  }
  void operator()(int rank, int thread) const { call_(object_, rank, thread); }

 private:
  alignas(std::max_align_t) std::byte object_[128] = {};
  void (*call_)(const void*, int, int) = nullptr;
};

class World {
 public:
  // The thread that calls run() computes as (rank 0, thread 0); ranks·threads − 1 more are started here. Throws kOutOfMemory when
  // the system has no more.
  // hook: each of these calls it first (starting) and last.
  using ThreadHook = std::function<void(int rank, int thread, bool starting)>;
  World(int ranks, int threads, double deadline_ms, ThreadHook hook = nullptr);
  World(const World& like, int threads);  // of the same ranks, deadline and hook
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int ranks() const { return ranks_; }
  int threads() const { return threads_; }

  // Runs f(rank, thread) on every thread. Throws the first error of a failed region after everyone has stopped; when
  // someone does not stop, Error(kRankFailed), and dead() from then on. Allocates nothing when it succeeds.
  void run(const RegionFunction& f);
  // The same without a deadline for the threads to finish (loading from a slow disk).
  void run_long(const RegionFunction& f);
  bool dead() const;

  // Inside a region. They throw when the region is aborted or the deadline passes.
  void rank_barrier(int rank);
  void world_barrier();
  void check_abort() const;
  // Asks done() until it says yes: for a device's work. Throws as above, but in run_long has no deadline.
  template <class F>
  void wait_until(const F& done) {
    wait_for([](const void* f) { return (*static_cast<const F*>(f))(); }, &done);
  }

  // Memory that a dead world's stuck threads may still touch: it lives until the last of them has come back
  // (until now, when it has already).
  void keep_alive(std::shared_ptr<void> memory);

  struct State;

 private:
  void start(int rank, int thread);
  void stop();
  void run_within(const RegionFunction& f, bool limited);
  void wait_for(bool (*done)(const void*), const void* what);

  int ranks_, threads_;
  std::shared_ptr<State> state_;
};

// Sets this thread's floating-point mode to the default (no flush to zero, round to nearest) and restores it on exit.
class FloatingPointMode {
 public:
  FloatingPointMode();
  ~FloatingPointMode();
  FloatingPointMode(const FloatingPointMode&) = delete;
  FloatingPointMode& operator=(const FloatingPointMode&) = delete;

 private:
  uint32_t saved_;
};

}  // namespace moebius
