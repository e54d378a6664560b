// From tokens to text, choice by choice: whole characters, without special tokens, cut where a stop string begins. Text that could still
// become a stop string is held back.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "examples/serve/broker.h"

namespace moebius_examples {

// Finds the first of several strings in a text that comes in pieces.
class StopMatcher {
 public:
  StopMatcher(std::vector<std::string> stops, bool keep_stop) : stops_(std::move(stops)), keep_(keep_stop) {}

  // The text that is certain after this piece; look: a string may end in it. Once stopped() there is no more.
  std::string push(std::string_view piece, bool look);
  // What was held back.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  bool keep_;
  std::string held_;
  bool stopped_ = false;
};

struct TokenRecord {
  int32_t token = -1;
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;
  int64_t offset = 0;  // characters of the text that lie before it
};

// What one item adds to a choice.
struct Piece {
  int32_t choice = 0;
  std::string text;
  std::optional<TokenRecord> token;     // none where the choice ends without one
  const char* finish_reason = nullptr;  // null: it goes on
};

struct TextRules {
  std::vector<std::string> stop;
  bool include_stop = false;
  int64_t min_tokens = 0;
};

class Transcript {
 public:
  Transcript(const moebius_cpp::Tokenizer& tokenizer, const TextRules& rules, size_t choices);

  // Nothing for what comes after a choice has stopped.
  std::optional<Piece> take(const Item& item);
  bool all_ended() const { return unfinished_ == 0; }
  int64_t completion_tokens() const { return completion_tokens_; }

 private:
  struct Choice {
    moebius_cpp::Decoder decoder;
    StopMatcher matcher;
    int64_t tokens = 0, characters = 0;
    bool ended = false;
  };
  std::string push(Choice& choice, std::string_view text) const;
  void end(Choice& choice, Piece& piece, const char* reason);
  bool is_special(int32_t token) const;

  const moebius_cpp::Tokenizer& tokenizer_;
  const TextRules rules_;
  std::deque<Choice> choices_;
  size_t unfinished_;
  int64_t completion_tokens_ = 0;
};

}  // namespace moebius_examples
