#include "lib/model/tokenizer/unicode.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include <utf8proc.h>

#include "lib/base/error.h"

namespace moebius::tokenizer {
namespace {

uint8_t byte_at(std::string_view text, size_t offset) { return static_cast<uint8_t>(text[offset]); }

// Bytes of a character that begins with `lead`; 0 if none does.
size_t length_from_lead(uint8_t lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xC2) return 0;
  if (lead < 0xE0) return 2;
  if (lead < 0xF0) return 3;
  return lead < 0xF5 ? 4 : 0;
}

// Second bytes are restricted after four leads: no overlong forms, no surrogates, nothing above U+10FFFF.
bool is_second_byte(uint8_t lead, uint8_t second) {
  const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  return second >= low && second <= high;
}

// How many bytes at `offset` are the start of a character of `length` bytes; at least 1.
size_t matching_bytes(std::string_view bytes, size_t offset, size_t length) {
  size_t have = 1;
  while (have < length && offset + have < bytes.size()) {
    const uint8_t next = byte_at(bytes, offset + have);
    if (have == 1 ? !is_second_byte(byte_at(bytes, offset), next) : (next & 0xC0) != 0x80) break;
    ++have;
  }
  return have;
}

bool is_continuation(char c) { return (static_cast<uint8_t>(c) & 0xC0) == 0x80; }

int combining_class(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

std::vector<utf8proc_int32_t> decompose(std::string_view text) {
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
  std::vector<utf8proc_int32_t> decomposed;
  decomposed.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    at += c.length;
    utf8proc_int32_t parts[8];  // the longest canonical decomposition has 4
    int unused_boundary = 0;
    const auto num_parts =
        utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.value), parts, 8, kOptions, &unused_boundary);
    MOEBIUS_ASSERT(num_parts >= 0 && num_parts <= 8);
    decomposed.insert(decomposed.end(), parts, parts + num_parts);
  }
  return decomposed;
}

// Canonical order: each run of combining marks sorted by class. (utf8proc_decompose does this by exchanging neighbours,
// quadratic in the length of a run that the text's author chooses.)
void order_marks(std::vector<utf8proc_int32_t>& text) {
  const auto is_mark = [](utf8proc_int32_t c) { return combining_class(c) != 0; };
  const auto by_class = [](utf8proc_int32_t a, utf8proc_int32_t b) { return combining_class(a) < combining_class(b); };
  for (auto run = std::find_if(text.begin(), text.end(), is_mark); run != text.end();) {
    const auto run_end = std::find_if_not(run, text.end(), is_mark);
    if (!std::is_sorted(run, run_end, by_class)) std::stable_sort(run, run_end, by_class);
    run = std::find_if(run_end, text.end(), is_mark);
  }
}

}  // namespace

size_t append_well_formed(std::string_view bytes, std::string& out) {
  size_t copied = 0, at = 0;
  while (at < bytes.size()) {
    const size_t length = length_from_lead(byte_at(bytes, at));
    const size_t have = length == 0 ? 1 : matching_bytes(bytes, at, length);
    if (have != length) {
      out.append(bytes.substr(copied, at - copied));
      if (length != 0 && at + have == bytes.size()) return have;
      out.append(kReplacementCharacter);
      copied = at + have;
    }
    at += have;
  }
  out.append(bytes.substr(copied));
  return 0;
}

std::string to_well_formed(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  if (append_well_formed(bytes, text) != 0) text.append(kReplacementCharacter);
  return text;
}

CodePoint code_point_at(std::string_view text, size_t offset) {
  const uint8_t lead = byte_at(text, offset);
  const size_t length = length_from_lead(lead);
  if (length == 1) return {lead, 1};
  char32_t value = lead & (0x7F >> length);
  for (size_t i = 1; i < length; ++i) value = value << 6 | (byte_at(text, offset + i) & 0x3F);
  return {value, length};
}

CodePoint code_point_before(std::string_view text, size_t offset) {
  size_t begin = offset - 1;
  while (is_continuation(text[begin])) --begin;
  return code_point_at(text, begin);
}

std::string to_nfc(std::string_view text) {
  // Everything below U+0300 is in form C already: its UTF-8 has no byte from 0xCC up.
  if (std::none_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) >= 0xCC; }))
    return std::string(text);
  std::vector<utf8proc_int32_t> points = decompose(text);
  order_marks(points);
  const auto length = utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(points.size()),
                                               static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  MOEBIUS_ASSERT(length >= 0);
  std::string composed;
  composed.reserve(text.size());
  for (utf8proc_ssize_t i = 0; i < length; ++i) {
    utf8proc_uint8_t encoded[4];
    composed.append(reinterpret_cast<const char*>(encoded), utf8proc_encode_char(points[i], encoded));
  }
  return composed;
}

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_word(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    case UTF8PROC_CATEGORY_SO:  // the circled and squared Latin letters are Alphabetic
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
             (c >= 0x1F170 && c <= 0x1F189);
    default: return c == 0x200C || c == 0x200D;
  }
}

}  // namespace moebius::tokenizer
