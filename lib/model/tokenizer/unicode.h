// What the tokenizer needs of Unicode: well-formed UTF-8, NFC, and two character classes.
// "Well-formed" in a parameter's name or comment is a precondition; append_well_formed establishes it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace moebius::tokenizer {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// Appends `bytes` to `out` with each maximal ill-formed part (Unicode 3.9, "substitution of maximal subparts") replaced
// by U+FFFD. A tail that more bytes could complete is not appended: returns its length, 0…3.
size_t append_well_formed(std::string_view bytes, std::string& out);

// The same for a text that has ended: an unfinished tail is ill-formed, too.
std::string to_well_formed(std::string_view bytes);

struct CodePoint {
  char32_t value;
  size_t length;  // bytes in UTF-8
};
// The code point that begins at `offset` of well-formed text; offset < text.size().
CodePoint code_point_at(std::string_view text, size_t offset);
// The one that ends at `offset`; offset > 0.
CodePoint code_point_before(std::string_view text, size_t offset);

// Normalization form C of well-formed text, in O(n log n) whatever the order of its combining marks.
std::string to_nfc(std::string_view text);

// The property White_Space.
bool is_white_space(char32_t c);
// \w of UTS #18: Alphabetic, marks, decimal digits, connector punctuation, join controls.
bool is_word(char32_t c);

}  // namespace moebius::tokenizer
