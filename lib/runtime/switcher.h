// Moves the seam: the whole of a switch between layouts, at once or a little in every step.
//
// The seam k says that layers [0, k) run in TP and [k, N) in EP; it is a valid, runnable state at every k. Moving it by one
// layer copies that layer's moving weights and KV (one item) and ends with a fence: the return of World::run, one outcome for
// all ranks. EP→TP moves it forward, TP→EP backward.
//
//            begin(target)                 arrival at 0 or N
//   pure ──────────────────▶ both tables ────────────────────▶ pure          hold: the seam rests inside, both tables alive
//            refused: nothing changed        a fault: back to where the move began, turns on the way included
//
// Invariants:
//   1. Between calls the seam's layers are intact in their layouts, and every live block has a page in each living table.
//   2. An item's old place is untouched until the first write of the next item or of its copying ahead; so a failed item
//      needs no undoing, and earlier ones are undone by moving the seam back.
//   3. Copied ahead are: a prefix of the item's weights, and full blocks (their KV never changes). What counts belongs to the
//      block, is set only after the copying region has ended well, and is forgotten by a turn, a fault or an arrival.
//   4. An item ends after a bounded number of steps: as many pieces as its weights have, then rounds over the full blocks that there are
//      when a round begins, each at most three quarters of the one before, then the fence. It has what no round was worth: a piece, or
//      blocks that fill about as fast as they are copied.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "lib/base/error.h"
#include "lib/comm/world.h"
#include "lib/device/device.h"
#include "lib/kv/kv_manager.h"
#include "lib/layout/arena.h"
#include "lib/layout/transfer.h"
#include "lib/layout/verify.h"
#include "lib/runtime/event.h"
#include "lib/runtime/resident_copies.h"
#include "lib/runtime/scheduler.h"

namespace moebius {

// Where a thread is in a region that copies for an item.
struct CopyPoint {
  enum When { kBefore, kBetween, kAfter };  // all of its copies; two of them
  int item = 0;
  Layout to = Layout::kTp;
  bool undoing = false;
  int rank = 0, thread = 0;
  When when = kBefore;
  bool starts_rank() const { return when == kBefore && thread == 0; }
};
// For tests: called by every thread at every such point; may throw (a fault) or sleep (a slow rank).
using CopyHook = std::function<void(const CopyPoint&)>;

class Switcher {
 public:
  struct Parts {
    World& world;
    Device& device;
    const ArenaPlan& arena;
    const TransferPlan& to_tp;
    const TransferPlan& to_ep;
    std::vector<std::byte*> arenas;  // [rank]
    KvManager& kv;
    Scheduler& scheduler;
    std::function<void(Event&&)> emit;
    std::function<void(Sequence&)> on_preempt;
    // Bytes that one rank copies between two looks at the clock: some 100–200 µs at the rates of one core, so a stall budget
    // is overrun by no more than that. Fewer would spend the time on starting regions (a few µs each).
    int64_t piece_bytes = 1 << 20;
  };
  Switcher(Parts parts, Layout start);

  int seam() const { return seam_; }
  int num_layers() const { return num_layers_; }
  bool moving() const { return seam_ != target_; }
  int target() const { return target_; }
  int asked() const { return undoing_ ? undone_ : target_; }                      // the target, also on the way back from it
  bool began_inside() const { return origin_ > 0 && origin_ < num_layers_; }      // the move under way, or of an event of its arrival

  // Aims the seam at `target` (0 = EP, N = TP, between: hold). Under way already: turns where it stands. False: refused, or
  // rolled back because opening the other page tables failed; an event says why, and the layout is what it was.
  bool begin(int target, bool preempt_to_fit);
  // Moves towards the target: all the way when budget_ms is 0, else for about so long and by at least one piece. Whatever is
  // thrown meanwhile rolls back; this throws only when the world is dead or the way back failed too.
  void advance(double budget_ms);

  // Whether a switch would fit now; the reason with its numbers when not.
  bool fits(int target, Reason* reason);
  // Bytes that a switch to a pure layout would write now, and those to a new owner.
  std::pair<int64_t, int64_t> bytes_to(Layout to) const;
  // Bytes that one from the other pure layout would write, wherever the seam is.
  int64_t bytes_across(Layout to) const { return bytes_of(to, {0, num_layers_}).first; }
  double copy_rate() const { return copy_rate_; }  // bytes per second of the copies so far

  // Of the last or present switch: weights and KV apart. Seconds are of the slowest thread, summed over regions.
  struct Part {
    int64_t bytes = 0, bytes_changed = 0;
    double seconds = 0;
  };
  const Part& weights_part() const { return weights_part_; }
  const Part& kv_part() const { return kv_part_; }
  double plan_seconds() const { return plan_seconds_; }  // choosing homes, mapping and checking pages, releasing them

  CopyHook hook;
  std::function<void()> open_hook;         // for tests: called when the other page tables have been opened; may throw
  void set_piece_bytes(int64_t bytes) {  // for tests, while nothing moves
    MOEBIUS_ASSERT(!moving() && bytes > 0);
    parts_.piece_bytes = bytes;
  }

 private:
  Layout direction() const { return target_ > seam_ ? Layout::kTp : Layout::kEp; }
  int next_item() const { return direction() == Layout::kTp ? seam_ : seam_ - 1; }
  const TransferPlan& plan_to(Layout to) const { return to == Layout::kTp ? parts_.to_tp : parts_.to_ep; }

  struct alignas(64) Copied {  // by one thread in one region
    Part weights, kv;
  };
  std::pair<int64_t, int64_t> bytes_of(Layout to, Range items) const;
  bool choose_homes(Reason* reason);
  Sequence& victim_for() const;
  void make_room();
  void open(Layout to);
  std::span<const KvManager::SequenceBlocks> blocks_of_running();
  void verify_tables();
  void arrive();
  void move_towards(double budget_ms);
  template <class F>
  bool attempt(F&& f);
  void roll_back(std::string_view why);
  bool copy_ahead();
  bool is_left(int32_t block) const;
  void finish_item();
  void begin_item();
  void forget_ahead();
  int64_t num_pieces() const;
  PagePair pair_of(int32_t block) const;
  void list_blocks(bool only_full);
  void run_copies(Range pieces, int64_t num_pieces);
  void settle(int rank) const;
  void reach(CopyPoint point, CopyPoint::When when) const;
  template <class F>
  void for_destinations(int rank, F&& f) const;
  void copy_block(const CopyPoint& point, int to, const BlockCopy& copy, bool local, Part& done) const;
  void copy_weights(const CopyPoint& point, int to, Range pieces, int64_t num_pieces, Part& done);
  void copy_blocks(const CopyPoint& point, int to, Part& done);

  Parts parts_;
  int num_layers_;
  int seam_, target_;
  int origin_;                                          // where the move under way began: an end, or a seam that was held
  bool undoing_ = false;
  int undone_ = 0;                                      // then the target that was given up
  Reason fault_;
  int64_t pieces_done_ = 0;                             // weight pieces of the next item that are copied ahead
  std::vector<int32_t> round_;                          // full blocks, those of the next item's last round; empty: none has begun
  size_t round_done_ = 0;                               // of these
  std::vector<int32_t> list_;                           // blocks that the next region copies
  bool list_is_all_ = false;                            // as the last one did: those of all items alike, and they are with the device
  std::optional<ResidentCopies> resident_;      // where the device has its own tables of copies
  PageVerifier page_verifier_;
  std::vector<PagePair> pairs_;                         // for it, and for resident_: those of list_
  std::vector<Copied> copied_;                          // [ranks · threads] what the last region copied
  std::vector<std::vector<std::vector<int64_t>>> ends_[2];  // [to][item][rank] running byte totals of the weight copies
  // Figures of the switch under way.
  Clock::time_point started_{};
  int64_t bytes_ = 0, bytes_changed_ = 0;
  double seconds_ = 0, plan_seconds_ = 0;
  Part weights_part_, kv_part_;
  double copy_rate_ = 5e9;                              // until measured
  Layout from_ = Layout::kTp, to_ = Layout::kTp;        // which way the seam moves, or moved last; equal: it had arrived before
  // choose_homes, sized once: [blocks] the homes that a shared block is on so far, [homes], and of the running sequences.
  std::vector<uint64_t> homes_of_block_;
  std::vector<HomeCandidate> candidates_;
  std::vector<int32_t> order_, homes_;
  int32_t homeless_ = -1;                               // the running sequence that choose_homes last found no room for
  int64_t shortage_ = 0;                                // pages that were too few when fits() last said no; to EP 1, whatever lacks
  std::vector<KvManager::SequenceBlocks> sequences_;
};

}  // namespace moebius
