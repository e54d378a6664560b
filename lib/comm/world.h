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
#pragma once

#include <cstdint>
#include <memory>

namespace moebius {

// A borrowed callable, valid during the call it is passed to.
class RegionFunction {
 public:
  template <class F>
  RegionFunction(const F& f) : object_(&f), call_([](const void* o, int r, int t) { (*static_cast<const F*>(o))(r, t); }) {}
  void operator()(int rank, int thread) const { call_(object_, rank, thread); }

 private:
  const void* object_;
  void (*call_)(const void*, int, int);
};

class World {
 public:
  // The thread that calls run() computes as (rank 0, thread 0); ranks·threads − 1 more are started here.
  World(int ranks, int threads, double deadline_ms);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int ranks() const { return ranks_; }
  int threads() const { return threads_; }

  // Runs f(rank, thread) on every thread. Throws the first error of a failed region after everyone has stopped; when
  // someone does not stop, Error(kRankFailed), and dead() from then on. Allocates nothing when it succeeds.
  void run(RegionFunction f);
  bool dead() const;

  // Inside a region. They throw when the region is aborted or the deadline passes.
  void rank_barrier(int rank);
  void world_barrier();
  void check_abort() const;

  // Memory that outlives a dead world's stuck threads.
  void keep_alive(std::shared_ptr<void> memory);

  struct State;

 private:
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
