#include "lib/runtime/scheduler.h"

#include <algorithm>
#include <tuple>

#include "lib/base/error.h"

namespace moebius {
namespace {

// No two are equal in this order.
std::vector<Sequence*>::iterator place_in(std::vector<Sequence*>& list, const Sequence& sequence) {
  return std::lower_bound(list.begin(), list.end(), &sequence, [](const Sequence* a, const Sequence* b) { return runs_before(*a, *b); });
}

void insert_in_order(std::vector<Sequence*>& list, Sequence& sequence) { list.insert(place_in(list, sequence), &sequence); }

void erase_from(std::vector<Sequence*>& list, const Sequence& sequence) {
  const auto it = place_in(list, sequence);
  MOEBIUS_ASSERT(it != list.end() && *it == &sequence);
  list.erase(it);
}

}  // namespace

Scheduler::Scheduler(KvManager& kv, const SchedulerLimits& limits)
    : kv_(kv), limits_(limits), places_(kv.num_homes()) {
  running_.reserve(limits.max_batch);
  picked_.reserve(limits.max_batch);
  preempted_.reserve(limits.max_batch);
  constexpr int kLongQueue = 1 << 20;  // 8 MiB of pointers; only a longer queue makes the list grow within a step
  waiting_.reserve(static_cast<size_t>(std::min(limits.max_queue, kLongQueue)) + static_cast<size_t>(limits.max_batch));
}

void Scheduler::join_waiting(Sequence& sequence) {
  sequence.state = SequenceState::kWaiting;
  insert_in_order(waiting_, sequence);
  waiting_tokens_ += static_cast<int64_t>(sequence.tokens.size());
}

void Scheduler::leave_waiting(Sequence& sequence) {
  erase_from(waiting_, sequence);
  waiting_tokens_ -= static_cast<int64_t>(sequence.tokens.size());
}

int64_t Scheduler::tokens_to_prefill() const {
  int64_t tokens = waiting_tokens_;
  for (const Sequence* s : running_)
    if (s->remaining_rows() > 1) tokens += s->remaining_rows();
  return tokens;
}

void Scheduler::add(Sequence& sequence) { join_waiting(sequence); }

static void give_back(KvManager& kv, Sequence& sequence) {
  // Last block first, so that of a cached prefix the end is given up before its beginning.
  for (size_t i = sequence.blocks.size(); i-- > 0;) kv.release(sequence.blocks[i]);
  sequence.blocks.clear();
  sequence.tp_pages.clear();
  sequence.ep_pages.clear();
  sequence.computed = 0;
  sequence.chain = {};
  sequence.chained_blocks = 0;
  sequence.home = -1;
}

void Scheduler::remove(Sequence& sequence) {
  if (sequence.state == SequenceState::kRunning) erase_from(running_, sequence);
  else leave_waiting(sequence);
  give_back(kv_, sequence);
  sequence.state = SequenceState::kFinished;
}

void Scheduler::preempt(Sequence& sequence) {
  erase_from(running_, sequence);
  give_back(kv_, sequence);
  ++sequence.preemptions;
  join_waiting(sequence);
}

void Scheduler::remake_tables(Sequence& sequence) const {
  sequence.tp_pages.clear();
  sequence.ep_pages.clear();
  for (int32_t b : sequence.blocks) {
    sequence.tp_pages.push_back(kv_.block(b).tp_page);
    sequence.ep_pages.push_back(kv_.block(b).ep_page);
  }
}

static void append_block(KvManager& kv, Sequence& sequence, int32_t b) {
  sequence.blocks.push_back(b);
  sequence.tp_pages.push_back(kv.block(b).tp_page);
  sequence.ep_pages.push_back(kv.block(b).ep_page);
}

// Pages for the first num_tokens tokens; preempts later sequences to get them. False: the sequence itself had to go.
bool Scheduler::grow(Sequence& sequence, int64_t num_tokens) {
  const int64_t wanted = div_up(num_tokens, kv_.page_tokens());
  while (static_cast<int64_t>(sequence.blocks.size()) < wanted) {
    const int32_t b = kv_.allocate(sequence.home);
    if (b >= 0) {
      append_block(kv_, sequence, b);
      continue;
    }
    Sequence& victim = victim_for(sequence);
    preempted_.push_back(&victim);
    preempt(victim);
    if (&victim == &sequence) return false;
  }
  return true;
}

// The last running sequence whose going would free a page of the kind that lacks; the sequence itself if none after it does.
Sequence& Scheduler::victim_for(Sequence& sequence) const {
  for (size_t i = running_.size(); i-- > 0 && running_[i] != &sequence;)
    for (int32_t b : running_[i]->blocks)
      if (kv_.release_helps(b, sequence.home)) return *running_[i];
  return sequence;
}

int choose_home(std::span<const HomeCandidate> homes) {
  const auto load = [](const HomeCandidate& h) { return std::tuple(h.requests, -h.shared, h.tokens); };
  int best = -1;
  for (int h = 0; h < static_cast<int>(homes.size()); ++h)
    if (homes[h].room >= homes[h].pages && (best < 0 || load(homes[h]) < load(homes[best]))) best = h;
  return best;
}

// Where the whole of the sequence (one token more than it has) finds room now: a home, or 0 for the one table of pure TP.
int Scheduler::place_for(const Sequence& sequence) {
  const bool by_home = kv_.phase() != Phase::kTp;
  const std::span<HomeCandidate> places(places_.data(), by_home ? places_.size() : 1);
  const int64_t pages = div_up(static_cast<int64_t>(sequence.tokens.size()) + 1, kv_.page_tokens());
  for (int h = 0; h < static_cast<int>(places.size()); ++h) places[h] = {0, 0, kv_.available(h), pages, 0};
  for (size_t i = 0; by_home && i < running_.size(); ++i) {
    HomeCandidate& place = places[running_[i]->home];
    ++place.requests;
    place.tokens += static_cast<int64_t>(running_[i]->tokens.size());
  }
  find_shared(sequence, places);
  return choose_home(places);
}

bool Scheduler::may_share(const Sequence& sequence) const {
  return limits_.prefix_cache && !keeps_positions(sequence.request->spec);
}

// Full blocks that a sequence may take from others; at least one token is left to compute.
int64_t Scheduler::shareable_blocks(const Sequence& sequence) const {
  return may_share(sequence) ? (static_cast<int64_t>(sequence.tokens.size()) - 1) / kv_.page_tokens() : 0;
}

// Blocks that are there take no new page if somebody uses them; cached ones count as room, and are taken from it.
void Scheduler::find_shared(const Sequence& sequence, std::span<HomeCandidate> places) const {
  const int64_t page = kv_.page_tokens(), usable = shareable_blocks(sequence);
  BlockKey key = kv_.first_key();
  bool found = true;
  for (int64_t i = 0; i < usable && found; ++i) {
    key = extend_key(key, {sequence.tokens.data() + i * page, static_cast<size_t>(page)});
    found = false;
    for (int h = 0; h < static_cast<int>(places.size()); ++h) {
      if (places[h].shared < i) continue;  // its chain has ended before
      const int32_t b = kv_.peek(key, h);
      if (b < 0) continue;
      ++places[h].shared;
      places[h].pages -= kv_.block(b).users > 0;
      found = true;
    }
  }
}

// A sample waits while a running sibling on the home that it would get computes what they share; with no room for the whole of
// it anywhere, on any home.
bool Scheduler::waits_for_sibling(const Sequence& sequence, int place) const {
  const bool any_home = place < 0 || kv_.phase() == Phase::kTp;
  const int64_t shareable = std::min(shareable_blocks(sequence), (sequence.prompt_tokens() - 1) / kv_.page_tokens());
  for (const Sequence& s : sequence.request->samples)
    if (&s != &sequence && s.state == SequenceState::kRunning && (any_home || s.home == place) &&
        s.computed < shareable * kv_.page_tokens())
      return true;
  return false;
}

// Holds the findable blocks that the sequence's tokens begin with.
int64_t Scheduler::take_prefix(Sequence& sequence) {
  const int64_t page = kv_.page_tokens(), usable = shareable_blocks(sequence);
  BlockKey key = kv_.first_key();
  int64_t hits = 0;
  for (; hits < usable; ++hits) {
    const BlockKey next = extend_key(key, {sequence.tokens.data() + hits * page, static_cast<size_t>(page)});
    const int32_t b = kv_.find(next, sequence.home);
    if (b < 0) break;
    key = next;
    if (hits == 0) sequence.root = KvManager::root_of({sequence.tokens.data(), static_cast<size_t>(page)});
    append_block(kv_, sequence, b);
  }
  sequence.chain = key;
  sequence.chained_blocks = static_cast<int32_t>(hits);
  sequence.computed = hits * page;
  return hits * page;
}

// Waiting → running.
void Scheduler::admit(Sequence& sequence, int place) {
  sequence.home = kv_.phase() == Phase::kTp ? -1 : place;
  const int64_t hits = take_prefix(sequence);
  if (sequence.preemptions == 0) sequence.cached_tokens = static_cast<int32_t>(hits);
  prefix_hits += static_cast<uint64_t>(hits);
  if (may_share(sequence)) prefix_queries += static_cast<uint64_t>(sequence.tokens.size());
  leave_waiting(sequence);
  sequence.state = SequenceState::kRunning;
  insert_in_order(running_, sequence);
}

std::span<Sequence* const> Scheduler::plan(StepPlan& out) {
  preempted_.clear();
  picked_.clear();
  int64_t budget = limits_.chunk_tokens;
  const auto rows_for = [&](const Sequence& s) {
    return s.remaining_rows() == 1 ? int64_t{1} : std::min(s.remaining_rows(), budget);
  };
  const auto pick = [&](Sequence& s, int64_t rows) {
    if (s.remaining_rows() > 1) budget -= rows;
    picked_.push_back({&s, static_cast<int32_t>(rows)});
  };
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& s = *running_[i];
    const int64_t rows = rows_for(s);
    if (rows == 0) continue;
    if (grow(s, s.computed + rows)) pick(s, rows);
    else --i;  // it left the list itself
  }
  // Nobody is admitted in a step that had to preempt: the pages would only be taken away again.
  const Request* held = nullptr;  // siblings stand side by side, and what one waits for the next waits for too
  for (size_t i = 0; i < waiting_.size() && preempted_.empty() && budget > 0;) {
    if (static_cast<int>(running_.size()) >= limits_.max_batch) break;
    Sequence& s = *waiting_[i];
    if (s.request == held) {
      ++i;
      continue;
    }
    const int place = place_for(s);
    if (waits_for_sibling(s, place)) {
      held = s.request;
      continue;
    }
    if (place < 0) break;  // the line waits: order is kept
    admit(s, place);
    const int64_t rows = rows_for(s);
    if (grow(s, s.computed + rows)) pick(s, rows);
    else break;
  }
  order_by_home(out);
  return preempted_;
}

void Scheduler::order_by_home(StepPlan& out) {
  out.tokens.clear();
  out.chunks.clear();
  out.logit_rows.clear();
  out.choices.clear();
  out.decode_rows = out.prefill_rows = 0;
  out.shape.max_tokens = 0;
  for (int layout : {0, 1}) {
    out.places[layout].clear();
    out.attention[layout].clear();
  }
  const bool by_home = kv_.phase() != Phase::kTp;
  for (int h = 0; h < kv_.num_homes(); ++h) {
    out.shape.homes[h].begin = out.num_rows();
    out.shape.chunks_of_home[h].begin = static_cast<int64_t>(out.chunks.size());
    for (const Picked& p : picked_) {
      Sequence& s = *p.sequence;
      if (s.state != SequenceState::kRunning || (by_home ? s.home : 0) != h) continue;
      const int32_t row = static_cast<int32_t>(out.num_rows());
      const int32_t first = static_cast<int32_t>(s.computed);
      const auto table = [](const std::vector<int32_t>& pages) { return pages.empty() ? nullptr : pages.data(); };
      const int32_t* pages[2] = {table(s.tp_pages), table(s.ep_pages)};
      const bool samples = p.num_rows == s.remaining_rows();
      out.shape.max_tokens = std::max<int64_t>(out.shape.max_tokens, first + p.num_rows);
      for (int layout : {0, 1}) {
        out.attention[layout].push_back({row, p.num_rows, first, pages[layout]});
        for (int32_t i = 0; i < p.num_rows; ++i) out.places[layout].push_back({first + i, pages[layout]});
      }
      for (int32_t i = 0; i < p.num_rows; ++i) {
        out.tokens.push_back(s.tokens[first + i]);
        const bool last = samples && i + 1 == p.num_rows;
        if (last || (s.request->spec.keep_logits && s.logits.wants(first + i)))
          out.logit_rows.push_back({row + i, static_cast<int32_t>(out.chunks.size()), first + i, last});
      }
      (s.computed + p.num_rows > s.prompt_tokens() && p.num_rows == 1 ? out.decode_rows : out.prefill_rows) += p.num_rows;
      out.chunks.push_back({&s, row, p.num_rows, samples});
    }
    out.shape.homes[h].end = out.num_rows();
    out.shape.chunks_of_home[h].end = static_cast<int64_t>(out.chunks.size());
  }
  out.shape.num_rows = out.num_rows();
  out.shape.num_chunks = static_cast<int64_t>(out.chunks.size());
  MOEBIUS_ASSERT(out.num_rows() <= int64_t{limits_.chunk_tokens} + limits_.max_batch);  // what buffers were made for
}

void Scheduler::commit(const StepPlan& plan) {
  const int64_t page = kv_.page_tokens();
  for (const ScheduledChunk& chunk : plan.chunks) {
    Sequence& s = *chunk.sequence;
    s.computed += chunk.num_rows;
    while ((s.chained_blocks + 1) * page <= s.computed) {
      const int64_t i = s.chained_blocks++;
      s.chain = extend_key(s.chain, {s.tokens.data() + i * page, static_cast<size_t>(page)});
      if (i == 0) s.root = KvManager::root_of({s.tokens.data(), static_cast<size_t>(page)});
      kv_.set_full(s.blocks[i]);
      kv_.register_block(s.blocks[i], s.chain, s.root);
    }
  }
}

}  // namespace moebius
