#include "lib/kv/kv_manager.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <random>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "lib/base/error.h"
#include "lib/layout/owners.h"

namespace moebius {

BlockKey extend_key(const BlockKey& prefix, std::span<const int32_t> tokens) {
  // The prefix enters as the seed and as a final mix, so that equal blocks after different prefixes differ in all 128 bits.
  const XXH128_hash_t h = XXH3_128bits_withSeed(tokens.data(), tokens.size_bytes(), prefix.low);
  const uint64_t mix[4] = {h.low64, h.high64, prefix.low, prefix.high};
  const XXH128_hash_t k = XXH3_128bits(mix, sizeof mix);
  return {k.low64, k.high64};
}

static BlockKey random_key() {
  std::random_device device;
  const auto word = [&] { return uint64_t{device()} << 32 | device(); };
  const uint64_t low = word();
  return {low, word()};
}

KvManager::KvManager(int64_t tp_pages, std::vector<int64_t> ep_pages, int page_tokens, bool prefix_cache, Phase phase)
    : first_key_(random_key()),
      phase_(phase),
      page_tokens_(page_tokens),
      prefix_cache_(prefix_cache),
      tp_capacity_(tp_pages),
      ep_capacity_(std::move(ep_pages)) {
  MOEBIUS_ASSERT(phase != Phase::kBoth);
  const int64_t ep_total = std::accumulate(ep_capacity_.begin(), ep_capacity_.end(), int64_t{0});
  // A block has an EP page of its own or, in phase kTp, a TP page.
  const int64_t num_blocks = tp_pages + ep_total;
  blocks_.resize(num_blocks);
  live_slot_.assign(num_blocks, -1);
  live_.reserve(num_blocks);
  for (int64_t b = num_blocks - 1; b >= 0; --b) free_blocks_.push_back(static_cast<int32_t>(b));
  for (int64_t p = tp_pages - 1; p >= 0; --p) tp_free_.push_back(static_cast<int32_t>(p));
  for (int64_t pages : ep_capacity_) {
    std::vector<int32_t>& pool = ep_free_.emplace_back();
    for (int64_t p = pages - 1; p >= 0; --p) pool.push_back(static_cast<int32_t>(p));
  }
  tp_blocks_.assign(tp_pages, 0);
  tp_cached_.assign(tp_pages, 0);
  tp_leader_.assign(tp_pages, -1);
  cached_.resize(ep_capacity_.size() + 1);
  cached_count_.assign(ep_capacity_.size() + 1, 0);
  index_.assign(std::bit_ceil(static_cast<uint64_t>(num_blocks) * 2 + 2), -1);
  index_mask_ = index_.size() - 1;
  root_homes_.reserve(num_blocks);
}

int64_t KvManager::available(int home) const {
  const int64_t tp = static_cast<int64_t>(tp_free_.size()) + tp_reclaimable_;
  if (phase_ == Phase::kTp) return tp;
  const int64_t ep = static_cast<int64_t>(ep_free_[home].size()) + cached_count_[home + 1];
  return phase_ == Phase::kEp ? ep : std::min(ep, tp);
}

double KvManager::usage() const {
  int64_t used = tp_capacity_ - static_cast<int64_t>(tp_free_.size()) - tp_reclaimable_, capacity = tp_capacity_;
  if (phase_ == Phase::kEp) {
    used = blocks_in_use();
    capacity = std::accumulate(ep_capacity_.begin(), ep_capacity_.end(), int64_t{0});
  }
  return capacity > 0 ? static_cast<double>(used) / static_cast<double>(capacity) : 0;
}

int64_t KvManager::blocks_in_use() const {
  return static_cast<int64_t>(live_.size()) - std::accumulate(cached_count_.begin(), cached_count_.end(), int64_t{0});
}

// Of equal blocks in use, which have different homes, the first in the index counts.
int64_t KvManager::tp_pages_needed() const {
  MOEBIUS_ASSERT(phase_ == Phase::kEp);
  const auto first_used = [&](const BlockKey& key) {
    size_t s = slot_of(key);
    while (blocks_[index_[s]].key != key || blocks_[index_[s]].users == 0) s = (s + 1) & index_mask_;
    return index_[s];
  };
  return std::count_if(live_.begin(), live_.end(), [&](int32_t b) {
    const Block& block = blocks_[b];
    return block.users > 0 && (!block.registered || first_used(block.key) == b);
  });
}

bool KvManager::release_helps(int32_t b, int home) const {
  const Block& block = blocks_[b];
  if (block.users != 1) return false;
  if (lacks_ep_page(home)) return block.home == home;
  return wants_tp() && tp_blocks_[block.tp_page] - tp_cached_[block.tp_page] == 1;
}

// ---- pages and blocks

static bool used_before(const Block& a, const Block& b) { return a.last_use < b.last_use; }

// The home whose block in `at` [homes] comes first; −1 where no home has any more.
template <class First>
int KvManager::pick_home(const int32_t* at, const First& first) const {
  int picked = -1;
  for (int h = 0; h < num_homes(); ++h)
    if (at[h] >= 0 && (picked < 0 || first(blocks_[at[h]], blocks_[at[picked]]))) picked = h;
  return picked;
}

int32_t KvManager::new_block() {
  MOEBIUS_ASSERT(!free_blocks_.empty());
  const int32_t b = free_blocks_.back();
  free_blocks_.pop_back();
  blocks_[b] = Block{};
  live_slot_[b] = static_cast<int32_t>(live_.size());
  live_.push_back(b);
  return b;
}

bool KvManager::take_tp_page(int32_t b) {
  if (tp_free_.empty()) return false;
  const int32_t page = tp_free_.back();
  tp_free_.pop_back();
  tp_blocks_[page] = 1;
  tp_leader_[page] = b;
  blocks_[b].tp_page = page;
  return true;
}

bool KvManager::take_ep_page(int32_t b, int home) {
  if (ep_free_[home].empty()) return false;
  blocks_[b].ep_page = ep_free_[home].back();
  blocks_[b].home = home;
  ep_free_[home].pop_back();
  return true;
}

void KvManager::drop_tp_page(int32_t b) {
  const int32_t page = blocks_[b].tp_page;
  if (page < 0) return;
  if (tp_leader_[page] == b) tp_leader_[page] = -1;
  if (--tp_blocks_[page] == 0) tp_free_.push_back(page);
  else if (tp_blocks_[page] == tp_cached_[page]) ++tp_reclaimable_;
  blocks_[b].tp_page = -1;
}

// Anew, after a switch has begun or ended.
void KvManager::count_reclaimable() {
  std::fill(tp_cached_.begin(), tp_cached_.end(), 0);
  tp_reclaimable_ = 0;
  if (!wants_tp()) return;
  for (int32_t b : live_)
    if (const Block& block = blocks_[b]; block.users == 0)
      tp_reclaimable_ += ++tp_cached_[block.tp_page] == tp_blocks_[block.tp_page];
}

void KvManager::drop_ep_page(int32_t b) {
  Block& block = blocks_[b];
  if (block.ep_page >= 0) ep_free_[block.home].push_back(block.ep_page);
  block.ep_page = -1;
  block.home = -1;
}

bool KvManager::leads_tp_page(int32_t b) {
  int32_t& leader = tp_leader_[blocks_[b].tp_page];
  if (leader < 0) leader = b;  // the former one is gone
  return leader == b;
}

void KvManager::free_block(int32_t b) {
  if (blocks_[b].registered) index_erase(b);
  drop_tp_page(b);
  drop_ep_page(b);
  const int32_t last = live_.back();
  live_[live_slot_[b]] = last;
  live_slot_[last] = live_slot_[b];
  live_.pop_back();
  live_slot_[b] = -1;
  free_blocks_.push_back(b);
}

int32_t KvManager::allocate(int home) {
  if (available(home) == 0) return -1;  // giving up cached blocks would not help
  while (free_blocks_.empty() || (wants_tp() && tp_free_.empty()) || (wants_ep() && ep_free_[home].empty())) {
    const int32_t oldest = oldest_cached(home);
    if (oldest < 0) return -1;
    give_up(oldest);
  }
  const int32_t b = new_block();
  blocks_[b].users = 1;
  if (wants_tp()) take_tp_page(b);
  if (wants_ep()) take_ep_page(b, home);
  return b;
}

// Of the cached blocks whose going helps to get a page for this home. A TP page helps that no sequence uses: on whichever home its blocks
// are, they go one after the other. −1: there is none.
int32_t KvManager::oldest_cached(int home) const {
  if (phase_ == Phase::kTp) return cached_[0].head;
  if (phase_ == Phase::kEp || ep_free_[home].empty()) return cached_[home + 1].head;
  int32_t at[kMaxRanks];
  for (int h = 0; h < num_homes(); ++h) {
    const auto helps = [&](int32_t b) { return tp_cached_[blocks_[b].tp_page] == tp_blocks_[blocks_[b].tp_page]; };
    at[h] = cached_[h + 1].head;
    while (at[h] >= 0 && !helps(at[h])) at[h] = blocks_[at[h]].next;
  }
  const int oldest = pick_home(at, used_before);
  return oldest < 0 ? -1 : at[oldest];
}

void KvManager::release(int32_t b) {
  Block& block = blocks_[b];
  MOEBIUS_ASSERT(block.users > 0);
  if (--block.users > 0) return;
  block.last_use = ++uses_;
  if (block.registered) cache_push(b);
  else free_block(b);
}

// ---- cached lists, oldest first

void KvManager::cache_push(int32_t b) {
  Block& block = blocks_[b];
  List& list = cached_list(block.home);
  block.prev = list.tail;
  block.next = -1;
  (list.tail >= 0 ? blocks_[list.tail].next : list.head) = b;
  list.tail = b;
  ++cached_count_[block.home + 1];
  if (block.tp_page >= 0) tp_reclaimable_ += ++tp_cached_[block.tp_page] == tp_blocks_[block.tp_page];
}

void KvManager::cache_remove(int32_t b) {
  Block& block = blocks_[b];
  List& list = cached_list(block.home);
  (block.prev >= 0 ? blocks_[block.prev].next : list.head) = block.next;
  (block.next >= 0 ? blocks_[block.next].prev : list.tail) = block.prev;
  block.prev = block.next = -1;
  --cached_count_[block.home + 1];
  if (block.tp_page >= 0) tp_reclaimable_ -= tp_cached_[block.tp_page]-- == tp_blocks_[block.tp_page];
}

void KvManager::give_up(int32_t cached) {
  cache_remove(cached);
  free_block(cached);
}

void KvManager::drop_cached() {
  for (int h = -1; h < num_homes(); ++h)
    while (cached_list(h).head >= 0) give_up(cached_list(h).head);
}

// ---- the index: open addressing, linear probing, by key alone, so that it stays as it is when blocks get homes or lose them

int32_t KvManager::lookup(const BlockKey& key, int32_t home) const {
  for (size_t s = slot_of(key); index_[s] >= 0; s = (s + 1) & index_mask_)
    if (const Block& b = blocks_[index_[s]]; b.key == key && home_key(b.home) == home) return index_[s];
  return -1;
}

void KvManager::index_insert(int32_t block) {
  size_t s = slot_of(blocks_[block].key);
  while (index_[s] >= 0) s = (s + 1) & index_mask_;
  index_[s] = block;
}

void KvManager::index_erase(int32_t block) {
  size_t s = slot_of(blocks_[block].key);
  while (index_[s] != block) s = (s + 1) & index_mask_;
  for (size_t hole = s;;) {  // close the hole: move up whoever may lie there
    index_[hole] = -1;
    size_t next = hole;
    for (;;) {
      next = (next + 1) & index_mask_;
      if (index_[next] < 0) return;
      const size_t wanted = slot_of(blocks_[index_[next]].key);
      if (((next - wanted) & index_mask_) >= ((next - hole) & index_mask_)) break;
    }
    index_[hole] = index_[next];
    hole = next;
  }
}

// Equal prefixes have met again: of each one block stays, the first in the index, for all who used any.
void KvManager::merge_equal(std::span<const SequenceBlocks> sequences) {
  for (const SequenceBlocks& sequence : sequences)
    for (int32_t& held : sequence.blocks) {
      if (!blocks_[held].registered) continue;
      const int32_t stays = lookup(blocks_[held].key, -1);
      if (stays == held) continue;
      add_user(stays);
      if (--blocks_[held].users == 0) free_block(held);
      held = stays;
    }
  for (size_t i = 0; i < live_.size();) {
    const int32_t b = live_[i];
    if (blocks_[b].registered && lookup(blocks_[b].key, -1) != b) give_up(b);  // cached; another block takes this place
    else ++i;
  }
}

int32_t KvManager::find(const BlockKey& key, int home) {
  const int32_t b = prefix_cache_ ? lookup(key, home_key(home)) : -1;
  if (b >= 0) add_user(b);
  return b;
}

void KvManager::add_user(int32_t b) {
  if (blocks_[b].users++ == 0) cache_remove(b);
}

void KvManager::register_block(int32_t b, const BlockKey& key, uint64_t root) {
  Block& block = blocks_[b];
  if (!prefix_cache_ || block.registered || lookup(key, home_key(block.home)) >= 0) return;
  block.key = key;
  block.root = root;
  block.registered = true;
  index_insert(b);
}

void KvManager::forget_copied() {
  for (int32_t b : live_) blocks_[b].copied_item = -1;
}

std::span<const int32_t> KvManager::live_blocks() const { return live_; }

// ---- switching

// The block that stands for `block` among sequences of `home`; made (from the same TP page) when there is none yet.
int32_t KvManager::block_for_home(int32_t block, int home) {
  const auto place = [&](int32_t b) {
    MOEBIUS_ASSERT(take_ep_page(b, home));
    if (const std::pair<uint64_t, int32_t> chain(blocks_[block].root, home); blocks_[block].registered && (root_homes_.empty() || root_homes_.back() != chain))
      root_homes_.push_back(chain);
  };
  if (blocks_[block].ep_page < 0) {
    place(block);
    return block;
  }
  int32_t last = block;
  for (int32_t b = block; b >= 0; b = blocks_[b].split) {
    if (blocks_[b].home == home) return b;
    last = b;
  }
  const int32_t made = new_block();
  place(made);
  blocks_[last].split = made;
  blocks_[made].tp_page = blocks_[block].tp_page;
  ++tp_blocks_[blocks_[made].tp_page];
  blocks_[made].key = blocks_[block].key;
  blocks_[made].root = blocks_[block].root;
  blocks_[made].registered = blocks_[block].registered;
  blocks_[made].full = blocks_[block].full;
  if (blocks_[made].registered) index_insert(made);
  return made;
}

void KvManager::open_ep(std::span<const SequenceBlocks> sequences) {
  MOEBIUS_ASSERT(phase_ == Phase::kTp);
  root_homes_.clear();
  for (int32_t b : live_) blocks_[b].split = -1;
  // Cached blocks wait outside their list until they have a home: blocks in use come first, then those that were used last.
  const List cached = cached_[0];
  cached_[0] = {};
  cached_count_[0] = 0;
  for (const SequenceBlocks& sequence : sequences)
    for (int32_t& held : sequence.blocks) {
      const int32_t b = block_for_home(held, sequence.home);
      if (b != held) {
        --blocks_[held].users;
        ++blocks_[b].users;
        held = b;
      }
    }
  std::sort(root_homes_.begin(), root_homes_.end());
  phase_ = Phase::kBoth;
  for (int32_t b = cached.tail; b >= 0; b = blocks_[b].prev) {
    const auto known = std::lower_bound(root_homes_.begin(), root_homes_.end(), std::pair<uint64_t, int32_t>(blocks_[b].root, -1));
    const bool in_use = known != root_homes_.end() && known->first == blocks_[b].root;
    const int home = in_use ? known->second : static_cast<int>(blocks_[b].root % ep_capacity_.size());
    (void)take_ep_page(b, home);
  }
  for (int32_t b = cached.head, next; b >= 0; b = next) {
    next = blocks_[b].next;
    blocks_[b].prev = blocks_[b].next = -1;
    if (blocks_[b].ep_page >= 0) cache_push(b);
    else free_block(b);
  }
  count_reclaimable();
}

void KvManager::open_tp() {
  MOEBIUS_ASSERT(phase_ == Phase::kEp);
  const auto take = [&](int32_t b) {  // blocks with equal keys share one TP page
    Block& block = blocks_[b];
    for (size_t s = slot_of(block.key); block.registered && index_[s] >= 0; s = (s + 1) & index_mask_)
      if (const Block& other = blocks_[index_[s]]; other.tp_page >= 0 && other.key == block.key) {
        block.tp_page = other.tp_page;
        ++tp_blocks_[block.tp_page];
        return true;
      }
    return take_tp_page(b);
  };
  for (int32_t b : live_)
    if (blocks_[b].users > 0) MOEBIUS_ASSERT(take(b));
  // Of all homes those that were used last.
  int32_t at[kMaxRanks];
  for (int h = 0; h < num_homes(); ++h) at[h] = cached_list(h).tail;
  for (;;) {
    const int h = pick_home(at, [](const Block& a, const Block& b) { return used_before(b, a); });
    if (h < 0) break;
    const int32_t b = at[h];
    at[h] = blocks_[b].prev;
    if (take(b)) continue;
    give_up(b);
  }
  phase_ = Phase::kBoth;
  count_reclaimable();
}

void KvManager::close(Layout arrived, std::span<const SequenceBlocks> sequences) {
  MOEBIUS_ASSERT(phase_ == Phase::kBoth);
  for (int32_t b : live_) {
    blocks_[b].copied_item = -1;
    if (arrived == Layout::kEp) drop_tp_page(b);
  }
  if (arrived == Layout::kTp) {
    List all;  // the homes' cached lists become one, oldest first
    int32_t at[kMaxRanks];
    for (int h = 0; h < num_homes(); ++h) at[h] = std::exchange(cached_list(h), {}).head;
    for (;;) {
      const int h = pick_home(at, used_before);
      if (h < 0) break;
      Block& block = blocks_[at[h]];
      block.prev = all.tail;
      (all.tail >= 0 ? blocks_[all.tail].next : all.head) = at[h];
      all.tail = std::exchange(at[h], block.next);
      block.next = -1;
    }
    cached_[0] = all;
    cached_count_[0] = std::accumulate(cached_count_.begin(), cached_count_.end(), int64_t{0});
    std::fill(cached_count_.begin() + 1, cached_count_.end(), 0);
    for (int32_t b : live_) drop_ep_page(b);
  }
  phase_ = arrived == Layout::kTp ? Phase::kTp : Phase::kEp;
  if (arrived == Layout::kTp) merge_equal(sequences);
  count_reclaimable();
}

}  // namespace moebius
