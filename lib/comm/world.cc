#include "lib/comm/world.h"

#include <pthread.h>
#include <xmmintrin.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "lib/base/error.h"
#include "lib/base/time.h"
#include "lib/base/waited.h"
#include "lib/comm/wait_word.h"

namespace moebius {
namespace {

constexpr uint32_t kDefaultMxcsr = 0x1f80;  // all exceptions masked, round to nearest, denormals kept

}  // namespace

struct World::State {
  State(int ranks, int threads, double deadline_ms, ThreadHook thread_hook)
      : total(ranks * threads),
        hook(std::move(thread_hook)),
        deadline(clamped_ms(deadline_ms)),
        rank_barriers(ranks) {
    // More threads than cores: whoever waits must give up its core at once.
    const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    spins = total <= cores ? 20000 : 50;  // 20,000 pauses are some 200–400 µs: longer than scheduling between two steps
  }

  int total;
  const ThreadHook hook;
  Clock::duration deadline;
  int spins;
  std::vector<Barrier> rank_barriers;
  Barrier world_barrier;

  WaitWord epoch;        // advanced to start a region
  WaitWord done;         // advanced by the last worker that leaves one
  std::atomic<int> inside{0};
  std::atomic<uint32_t> left_by_caller{0};  // the epoch of the last region that the caller has left
  bool limited = true;                      // the region has deadlines; written between regions
  std::atomic<bool> aborted{false}, stopping{false}, dead{false};
  RegionFunction job;

  std::mutex error_mutex;
  std::exception_ptr error;  // the first of the region
  const std::exception_ptr late_caller = std::make_exception_ptr(
      Error(Code::kTimeout, fmt::format("rank 0's first thread, which called, did not finish within {:.0f} ms", deadline_ms())));

  std::mutex keep_mutex;
  std::vector<std::shared_ptr<void>> kept;
  std::vector<std::thread> workers;

  void abort_region(std::exception_ptr e) {
    {
      std::lock_guard lock(error_mutex);
      if (!error) error = e;
    }
    aborted.store(true, std::memory_order_release);
  }

  void execute(int rank, int thread) {
    try {
      job(rank, thread);
    } catch (...) {
      abort_region(std::current_exception());
    }
  }

  bool caller_has_left(uint32_t region) const {  // or a later one
    return static_cast<int32_t>(left_by_caller.load(std::memory_order_acquire) - region) >= 0;
  }

  // The caller cannot be interrupted, but its region must not end well. Under the lock that it takes to leave: the abort comes
  // before it has left, and so never into its next region.
  void abort_late_caller(uint32_t region) {
    std::lock_guard lock(error_mutex);
    if (caller_has_left(region) || !limited) return;
    if (!error) error = late_caller;
    aborted.store(true, std::memory_order_release);
  }

  void caller_leaves() {
    std::lock_guard lock(error_mutex);
    left_by_caller.store(epoch.value.load(std::memory_order_relaxed), std::memory_order_release);
  }

  double deadline_ms() const { return std::chrono::duration<double, std::milli>(deadline).count(); }

  void wait_at(Barrier& barrier, uint32_t parties) {
    if (aborted.load(std::memory_order_acquire)) throw Error(Code::kCancelled, "region aborted");
    const uint32_t generation = barrier.generation.value.load(std::memory_order_acquire);
    if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == parties) {
      barrier.arrived.store(0, std::memory_order_relaxed);
      barrier.generation.advance();
      return;
    }
    Waited waited;
    const bool changed = barrier.generation.wait(generation, spins, [&] {
      return aborted.load(std::memory_order_acquire) || waited.exceeds(deadline);
    });
    if (changed) return;
    if (aborted.load(std::memory_order_acquire)) throw Error(Code::kCancelled, "region aborted");
    fail(Code::kTimeout, "a rank did not reach a barrier within {:.0f} ms", deadline_ms());
  }

  void work(int rank, int thread) {
    _mm_setcsr(kDefaultMxcsr);
    if (hook) hook(rank, thread, true);
    take_regions(rank, thread);
    if (hook) hook(rank, thread, false);
  }

  void take_regions(int rank, int thread) {
    uint32_t seen = 0;
    for (;;) {
      Waited waited;  // for the caller to leave region `seen` as this thread did
      epoch.wait(seen, spins, [&] {
        if (!caller_has_left(seen) && waited.exceeds(deadline)) abort_late_caller(seen);
        return false;
      });
      ++seen;
      if (stopping.load(std::memory_order_acquire)) return;
      execute(rank, thread);
      if (inside.fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
      done.advance();
      if (dead.load(std::memory_order_acquire)) release_kept();
    }
  }

  bool wait_for_workers(uint32_t done_before, bool limited) {
    Waited waited;
    return done.wait(done_before, spins, [&] { return limited && waited.exceeds(deadline); });
  }

  void release_kept() {
    std::vector<std::shared_ptr<void>> gone;  // destroyed after the lock is: it may hold the world itself
    {
      std::lock_guard lock(keep_mutex);
      gone.swap(kept);
    }
  }
};

World::World(int ranks, int threads, double deadline_ms, ThreadHook hook)
    : ranks_(ranks), threads_(threads), state_(std::make_shared<State>(ranks, threads, deadline_ms, std::move(hook))) {
  for (int r = 0; r < ranks; ++r)
    for (int t = 0; t < threads; ++t) try {
        if (r + t > 0) start(r, t);
      } catch (const std::exception& e) {
        stop();  // those that have started
        fail(Code::kOutOfMemory, "thread {} of {} of rank {} cannot start ({} ranks, {} threads in all): {}", t, threads, r, ranks,
             ranks * threads, e.what());
      }
}

World::World(const World& like, int threads) : World(like.ranks_, threads, like.state_->deadline_ms(), like.state_->hook) {}

void World::start(int rank, int thread) {
  state_->workers.reserve(static_cast<size_t>(state_->total));  // nothing may throw between a thread's start and its being kept
  std::thread& worker = state_->workers.emplace_back([state = state_, rank, thread] { state->work(rank, thread); });
  const std::string name = fmt::format("moebius-{}.{}", rank, thread);
  pthread_setname_np(worker.native_handle(), name.substr(0, 15).c_str());
}

World::~World() { stop(); }

void World::stop() {
  state_->stopping.store(true, std::memory_order_release);
  state_->epoch.advance();
  for (std::thread& worker : state_->workers) {
    if (state_->dead.load()) worker.detach();  // may be stuck; it holds the state and what keep_alive holds
    else worker.join();
  }
}

bool World::dead() const { return state_->dead.load(std::memory_order_acquire); }

void World::run(const RegionFunction& f) { run_within(f, true); }
void World::run_long(const RegionFunction& f) { run_within(f, false); }

void World::run_within(const RegionFunction& f, bool limited) {
  State& s = *state_;
  if (dead()) fail(Code::kRankFailed, "the world is dead: a rank stopped answering earlier");
  s.job = f;
  s.limited = limited;
  s.error = nullptr;
  s.aborted.store(false, std::memory_order_relaxed);
  s.world_barrier.arrived.store(0, std::memory_order_relaxed);
  for (Barrier& b : s.rank_barriers) b.arrived.store(0, std::memory_order_relaxed);
  const uint32_t done_before = s.done.value.load(std::memory_order_relaxed);
  s.inside.store(s.total - 1, std::memory_order_relaxed);
  s.epoch.advance();  // orders all of the above before the workers' reads

  s.execute(0, 0);
  s.caller_leaves();
  if (s.total > 1 && !s.wait_for_workers(done_before, limited)) {
    const double ms = s.deadline_ms();
    s.abort_region(std::make_exception_ptr(
        Error(Code::kTimeout, fmt::format("{} of {} threads did not finish within {:.0f} ms", s.inside.load(), s.total, ms))));
    if (!s.wait_for_workers(done_before, true)) {
      s.dead.store(true, std::memory_order_release);
      fail(Code::kRankFailed, "{} of {} threads did not stop within {:.0f} ms after an abort; nothing can be undone safely",
           s.inside.load(), s.total, ms);
    }
  }
  if (s.error) {
    const std::exception_ptr error = std::exchange(s.error, nullptr);
    std::rethrow_exception(error);
  }
}

void World::rank_barrier(int rank) {
  if (threads_ > 1) state_->wait_at(state_->rank_barriers[rank], static_cast<uint32_t>(threads_));
}

void World::world_barrier() {
  if (state_->total > 1) state_->wait_at(state_->world_barrier, static_cast<uint32_t>(state_->total));
}

void World::check_abort() const {
  if (state_->aborted.load(std::memory_order_acquire)) throw Error(Code::kCancelled, "region aborted");
}

void World::wait_for(bool (*done)(const void*), const void* what) {
  Waited waited;
  unsigned turn = 0;
  while (!done(what)) {
    check_abort();
    if (state_->limited && waited.exceeds(state_->deadline)) fail(Code::kTimeout, "a device did not finish within {:.0f} ms", state_->deadline_ms());
    for (int i = 0; i < 16; ++i) _mm_pause();
    if (++turn % 64 == 0) std::this_thread::yield();  // to ranks that have no core of their own
  }
}

void World::keep_alive(std::shared_ptr<void> memory) {
  const std::shared_ptr<State> state = state_;  // `memory` may hold this world
  {
    std::lock_guard lock(state->keep_mutex);
    state->kept.push_back(std::move(memory));
  }
  // The last of them may have come back, and found nothing to release, before there was anything here.
  if (state->inside.load(std::memory_order_acquire) == 0) state->release_kept();
}

FloatingPointMode::FloatingPointMode() : saved_(_mm_getcsr()) { _mm_setcsr(kDefaultMxcsr); }
FloatingPointMode::~FloatingPointMode() { _mm_setcsr(saved_); }

}  // namespace moebius
