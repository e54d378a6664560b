#include "lib/model/tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>

#include "lib/base/error.h"
#include "lib/model/tokenizer/byte_alphabet.h"

namespace moebius::tokenizer {
namespace {

// std::push_heap keeps the largest in front: "less" means "merged later".
bool merged_later(const Bpe::Scratch::Candidate& a, const Bpe::Scratch::Candidate& b) {
  return std::tie(a.rank, a.left) > std::tie(b.rank, b.left);
}

}  // namespace

MergeTable::MergeTable(const std::vector<Merge>& merges) : entries_(std::bit_ceil(2 * merges.size() + 1)) {
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& merge = merges[rank];
    entries_[slot_of(merge.left, merge.right)] = {merge.left, merge.right, static_cast<int32_t>(rank), merge.result};
  }
}

size_t MergeTable::slot_of(int32_t left, int32_t right) const {
  uint64_t hash = (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right));
  hash = (hash ^ hash >> 32) * 0x9E3779B97F4A7C15u;  // 2⁶⁴ / golden ratio: spreads consecutive ids over the high bits
  const size_t mask = entries_.size() - 1;
  size_t slot = (hash >> 32) & mask;
  while (entries_[slot].left >= 0 && (entries_[slot].left != left || entries_[slot].right != right))
    slot = (slot + 1) & mask;
  return slot;
}

Bpe::Bpe(const Vocabulary& vocabulary, const std::vector<Merge>& merges, bool ignore_merges) : merges_(merges) {
  id_of_byte_.fill(-1);
  for (const auto& [symbols, id] : vocabulary) {
    const std::optional<std::string> bytes = bytes_of_symbols(symbols);
    if (!bytes) continue;
    if (bytes->size() == 1) id_of_byte_[static_cast<uint8_t>(bytes->front())] = id;
    if (ignore_merges) whole_.emplace(*bytes, id);
  }
}

void Bpe::encode(std::string_view bytes, Scratch& scratch, std::vector<int32_t>& ids) const {
  if (const auto whole = whole_.find(bytes); whole != whole_.end()) {
    ids.push_back(whole->second);
    return;
  }
  make_symbols(bytes, scratch);
  merge_all(scratch);
  for (const Scratch::Symbol& symbol : scratch.symbols) {
    if (symbol.id >= 0) ids.push_back(symbol.id);
  }
}

void Bpe::make_symbols(std::string_view bytes, Scratch& scratch) const {
  scratch.symbols.clear();
  const auto size = static_cast<int32_t>(bytes.size());
  for (int32_t i = 0; i < size; ++i) {
    const auto byte = static_cast<uint8_t>(bytes[i]);
    if (id_of_byte_[byte] < 0)
      fail(Code::kUnsupported, "the tokenizer's vocabulary has no token for byte 0x{:02X}", byte);
    scratch.symbols.push_back({id_of_byte_[byte], i - 1, i + 1 < size ? i + 1 : -1});
  }
}

// Puts the pair that begins at symbol `left` on the heap if there is a merge for it.
void Bpe::offer(Scratch& scratch, int32_t left) const {
  const int32_t right = left < 0 ? -1 : scratch.symbols[left].next;
  if (right < 0) return;
  const MergeTable::Entry* merge = merges_.find(scratch.symbols[left].id, scratch.symbols[right].id);
  if (merge) scratch.heap.push_back({merge->rank, left, merge->result});
}

void Bpe::merge_all(Scratch& scratch) const {
  auto& [symbols, heap] = scratch;
  heap.clear();
  for (int32_t left = 0; left < static_cast<int32_t>(symbols.size()); ++left) offer(scratch, left);
  std::make_heap(heap.begin(), heap.end(), merged_later);
  const auto offer_and_sift = [&](int32_t left) {
    const size_t before = heap.size();
    offer(scratch, left);
    if (heap.size() > before) std::push_heap(heap.begin(), heap.end(), merged_later);
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), merged_later);
    const Scratch::Candidate best = heap.back();
    heap.pop_back();
    Scratch::Symbol& left = symbols[best.left];
    if (left.id < 0 || left.next < 0) continue;
    Scratch::Symbol& right = symbols[left.next];
    // The pair may have changed since it was offered. Hugging Face compares the result only: where two merges make the
    // same token, the newer pair is joined at the older one's rank. We do the same.
    const MergeTable::Entry* now = merges_.find(left.id, right.id);
    if (!now || now->result != best.result) continue;
    left.id = best.result;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].previous = best.left;
    offer_and_sift(left.previous);
    offer_and_sift(best.left);
  }
}

}  // namespace moebius::tokenizer
