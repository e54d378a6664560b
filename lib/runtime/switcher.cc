#include "lib/runtime/switcher.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "lib/base/error.h"
#include "lib/base/time.h"
#include "lib/comm/waits.h"

namespace moebius {
namespace {

double mib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

}  // namespace

Switcher::Switcher(Parts parts, Layout start)
    : parts_(std::move(parts)),
      num_layers_(static_cast<int>(parts_.to_tp.items.size())),
      page_verifier_(parts_.arena.tp_pages(), parts_.arena.ep_pages()) {
  seam_ = target_ = origin_ = start == Layout::kTp ? num_layers_ : 0;
  for (Layout to : {Layout::kTp, Layout::kEp})
    for (const ItemTransfer& item : plan_to(to).items) {
      auto& of_item = ends_[static_cast<int>(to)].emplace_back();
      for (const std::vector<BlockCopy>& copies : item.to) {
        std::vector<int64_t>& ends = of_item.emplace_back();
        for (const BlockCopy& c : copies) ends.push_back((ends.empty() ? 0 : ends.back()) + c.bytes);
      }
    }
  int64_t pages = parts_.kv.tp_capacity();
  for (int h = 0; h < parts_.kv.num_homes(); ++h) pages += parts_.kv.ep_capacity(h);
  list_.reserve(pages);
  round_.reserve(pages);
  pairs_.reserve(pages);
  if (ResidentCopies::possible(parts_.device))
    resident_.emplace(parts_.device, parts_.arena, parts_.to_tp, parts_.to_ep, parts_.arenas, pages);
  homes_of_block_.assign(pages, 0);
  copied_.resize(static_cast<size_t>(parts_.world.ranks()) * parts_.world.threads());
  candidates_.resize(parts_.kv.num_homes());
  order_.reserve(parts_.scheduler.max_batch());
  homes_.reserve(parts_.scheduler.max_batch());
  sequences_.reserve(parts_.scheduler.max_batch());
}

// ---- starting

// Fills homes_ for all running sequences, longest first; false, and the reason, when one finds no room.
bool Switcher::choose_homes(Reason* reason) {
  const std::vector<Sequence*>& running = parts_.scheduler.running();
  const KvManager& kv = parts_.kv;
  order_.resize(running.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::sort(order_.begin(), order_.end(), [&](int a, int b) {
    const size_t x = running[a]->tokens.size(), y = running[b]->tokens.size();
    return x != y ? x > y : a < b;
  });
  homes_.assign(running.size(), -1);
  for (int h = 0; h < kv.num_homes(); ++h) candidates_[h] = {0, 0, kv.ep_capacity(h)};

  bool all = true;
  for (int i : order_) {
    const Sequence& s = *running[i];
    const int64_t pages = div_up(static_cast<int64_t>(s.tokens.size()) + 1, kv.page_tokens());
    for (HomeCandidate& c : candidates_) c.shared = 0;
    for (int32_t b : s.blocks)
      for (uint64_t homes = homes_of_block_[b]; homes != 0; homes &= homes - 1) ++candidates_[static_cast<size_t>(std::countr_zero(homes))].shared;
    for (HomeCandidate& c : candidates_) c.pages = std::max<int64_t>(pages, s.blocks.size()) - c.shared;
    homes_[i] = choose_home(candidates_);
    if (homes_[i] < 0) {
      int nearest = 0;
      const auto short_of = [&](int h) { return candidates_[h].pages - candidates_[h].room; };
      for (int h = 1; h < kv.num_homes(); ++h)
        if (short_of(h) < short_of(nearest)) nearest = h;
      *reason = Reason::of("a request of {} tokens needs {} KV pages of rank {} in EP, which has {} left of {} ({} tokens short)",
                           s.tokens.size(), candidates_[nearest].pages, nearest, candidates_[nearest].room, kv.ep_capacity(nearest),
                           short_of(nearest) * kv.page_tokens());
      homeless_ = i;
      shortage_ = 1;
      all = false;
      break;
    }
    HomeCandidate& home = candidates_[homes_[i]];
    home.room -= home.pages;
    ++home.requests;
    home.tokens += static_cast<int64_t>(s.tokens.size());
    for (int32_t b : s.blocks)
      if (kv.block(b).users > 1) homes_of_block_[b] |= uint64_t{1} << homes_[i];
  }
  for (const Sequence* s : running)
    for (int32_t b : s->blocks) homes_of_block_[b] = 0;
  return all;
}

bool Switcher::fits(int target, Reason* reason) {
  if (parts_.kv.phase() == Phase::kBoth || target == seam_) return true;  // both page tables are alive already
  if (seam_ == num_layers_) return choose_homes(reason);
  int64_t grow = 0;  // sequences whose next token opens a page
  for (const Sequence* s : parts_.scheduler.running())
    grow += static_cast<int64_t>(s->tokens.size()) + 1 > static_cast<int64_t>(s->blocks.size()) * parts_.kv.page_tokens();
  if (parts_.kv.blocks_in_use() + grow <= parts_.kv.tp_capacity()) return true;
  const int64_t needed = parts_.kv.tp_pages_needed() + grow;
  shortage_ = needed - parts_.kv.tp_capacity();
  if (shortage_ <= 0) return true;
  *reason = Reason::of("the running requests need {} KV pages, TP holds {} ({} tokens short)", needed, parts_.kv.tp_capacity(),
                        shortage_ * parts_.kv.page_tokens());
  return false;
}

// After fits() has said no, and before it is asked again: preempts one sequence, or as many as shortage_ takes at least.
void Switcher::make_room() {
  for (int64_t freed = 0; freed < shortage_ && !parts_.scheduler.running().empty();) {
    Sequence& victim = victim_for();
    const auto is_own = [&](int32_t b) { return parts_.kv.block(b).users == 1; };
    freed += std::count_if(victim.blocks.begin(), victim.blocks.end(), is_own) + 1;  // and the page that it would open
    parts_.scheduler.preempt(victim);
    parts_.on_preempt(victim);
  }
}

// Of the running sequences the last whose going would help. To EP these are the ones that were given a home, and the one that found
// none; to TP those that alone hold a page.
Sequence& Switcher::victim_for() const {
  const std::vector<Sequence*>& running = parts_.scheduler.running();
  for (size_t i = running.size(); i-- > 0;) {
    if (seam_ == num_layers_ && (homes_[i] >= 0 || static_cast<int>(i) == homeless_)) return *running[i];
    if (seam_ == 0)
      for (int32_t b : running[i]->blocks)
        if (parts_.kv.block(b).users == 1) return *running[i];  // at most its prefix lies in other homes too
  }
  return *running.back();  // pages that all share go with the last of those who share them
}

bool Switcher::begin(int target, bool preempt_to_fit) {
  MOEBIUS_ASSERT(target >= 0 && target <= num_layers_);
  Event event;
  event.to = layout_towards(seam_, target, num_layers_);
  event.from = target == seam_ ? event.to : other(event.to);
  event.seam = seam_;
  if (moving()) {  // a turn: what was copied ahead of the seam lies where the other direction will write
    if (target == target_) return true;  // on its way already
    const Layout before = direction();
    target_ = target;
    const bool turned = !moving() || direction() != before;
    if (turned) forget_ahead();
    from_ = event.from;
    to_ = event.to;
    event.type = EventType::kSwitchStarted;
    event.reason = turned ? "turned" : "to another end";
    parts_.emit(std::move(event));
    if (!moving()) arrive();
    return true;
  }
  const auto start = Clock::now();
  Reason reason;
  while (!fits(target, &reason)) {
    if (!preempt_to_fit || parts_.scheduler.running().empty()) {
      event.type = EventType::kSwitchRefused;
      event.reason = reason;
      parts_.emit(std::move(event));
      return false;
    }
    make_room();
  }
  event.type = EventType::kSwitchStarted;
  parts_.emit(std::move(event));
  started_ = start;
  bytes_ = bytes_changed_ = 0;
  seconds_ = plan_seconds_ = 0;
  weights_part_ = kv_part_ = {};
  origin_ = seam_;
  target_ = target;
  from_ = event.from;
  to_ = event.to;
  return attempt([&] {
    if (moving() && parts_.kv.phase() != Phase::kBoth) open(direction());
    plan_seconds_ = seconds_ = seconds_since(start);
    if (!moving()) arrive();
  });
}

// To EP: homes_ are as fits() has chosen them.
void Switcher::open(Layout to) {
  const std::vector<Sequence*>& running = parts_.scheduler.running();
  if (to == Layout::kTp) {
    parts_.kv.open_tp();
  } else {
    for (size_t i = 0; i < running.size(); ++i) running[i]->home = homes_[i];
    parts_.kv.open_ep(blocks_of_running());
  }
  for (Sequence* s : running) parts_.scheduler.remake_tables(*s);
  forget_ahead();
  verify_tables();
  if (open_hook) open_hook();
}

std::span<const KvManager::SequenceBlocks> Switcher::blocks_of_running() {
  sequences_.clear();
  for (Sequence* s : parts_.scheduler.running()) sequences_.push_back({s->blocks, s->home});
  return sequences_;
}

// Page lists are checked before anything is copied by them: no two blocks may write one page.
void Switcher::verify_tables() {
  pairs_.clear();
  for (int32_t b : parts_.kv.live_blocks())
    if (parts_.kv.leads_tp_page(b)) pairs_.push_back(pair_of(b));
  page_verifier_.verify(pairs_, Layout::kTp);
  pairs_.clear();
  for (int32_t b : parts_.kv.live_blocks()) pairs_.push_back(pair_of(b));
  page_verifier_.verify(pairs_, Layout::kEp);
}

void Switcher::arrive() {
  const auto start = Clock::now();
  if (parts_.kv.phase() == Phase::kBoth && (seam_ == 0 || seam_ == num_layers_)) {
    parts_.kv.close(seam_ == 0 ? Layout::kEp : Layout::kTp, blocks_of_running());
    for (Sequence* s : parts_.scheduler.running()) {
      if (seam_ == num_layers_) s->home = -1;
      parts_.scheduler.remake_tables(*s);
    }
  }
  forget_ahead();
  plan_seconds_ += seconds_since(start);
  seconds_ += seconds_since(start);
  Event event;
  event.type = undoing_ ? EventType::kRolledBack : EventType::kSwitchFinished;
  event.from = undoing_ || began_inside() ? from_ : origin_ == 0 ? Layout::kEp : Layout::kTp;  // turns on the way do not count
  event.to = to_;
  event.seam = seam_;
  event.bytes = bytes_;
  event.bytes_changed = bytes_changed_;
  event.seconds = seconds_;
  event.reason = undoing_ ? fault_
                          : Reason::of("plan {:.3f} ms, weights {:.3f} MiB {:.3f} ms, KV {:.3f} MiB {:.3f} ms, since start {:.3f} ms",
                                       plan_seconds_ * 1e3, mib(weights_part_.bytes), weights_part_.seconds * 1e3, mib(kv_part_.bytes),
                                       kv_part_.seconds * 1e3, seconds_since(started_) * 1e3);
  undoing_ = false;
  parts_.emit(std::move(event));
  origin_ = seam_;
}

// ---- moving

void Switcher::advance(double budget_ms) {
  if (moving()) attempt([&] { move_towards(budget_ms); });
}

// Rolls back whatever f throws; false then. Once only one page table is alive there is nothing to go back to.
template <class F>
bool Switcher::attempt(F&& f) {
  const auto can_go_back = [&] { return !parts_.world.dead() && parts_.kv.phase() == Phase::kBoth; };
  try {
    f();
    return true;
  } catch (...) {
    if (!can_go_back()) throw;
    with_reason([this](std::string_view why) { roll_back(why); });
  }
  return false;
}

// Everyone has stopped (World::run says so): the item under way was not needed by anybody yet, the earlier ones go back.
void Switcher::roll_back(std::string_view why) {
  fault_ = why;
  undone_ = asked();
  undoing_ = true;
  target_ = origin_;
  to_ = moving() ? direction() : other(to_);
  from_ = other(to_);
  forget_ahead();
  if (moving()) move_towards(0);
  else arrive();
}

void Switcher::move_towards(double budget_ms) {
  const auto start = Clock::now();
  const auto left_ms = [&] { return budget_ms - seconds_since(start) * 1e3; };
  list_is_all_ = false;
  while (moving()) {
    if (budget_ms > 0) {
      bool moved = false;  // at least one piece a step, however small the budget
      while (copy_ahead()) {
        moved = true;
        if (left_ms() <= 0) return;
      }
      // Only what is newer than the copies remains: it belongs to this step unless the budget is spent already.
      if (moved && left_ms() <= 0) return;
    }
    finish_item();
    if (budget_ms > 0 && moving() && left_ms() <= 0) return;
  }
}

int64_t Switcher::num_pieces() const {
  int64_t most = 0;
  for (const std::vector<int64_t>& ends : ends_[static_cast<int>(direction())][next_item()])
    if (!ends.empty()) most = std::max(most, ends.back());
  return div_up(most, parts_.piece_bytes);
}

// Whether the next item has to copy this living block, whose KV was not copied ahead.
bool Switcher::is_left(int32_t b) const {
  return parts_.kv.block(b).copied_item != next_item() && (direction() == Layout::kEp || parts_.kv.leads_tp_page(b));
}

// Blocks that the next item has to copy, or the full ones among them.
void Switcher::list_blocks(bool only_full) {
  list_.clear();
  for (int32_t b : parts_.kv.live_blocks())
    if ((parts_.kv.block(b).full || !only_full) && is_left(b)) list_.push_back(b);
  list_is_all_ = false;
}

// Copies one piece of the next item while its layer still runs in the old layout. False: nothing is left to copy ahead.
bool Switcher::copy_ahead() {
  const int64_t pieces = num_pieces();
  if (pieces_done_ < pieces) {
    list_.clear();
    list_is_all_ = false;
    run_copies({pieces_done_, pieces_done_ + 1}, pieces);
    ++pieces_done_;
    return true;
  }
  const int64_t per_block = std::max<int64_t>(1, parts_.arena.kv_page_bytes(0, Layout::kEp));
  const auto most = static_cast<size_t>(std::max<int64_t>(1, parts_.piece_bytes * parts_.world.ranks() / per_block));
  do {
    if (round_done_ == round_.size()) {
      list_blocks(true);
      // What filled meanwhile: another round if it is more than a piece and a quarter less than the last one.
      if (list_.empty() || (!round_.empty() && (list_.size() <= most || 4 * list_.size() > 3 * round_.size()))) return false;
      round_ = list_;
      round_done_ = 0;
    }
    list_.clear();
    for (; round_done_ < round_.size() && list_.size() < most; ++round_done_) {
      const int32_t b = round_[round_done_];  // may have been given up meanwhile, and be another one
      if (const Block& block = parts_.kv.block(b); block.full && block.ep_page >= 0 && is_left(b)) list_.push_back(b);
    }
  } while (list_.empty());
  list_is_all_ = false;
  const int item = next_item();
  run_copies({}, pieces);
  for (int32_t b : list_) parts_.kv.set_copied_item(b, item);
  return true;
}

// Copies what is left of the next item, fences, and moves the seam over it.
void Switcher::finish_item() {
  const Layout to = direction();
  const int64_t pieces = num_pieces();
  const bool none_ahead = pieces_done_ == 0 && round_.empty();
  if (!list_is_all_ || !none_ahead) list_blocks(false);
  run_copies({pieces_done_, pieces}, pieces);
  list_is_all_ = none_ahead;  // until anything but items is run
  seam_ += to == Layout::kTp ? 1 : -1;
  begin_item();
  Event event;
  event.type = EventType::kSeam;
  event.from = from_;
  event.to = to;
  event.seam = seam_;
  parts_.emit(std::move(event));
  if (!moving()) arrive();
}

void Switcher::begin_item() {
  pieces_done_ = 0;
  round_.clear();
  round_done_ = 0;
}

void Switcher::forget_ahead() {
  begin_item();
  parts_.kv.forget_copied();
}

PagePair Switcher::pair_of(int32_t b) const {
  const Block& block = parts_.kv.block(b);
  return {block.tp_page, block.home, block.ep_page};
}

// ---- copying: one region, its return is the fence

void Switcher::run_copies(Range pieces, int64_t num_pieces) {
  join_ranks(parts_.world, parts_.device);
  const auto start = Clock::now();
  const CopyPoint region{next_item(), direction(), undoing_};
  copied_.assign(copied_.size(), {});
  if (resident_ && !list_is_all_) {
    pairs_.clear();
    for (int32_t b : list_) pairs_.push_back(pair_of(b));
  }
  parts_.world.run([=, this](int rank, int thread) {
    const DrainOnError drain(parts_.device, rank);
    CopyPoint point = region;
    point.rank = rank;
    point.thread = thread;
    reach(point, CopyPoint::kBefore);
    if (resident_ && !list_is_all_) resident_->send_pages(rank, point.to, pairs_);
    Copied done;
    const auto begin = Clock::now();
    if (!pieces.empty())
      for_destinations(rank, [&](int to) { copy_weights(point, to, pieces, num_pieces, done.weights); });
    settle(rank);
    done.weights.seconds = seconds_since(begin);
    for_destinations(rank, [&](int to) { copy_blocks(point, to, done.kv); });
    settle(rank);
    done.kv.seconds = seconds_since(begin) - done.weights.seconds;
    reach(point, CopyPoint::kAfter);
    copied_[rank * parts_.world.threads() + thread] = done;
  });
  int64_t bytes = 0, changed = 0;
  const auto add = [&](Part& total, Part Copied::*part) {
    double slowest = 0;
    for (const Copied& c : copied_) {
      total.bytes += (c.*part).bytes;
      total.bytes_changed += (c.*part).bytes_changed;
      bytes += (c.*part).bytes;
      changed += (c.*part).bytes_changed;
      slowest = std::max(slowest, (c.*part).seconds);
    }
    total.seconds += slowest;
  };
  add(weights_part_, &Copied::weights);
  add(kv_part_, &Copied::kv);
  const double seconds = seconds_since(start);
  bytes_ += bytes;
  bytes_changed_ += changed;
  seconds_ += seconds;
  if (bytes > (4 << 20)) copy_rate_ = 0.5 * copy_rate_ + 0.5 * static_cast<double>(bytes) / seconds;
}

// The rank's copies are done and can be seen by all.
void Switcher::settle(int rank) const {
  parts_.device.finish_blocks(rank);
  if (Collectives* collectives = parts_.device.collectives()) exchange(parts_.world, *collectives, rank);
  wait_until_idle(parts_.world, parts_.device, rank);
}

// A rank that slept, or that others have given up, writes nothing more.
void Switcher::reach(CopyPoint point, CopyPoint::When when) const {
  point.when = when;
  if (hook) hook(point);
  parts_.world.check_abort();
}

// Whose copies a rank has a part in: its own, by reading from others. Where it cannot read their memory it also sends, and all ranks go
// through all copies in one order.
template <class F>
void Switcher::for_destinations(int rank, F&& f) const {
  if (parts_.device.collectives() == nullptr) f(rank);
  else
    for (int to = 0; to < parts_.world.ranks(); ++to) f(to);
}

// The rank's part in a copy to rank `to`.
void Switcher::copy_block(const CopyPoint& point, int to, const BlockCopy& c, bool local, Part& done) const {
  if (to == point.rank) {
    reach(point, CopyPoint::kBetween);
    done.bytes += c.bytes;
    if (!local) done.bytes_changed += c.bytes;
  }
  std::byte* const dst = parts_.arenas[to] + c.dst_offset;
  const std::byte* const src = parts_.arenas[c.src_rank] + c.src_offset;
  Collectives* const collectives = parts_.device.collectives();
  if (to == point.rank && (collectives == nullptr || c.src_rank == to)) parts_.device.copy_block(to, dst, c.src_rank, src, c.bytes);
  else if (to == point.rank) collectives->receive(to, dst, c.bytes, c.src_rank);
  else if (c.src_rank == point.rank) collectives->send(c.src_rank, src, c.bytes, to);
}

// This thread's share of weight pieces [pieces.begin, pieces.end) of num_pieces: a range of the bytes of the item that go to rank `to`.
void Switcher::copy_weights(const CopyPoint& point, int to, Range pieces, int64_t num_pieces, Part& done) {
  const std::vector<BlockCopy>& copies = plan_to(point.to).items[point.item].to[to];
  if (copies.empty()) return;
  const std::vector<int64_t>& ends = ends_[static_cast<int>(point.to)][point.item][to];
  const int64_t begin = share_of(ends.back(), pieces.begin, num_pieces, 64).begin;
  const int64_t end = share_of(ends.back(), pieces.end - 1, num_pieces, 64).end;
  const Range share = share_of(end - begin, point.thread, parts_.world.threads(), 64);
  if (resident_) {
    reach(point, CopyPoint::kBetween);
    resident_->copy_weights(to, point.to, point.item, begin + share.begin, begin + share.end);
    done.bytes += share.size();
    done.bytes_changed += share.size();
    return;
  }
  int64_t at = begin + share.begin;
  size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), at) - ends.begin());
  for (; at < begin + share.end; ++i) {
    const BlockCopy& c = copies[i];
    const int64_t into = at - (ends[i] - c.bytes);
    const int64_t bytes = std::min(c.bytes - into, begin + share.end - at);
    copy_block(point, to, {c.src_rank, c.src_offset + into, c.dst_offset + into, bytes}, false, done);
    at += bytes;
  }
}

void Switcher::copy_blocks(const CopyPoint& point, int to, Part& done) {
  if (resident_) {
    if (list_.empty()) return;
    reach(point, CopyPoint::kBetween);
    resident_->copy_pages(to, point.to, point.item);
    const auto [bytes, changed] = resident_->page_bytes(to, point.to);
    done.bytes += bytes;
    done.bytes_changed += changed;
    return;
  }
  const auto threads = static_cast<size_t>(parts_.world.threads());
  for (size_t i = static_cast<size_t>(point.thread); i < list_.size(); i += threads)
    for_each_kv_block(parts_.arena, point.to, point.item, to, pair_of(list_[i]),
                      [&](const BlockCopy& c, bool local) { copy_block(point, to, c, local, done); });
}

std::pair<int64_t, int64_t> Switcher::bytes_to(Layout to) const {
  return bytes_of(to, to == Layout::kTp ? Range{seam_, num_layers_} : Range{0, seam_});
}

std::pair<int64_t, int64_t> Switcher::bytes_of(Layout to, Range items) const {
  int64_t weights = 0;
  for (int64_t i = items.begin; i < items.end; ++i)
    for (const std::vector<int64_t>& ends : ends_[static_cast<int>(to)][static_cast<size_t>(i)])
      if (!ends.empty()) weights += ends.back();
  int64_t heads = 0, room = 0;  // KV head copies a block takes, blocks that the layout holds
  if (to == Layout::kTp) {
    for (int r = 0; r < parts_.world.ranks(); ++r) heads += static_cast<int64_t>(parts_.arena.local_kv_heads(r, Layout::kTp).size());
    room = parts_.kv.tp_capacity();
  } else {
    heads = static_cast<int64_t>(parts_.arena.local_kv_heads(0, Layout::kEp).size());
    for (int h = 0; h < parts_.kv.num_homes(); ++h) room += parts_.kv.ep_capacity(h);
  }
  const int64_t blocks = std::min(static_cast<int64_t>(parts_.kv.live_blocks().size()), room);  // cached ones move too
  const int64_t kv = blocks * heads * parts_.arena.kv_slice_bytes() * items.size();
  // A rank's own part of KV stays with it: about 1/P.
  return {weights + kv, weights + kv - kv / parts_.world.ranks()};
}

}  // namespace moebius
