#include "lib/model/tokenizer/added_tokens.h"

#include <algorithm>

#include "lib/model/tokenizer/unicode.h"

namespace moebius::tokenizer {
namespace {

bool stands_alone(std::string_view text, TextRange match) {
  const bool word_before = match.begin > 0 && is_word(code_point_before(text, match.begin).value);
  const bool word_after = match.end < text.size() && is_word(code_point_at(text, match.end).value);
  return !word_before && !word_after;
}

size_t skip_space_backward(std::string_view text, size_t offset, size_t floor) {
  while (offset > floor) {
    const CodePoint before = code_point_before(text, offset);
    if (!is_white_space(before.value)) break;
    offset -= before.length;
  }
  return offset;
}

size_t skip_space_forward(std::string_view text, size_t offset) {
  while (offset < text.size()) {
    const CodePoint next = code_point_at(text, offset);
    if (!is_white_space(next.value)) break;
    offset += next.length;
  }
  return offset;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::stable_sort(tokens_.begin(), tokens_.end(),
                   [](const AddedToken& a, const AddedToken& b) { return a.content < b.content; });
  for (const AddedToken& token : tokens_) begins_token_[static_cast<uint8_t>(token.content.front())] = true;
}

// Narrows the sorted range of tokens that agree with the text byte by byte. A token that ends at the present depth
// sorts before all that go on.
const AddedToken* AddedTokenMatcher::longest_at(std::string_view text, size_t offset) const {
  if (!begins_token_[static_cast<uint8_t>(text[offset])]) return nullptr;
  const AddedToken* longest = nullptr;
  auto first = tokens_.begin(), last = tokens_.end();
  for (size_t depth = 0; offset + depth < text.size(); ++depth) {
    const auto byte_of = [depth](const AddedToken& token) {
      return depth < token.content.size() ? static_cast<uint8_t>(token.content[depth]) : -1;
    };
    const int byte = static_cast<uint8_t>(text[offset + depth]);
    first = std::partition_point(first, last, [&](const AddedToken& token) { return byte_of(token) < byte; });
    last = std::partition_point(first, last, [&](const AddedToken& token) { return byte_of(token) == byte; });
    if (first == last) break;
    if (first->content.size() == depth + 1) longest = &*first;
  }
  return longest;
}

std::vector<AddedTokenMatcher::Piece> AddedTokenMatcher::split(std::string_view text) const {
  std::vector<Piece> pieces;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const AddedToken* token = longest_at(text, at);
    if (!token) {
      ++at;
      continue;
    }
    TextRange match{at, at + token->content.size()};
    at = match.end;
    if (token->single_word && !stands_alone(text, match)) continue;
    if (token->lstrip) match.begin = std::max(done, skip_space_backward(text, match.begin, done));
    if (token->rstrip) match.end = skip_space_forward(text, match.end);
    if (match.begin >= match.end) continue;  // white space that the token before took along
    if (done < match.begin) pieces.push_back({{done, match.begin}, kText});
    pieces.push_back({match, token->id});
    done = match.end;
  }
  if (done < text.size()) pieces.push_back({{done, text.size()}, kText});
  return pieces;
}

}  // namespace moebius::tokenizer
