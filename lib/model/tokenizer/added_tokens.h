// Finds added tokens ("<|endoftext|>") in text, before any pattern or merge sees it: leftmost, longest, not
// overlapping.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "lib/model/tokenizer/regex.h"
#include "lib/model/tokenizer/spec.h"

namespace moebius::tokenizer {

class AddedTokenMatcher {
 public:
  static constexpr int32_t kText = -1;
  struct Piece {
    TextRange range;  // with the white space that the token takes along
    int32_t id;       // kText: no token
  };

  // Of tokens with equal contents the first one is found.
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  // `text` cut into tokens and the non-empty stretches between them, in order. Well-formed UTF-8.
  std::vector<Piece> split(std::string_view text) const;

 private:
  // The longest token whose content begins at `offset`.
  const AddedToken* longest_at(std::string_view text, size_t offset) const;

  std::vector<AddedToken> tokens_;        // sorted by content
  std::array<bool, 256> begins_token_{};  // by first byte
};

}  // namespace moebius::tokenizer
