// Pages of the KV cache in both layouts: who holds which, which are shared, and which TP page is which EP page.
//
// The unit is a block: page_tokens tokens of one sequence (or of several with the same prefix). A block has a page in the
// TP pool, a page in the pool of one home, or both while the seam is inside. The pools are:
//   TP: one page table for all ranks (each holds its own heads of the page);   EP: one pool per home, whole pages.
// Invariants:
//   1. A block in use has a page in every pool that the phase asks for (Phase), and so has every cached one.
//   2. A page belongs to one block; while the seam is inside a TP page to one or more (equal prefixes whose requests have different homes).
//   3. Registered blocks are full and hold committed KV; their tokens never change. A block nobody uses is cached if it is
//      registered, otherwise its pages are free at once. When a page is wanted, that of the cached blocks is given up which was used
//      longest ago of those that help.
//   4. While the seam is inside, a prefix hit is a block of the request's own home: valid in both page tables.
// Nothing here allocates after construction. One thread.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "lib/layout/types.h"

namespace moebius {

// Which page tables are alive: one in a pure layout, both while the seam is inside.
enum class Phase { kTp, kEp, kBoth };

// Identity of a full block: a hash of all tokens up to its end. Tokens themselves are not compared, so two prompts whose keys
// collide would share KV. By chance that takes some 2^64 blocks; on purpose it would take knowing where the chain starts, and each
// KvManager starts its own at a random key. (XXH3 is no cryptographic hash: whether that can be got round is not proven.)
struct BlockKey {
  uint64_t low = 0, high = 0;
  friend bool operator==(const BlockKey&, const BlockKey&) = default;
};
BlockKey extend_key(const BlockKey& prefix, std::span<const int32_t> tokens);

struct Block {
  int32_t tp_page = -1, ep_page = -1;
  int32_t home = -1;              // −1 in phase kTp
  int32_t users = 0;              // sequences that hold it
  bool full = false;              // every slot holds committed KV: never written again
  bool registered = false;
  BlockKey key;
  uint64_t root = 0;              // root_of the chain's first block: chains stay together on one home
  int32_t split = -1;             // open_ep: the next block made from the same TP page for another home
  int32_t copied_item = -1;       // the item whose KV of this block has been copied ahead (switcher's)
  uint64_t last_use = 0;          // when its last user released it: orders the lists of several homes
  int32_t prev = -1, next = -1;   // cached list of its home
};

class KvManager {
 public:
  KvManager(int64_t tp_pages, std::vector<int64_t> ep_pages, int page_tokens, bool prefix_cache, Phase phase);

  // What the key of a sequence's first block is extended from.
  BlockKey first_key() const { return first_key_; }
  // Which chain a sequence's first block begins: the same in every engine, so that where cached blocks go is not random.
  static uint64_t root_of(std::span<const int32_t> first_block) { return extend_key({}, first_block).low; }
  Phase phase() const { return phase_; }
  int page_tokens() const { return page_tokens_; }
  int num_homes() const { return static_cast<int>(ep_capacity_.size()); }
  int64_t tp_capacity() const { return tp_capacity_; }
  int64_t ep_capacity(int home) const { return ep_capacity_[home]; }

  // Blocks that could be had now for this home (free pages and cached ones); home is ignored in phase kTp.
  int64_t available(int home) const;
  // Pages in use by sequences, of those the present phase counts first (TP in kTp and kBoth).
  double usage() const;

  // A block with one user, or −1 when there is no room.
  int32_t allocate(int home);
  void release(int32_t block);
  // The cached or used block with this key for this home, one user added; −1 when there is none.
  int32_t find(const BlockKey& key, int home);
  // The same without a user.
  int32_t peek(const BlockKey& key, int home) const { return prefix_cache_ ? lookup(key, home_key(home)) : -1; }
  bool contains(const BlockKey& key, int home) const { return peek(key, home) >= 0; }
  // After a failed allocate: whether a page of the home is what lacks (else a TP page), and whether one could be had if the
  // block's only user released it.
  bool lacks_ep_page(int home) const { return wants_ep() && ep_free_[home].empty() && cached_count_[home + 1] == 0; }
  bool release_helps(int32_t block, int home) const;
  void set_full(int32_t block) { blocks_[block].full = true; }
  // Makes a full block findable. A second block with the same key stays unregistered.
  void register_block(int32_t block, const BlockKey& key, uint64_t root);
  void drop_cached();  // gives up every cached block (weights replaced, or tests)

  const Block& block(int32_t b) const { return blocks_[b]; }
  void set_copied_item(int32_t b, int32_t item) { blocks_[b].copied_item = item; }
  void forget_copied();                                    // a turn or a fault: nothing counts as copied ahead
  std::span<const int32_t> live_blocks() const;            // in use or cached; valid until the next call of any other member

  // The block whose KV fills its TP page when a layer moves to TP: one of those that share the page.
  bool leads_tp_page(int32_t b);

  // ---- Switching
  // Starts a switch out of a pure layout: every block gets its page in the other one too. The caller has checked that the
  // blocks in use fit; cached blocks that do not are given up. TP→EP divides a block whose users have different homes: the
  // sequences' block lists are rewritten in place.
  struct SequenceBlocks {
    std::span<int32_t> blocks;
    int32_t home = -1;
  };
  void open_ep(std::span<const SequenceBlocks> sequences);  // kTp → kBoth
  void open_tp();                                           // kEp → kBoth
  // Ends it: the seam has arrived, the other layout's pages are free. In TP equal prefixes are one block again: the lists are rewritten in place.
  void close(Layout arrived, std::span<const SequenceBlocks> sequences);

  // What EP→TP needs: TP pages that the blocks in use take at most and, in kEp, exactly. Equal prefixes of several homes take
  // one page; finding them costs a look-up for each block.
  int64_t blocks_in_use() const;
  int64_t tp_pages_needed() const;

 private:
  struct List {
    int32_t head = -1, tail = -1;
  };
  int32_t home_key(int home) const { return phase_ == Phase::kTp ? -1 : home; }
  bool wants_tp() const { return phase_ != Phase::kEp; }
  bool wants_ep() const { return phase_ != Phase::kTp; }
  int32_t lookup(const BlockKey& key, int32_t home) const;
  void index_insert(int32_t block);
  void index_erase(int32_t block);
  void merge_equal(std::span<const SequenceBlocks> sequences);
  size_t slot_of(const BlockKey& key) const { return key.low & index_mask_; }
  List& cached_list(int32_t home) { return cached_[home + 1]; }
  void add_user(int32_t block);
  void cache_push(int32_t block);
  void cache_remove(int32_t block);
  void give_up(int32_t cached);
  template <class First>
  int pick_home(const int32_t* at, const First& first) const;
  int32_t oldest_cached(int home) const;
  void free_block(int32_t block);
  bool take_tp_page(int32_t block);
  bool take_ep_page(int32_t block, int home);
  void drop_tp_page(int32_t block);
  void count_reclaimable();
  void drop_ep_page(int32_t block);
  int32_t new_block();
  int32_t block_for_home(int32_t block, int home);

  const BlockKey first_key_;
  Phase phase_;
  int page_tokens_;
  bool prefix_cache_;
  int64_t tp_capacity_;
  std::vector<int64_t> ep_capacity_;
  std::vector<Block> blocks_;
  std::vector<int32_t> free_blocks_, tp_free_;
  std::vector<std::vector<int32_t>> ep_free_;      // [home]
  std::vector<int32_t> tp_blocks_, tp_cached_;     // [tp page] blocks on it, and of these cached ones
  int64_t tp_reclaimable_ = 0;                     // TP pages all of whose blocks are cached
  std::vector<int32_t> tp_leader_;                 // [tp page] see leads_tp_page
  std::vector<std::pair<uint64_t, int32_t>> root_homes_;  // open_ep: (root, home) of each block in use
  std::vector<int32_t> live_, live_slot_;          // blocks that exist, and each one's place there
  std::vector<List> cached_;                       // [home + 1], oldest first
  std::vector<int64_t> cached_count_;              // [home + 1]
  uint64_t uses_ = 0;
  std::vector<int32_t> index_;                     // registered blocks by their keys, whatever their homes; open addressing: block or −1
  size_t index_mask_ = 0;
};

}  // namespace moebius
