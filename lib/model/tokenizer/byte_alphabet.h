// The byte-level alphabet: how vocabularies write bytes as visible characters. 0x21–0x7E, 0xA1–0xAC and 0xAE–0xFF stand
// for themselves; the other 68 bytes, in order, are U+0100 … U+0143.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "lib/model/tokenizer/unicode.h"

namespace moebius::tokenizer {

constexpr std::array<int16_t, 0x144> make_byte_of_symbol() {
  std::array<int16_t, 0x144> byte_of{};
  for (int16_t& byte : byte_of) byte = -1;
  int next_symbol = 0x100;
  for (int16_t byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    byte_of[visible ? byte : next_symbol++] = byte;
  }
  return byte_of;
}

inline constexpr std::array<int16_t, 0x144> kByteOfSymbol = make_byte_of_symbol();

// The bytes that a vocabulary entry stands for; none if it contains a character outside the alphabet.
inline std::optional<std::string> bytes_of_symbols(std::string_view symbols) {
  std::string bytes;
  for (size_t at = 0; at < symbols.size();) {
    const CodePoint symbol = code_point_at(symbols, at);
    if (symbol.value >= kByteOfSymbol.size() || kByteOfSymbol[symbol.value] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(kByteOfSymbol[symbol.value]));
    at += symbol.length;
  }
  return bytes;
}

}  // namespace moebius::tokenizer
