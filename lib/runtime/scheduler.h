// Which tokens of which sequences the next step computes: continuous batching with chunked prefill.
//
// Order is (priority, arrival) everywhere. Running sequences come first; prompt tokens share a budget of chunk_tokens a
// step, decode tokens are outside it. When KV pages run out, the last running sequence in that order whose pages would help
// gives them up and waits again, with its tokens kept (recomputed later, to the same bits).
// Row limits hold by construction: a step has at most chunk_tokens + max_batch rows in all, which is both the TP limit and,
// homes being parts of it, the EP limit of every home.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lib/kv/kv_manager.h"
#include "lib/runtime/sequence.h"
#include "lib/runtime/step_plan.h"

namespace moebius {

// What a home would look like to one more sequence.
struct HomeCandidate {
  int64_t requests = 0, tokens = 0;  // it has
  int64_t room = 0;                  // pages that could be had
  int64_t pages = 0;                 // the sequence would take of these
  int64_t shared = 0;                // of the sequence's blocks, already there
};
// Fewest requests among those with room, then most shared, then fewest tokens, then the lowest (docs/decisions/0008). −1: none
// has room.
int choose_home(std::span<const HomeCandidate> homes);

struct SchedulerLimits {
  int chunk_tokens = 512;
  int max_batch = 64;
  int max_queue = 65536;
  bool prefix_cache = true;
};

class Scheduler {
 public:
  Scheduler(KvManager& kv, const SchedulerLimits& limits);

  void add(Sequence& sequence);         // arrived: joins the waiting ones
  void remove(Sequence& sequence);      // finished or cancelled: its pages are given back
  void preempt(Sequence& sequence);     // running → waiting, its pages are given back

  // Fills the plan for a step; returns the sequences that it preempted, until the next call.
  std::span<Sequence* const> plan(StepPlan& out);
  // The step has been computed: KV of its rows counts, full blocks become findable.
  void commit(const StepPlan& plan);

  int max_batch() const { return limits_.max_batch; }
  const std::vector<Sequence*>& running() const { return running_; }
  const std::vector<Sequence*>& waiting() const { return waiting_; }
  // Of running and waiting sequences, cached prefixes of waiting ones included: these are found when they are admitted.
  int64_t tokens_to_prefill() const;
  // Remakes the page tables of a running sequence from its blocks (a switch has begun or ended).
  void remake_tables(Sequence& sequence) const;

  uint64_t prefix_queries = 0, prefix_hits = 0;  // tokens

 private:
  void join_waiting(Sequence& sequence);
  void leave_waiting(Sequence& sequence);
  bool grow(Sequence& sequence, int64_t num_tokens);
  Sequence& victim_for(Sequence& sequence) const;
  int place_for(const Sequence& sequence);
  void find_shared(const Sequence& sequence, std::span<HomeCandidate> places) const;
  bool may_share(const Sequence& sequence) const;
  int64_t shareable_blocks(const Sequence& sequence) const;
  bool waits_for_sibling(const Sequence& sequence, int place) const;
  void admit(Sequence& sequence, int place);
  int64_t take_prefix(Sequence& sequence);
  void order_by_home(StepPlan& out);

  KvManager& kv_;
  SchedulerLimits limits_;
  std::vector<Sequence*> running_, waiting_, preempted_;
  int64_t waiting_tokens_ = 0;  // of the waiting ones, which get no more while they wait
  struct Picked {
    Sequence* sequence;
    int32_t num_rows;
  };
  std::vector<Picked> picked_;
  std::vector<HomeCandidate> places_;  // [homes]
};

}  // namespace moebius
