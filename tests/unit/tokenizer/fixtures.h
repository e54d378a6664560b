// Tokenizers to test with: the files that are shipped, and small ones made here.
#pragma once

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "lib/base/error.h"
#include "lib/model/tokenizer/tokenizer.h"
#include "tests/catch.h"

namespace moebius {

using Ids = std::vector<int32_t>;

inline nlohmann::json read_json(const std::string& path) {
  std::ifstream file(path);
  INFO(path);
  REQUIRE(file.good());
  return nlohmann::json::parse(file);
}

// Folders that hold a tokenizer.json and Hugging Face's output for some texts.
inline std::vector<std::string> reference_folders() {
  return {MOEBIUS_TEST_DATA "/tokenizers/nfc-legacy-merges", MOEBIUS_TEST_DATA "/tokenizers/staged-splits-bos",
          MOEBIUS_SHIPPED_MODELS "/shakespeare-moe"};
}

// How the byte-level alphabet writes a byte, in UTF-8.
inline std::string symbol_of(int byte) {
  int next = 0x100, code = 0;
  for (int b = 0; b <= byte; ++b) {
    const bool visible = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    code = visible ? b : next++;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

// A tokenizer.json whose ids 0…255 are the bytes, then `tokens`; no merges, no patterns.
inline nlohmann::json byte_tokenizer(const std::vector<std::string>& tokens = {}) {
  nlohmann::json vocab = nlohmann::json::object();
  for (int byte = 0; byte < 256; ++byte) vocab[symbol_of(byte)] = byte;
  for (const std::string& token : tokens) {
    const auto id = static_cast<int>(vocab.size());
    vocab[token] = id;
  }
  return {
      {"version", "1.0"},
      {"added_tokens", nlohmann::json::array()},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}},
  };
}

inline nlohmann::json added_token(int id, const std::string& content, const std::vector<std::string>& flags = {}) {
  nlohmann::json token = {{"id", id}, {"content", content}};
  for (const char* flag : {"special", "normalized", "lstrip", "rstrip", "single_word"}) {
    token[flag] = std::find(flags.begin(), flags.end(), flag) != flags.end();
  }
  return token;
}

inline Tokenizer make_tokenizer(const nlohmann::json& json) { return Tokenizer::from_json(json.dump(), "test.json"); }

// The code and message of the Error that an operation raises.
struct Failure {
  Code code{};
  std::string message;
};
template <typename Operation>
Failure failure_of(Operation operation) {
  try {
    operation();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  FAIL("no Error was raised");
  return {};
}

// Well-formed UTF-8 of every length class, white space and marks more often than chance has them.
template <typename Random>
std::string random_text(Random& random, size_t num_characters) {
  static const std::vector<std::string> kFrequent = {
      " ", "\n", "\r", "\t", "'s", "\xC2\xA0", "e\xCC\x81", "\xCC\x87\xCC\xA3", "\xE1\xA0\x8E", "the", "12"};
  std::string text;
  while (num_characters-- > 0) {
    const uint32_t choice = random() % 8;
    if (choice < 3) {
      text += kFrequent[random() % kFrequent.size()];
      continue;
    }
    const uint32_t limits[] = {0x80, 0x800, 0x3000, 0x10000, 0x110000};
    uint32_t c = random() % limits[choice - 3];
    if (c >= 0xD800 && c < 0xE000) c = 0xFFFD;
    if (c < 0x80) {
      text += static_cast<char>(c);
    } else if (c < 0x800) {
      text += {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    } else if (c < 0x10000) {
      text += {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 0x3F)),
               static_cast<char>(0x80 | (c & 0x3F))};
    } else {
      text += {static_cast<char>(0xF0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 0x3F)),
               static_cast<char>(0x80 | (c >> 6 & 0x3F)), static_cast<char>(0x80 | (c & 0x3F))};
    }
  }
  return text;
}

}  // namespace moebius
