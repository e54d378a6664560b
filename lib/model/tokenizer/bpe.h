// Byte-pair encoding: a pre-token's bytes, joined pair by pair, best rank first and leftmost among equals.
// A heap of candidate pairs over a linked list of symbols: O(n log n) in the length of the pre-token.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace moebius::tokenizer {

struct StringHash : std::hash<std::string_view> {
  using is_transparent = void;
};
// Token → id. Tokens as the file writes them or as the bytes they stand for; each user says which.
using Vocabulary = std::unordered_map<std::string, int32_t, StringHash, std::equal_to<>>;

// Two neighbouring tokens and the one that replaces them. A merge's rank is its index in the list.
struct Merge {
  int32_t left, right, result;
};

// (left, right) → rank and result: open addressing with linear probing, at most half full.
class MergeTable {
 public:
  struct Entry {
    int32_t left = -1, right = -1;  // −1: free
    int32_t rank = 0, result = 0;
  };

  // Of equal pairs the last one counts, as in Hugging Face's map.
  explicit MergeTable(const std::vector<Merge>& merges);
  const Entry* find(int32_t left, int32_t right) const {
    const Entry& entry = entries_[slot_of(left, right)];
    return entry.left < 0 ? nullptr : &entry;
  }

 private:
  size_t slot_of(int32_t left, int32_t right) const;  // of the pair, or the free one where it would go
  std::vector<Entry> entries_;                        // a power of two
};

class Bpe {
 public:
  // Buffers that one encode call reuses from pre-token to pre-token.
  struct Scratch {
    struct Symbol {
      int32_t id, previous, next;  // previous, next: indices into symbols, −1 at the ends; id −1: merged away
    };
    struct Candidate {
      int32_t rank, left, result;  // left: index of the pair's left symbol
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  // `vocabulary` is spelled in the byte-level alphabet. With `ignore_merges`, a pre-token that is itself a token is
  // taken whole.
  Bpe(const Vocabulary& vocabulary, const std::vector<Merge>& merges, bool ignore_merges);

  // Appends the ids of `bytes` (fewer than 2³¹).
  void encode(std::string_view bytes, Scratch& scratch, std::vector<int32_t>& ids) const;

 private:
  void make_symbols(std::string_view bytes, Scratch& scratch) const;
  void offer(Scratch& scratch, int32_t left) const;
  void merge_all(Scratch& scratch) const;

  std::array<int32_t, 256> id_of_byte_;  // −1: no such token
  MergeTable merges_;
  Vocabulary whole_;  // keys are bytes; empty unless ignore_merges
};

}  // namespace moebius::tokenizer
