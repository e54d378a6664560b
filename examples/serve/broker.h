// Many threads, one engine: a thread polls its events and hands each to whom it belongs.
//
//   1. An engine's request is registered under the lock that events are handed out under: none of its events comes before it is known.
//   2. A Generation that is destroyed cancels what still runs of it; events that come later are dropped.
//   3. Whoever does not take its events is bounded: beyond kMostUnread its requests are cancelled.
//   4. Events of switches do not say who asked. So the engine is asked for one only when that before has begun (and is turned round by
//      it) or ended; who asks for the layout that was asked for last shares its outcome.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "examples/serve/history.h"
#include "moebius/moebius.hpp"

namespace moebius_examples {

// A token of a choice, or its end.
struct Item {
  int32_t choice = 0;
  int32_t token = -1;
  bool is_stop = false;                         // the token is the end-of-text or a stop token, and the choice ends
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;   // token, logprob
  int32_t finish_reason = MOEBIUS_FINISH_NONE;  // not none: the end, and `token` is no token
  std::string why;                              // where finish_reason is error
};

class Broker;

// The requests of one HTTP request: choice = prompt × n + sample. One owner.
class Generation {
 public:
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // What has come, waiting at most so long for the first; empty: nothing came.
  std::vector<Item> wait(std::chrono::milliseconds most);
  // No more of this choice is wanted.
  void cancel(int32_t choice);
  // Whether it was cancelled because its events were not taken.
  bool overran();

 private:
  friend class Broker;
  explicit Generation(Broker& broker) : broker_(broker) {}

  Broker& broker_;
  std::vector<uint64_t> ids_;  // [prompts]; 0 once it has ended
  int32_t n_ = 1;
  std::mutex mutex_;
  std::condition_variable filled_;
  std::vector<Item> items_;
  size_t most_unread_ = 0;
  bool overran_ = false;
};

struct SwitchOutcome {
  enum Kind { kFinished, kRefused, kRolledBack, kTurned } kind;
  moebius_event event;
};

class Broker {
 public:
  // Starts the engine's own thread and the one that polls. The engine must outlive it.
  explicit Broker(moebius_cpp::Engine& engine);
  ~Broker();

  // All or none. Throws moebius_cpp::Error.
  std::unique_ptr<Generation> submit(const std::vector<moebius_cpp::Request>& requests, int n);
  // Asks for a layout and waits for what becomes of it while `wanted` says so; empty: it no longer did. Throws moebius_cpp::Error.
  std::optional<SwitchOutcome> switch_to(moebius_layout to, const std::function<bool()>& wanted);
  const History& history() const { return history_; }

 private:
  friend class Generation;
  struct Route {
    Generation* generation;
    size_t prompt;
    int32_t n, unfinished;
  };
  struct Switch {
    moebius_layout to;
    bool asked = false, begun = false;
    std::optional<SwitchOutcome> outcome;
  };
  using Switches = std::deque<std::shared_ptr<Switch>>;

  void dispatch();
  void hand_out(const moebius_event& event);
  void lose(const moebius_event& event);
  void follow(const moebius_event& event);
  void settle(Switches::iterator which, SwitchOutcome::Kind kind, const moebius_event& event);
  void ask_for_next();
  void cancel(uint64_t id, std::optional<int32_t> sample = {});
  void release(Generation& generation);

  moebius_cpp::Engine& engine_;
  History history_;
  std::mutex mutex_;  // routes and switches; before a Generation's
  std::map<uint64_t, Route> routes_;
  Switches switches_;  // in the order wished, that have no outcome: at most one has begun, one more is asked for
  std::condition_variable settled_;
  bool ends_ = false;
  std::thread thread_;
};

}  // namespace moebius_examples
