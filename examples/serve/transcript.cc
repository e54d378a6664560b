#include "examples/serve/transcript.h"

#include <algorithm>

namespace moebius_examples {
namespace {

int64_t characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

}  // namespace

std::string StopMatcher::push(std::string_view piece, bool look) {
  if (stopped_) return {};
  const size_t before = held_.size();
  held_ += piece;
  size_t at = std::string::npos, length = 0;
  if (look)
    for (const std::string& stop : stops_) {
      const size_t from = before < stop.size() ? 0 : before - stop.size() + 1;  // what ended before has been passed by
      if (const size_t found = held_.find(stop, from); found < at) {
        at = found;
        length = stop.size();
      }
    }
  if (at != std::string::npos) {
    stopped_ = true;
    return held_.substr(0, keep_ ? at + length : at);
  }
  size_t open = 0;  // the longest end of the text that begins a stop string
  for (const std::string& stop : stops_)
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > open; --n)
      if (std::string_view(held_).substr(held_.size() - n) == std::string_view(stop).substr(0, n)) open = n;
  std::string certain = held_.substr(0, held_.size() - open);
  held_.erase(0, certain.size());
  return certain;
}

std::string StopMatcher::finish() { return stopped_ ? std::string() : std::exchange(held_, {}); }

Transcript::Transcript(const moebius_cpp::Tokenizer& tokenizer, const TextRules& rules, size_t choices)
    : tokenizer_(tokenizer), rules_(rules), unfinished_(choices) {
  for (size_t i = 0; i < choices; ++i) choices_.push_back({moebius_cpp::Decoder(tokenizer), StopMatcher(rules.stop, rules.include_stop)});
}

// Or no token at all: a model's vocabulary is often padded beyond its tokenizer's.
bool Transcript::is_special(int32_t token) const {
  try {
    return tokenizer_.decode({token}, true).empty();
  } catch (const moebius_cpp::Error&) {
    return true;
  }
}

// As in vLLM, no stop string ends in the first min_tokens tokens, but one may begin there.
std::string Transcript::push(Choice& c, std::string_view text) const { return c.matcher.push(text, c.tokens > rules_.min_tokens); }

void Transcript::end(Choice& c, Piece& piece, const char* reason) {
  piece.finish_reason = reason;
  c.ended = true;
  --unfinished_;
}

std::optional<Piece> Transcript::take(const Item& item) {
  Choice& c = choices_[static_cast<size_t>(item.choice)];
  if (c.ended) return std::nullopt;
  Piece piece;
  piece.choice = item.choice;
  if (item.finish_reason != MOEBIUS_FINISH_NONE) {
    static const char* const kReasons[] = {"", "stop", "length", "abort", "error"};
    piece.text = push(c, c.decoder.finish());
    if (c.matcher.stopped()) {
      end(c, piece, "stop");
      return piece;
    }
    piece.text += c.matcher.finish();
    end(c, piece, static_cast<size_t>(item.finish_reason) < std::size(kReasons) ? kReasons[item.finish_reason] : "error");
    return piece;
  }
  ++c.tokens;
  ++completion_tokens_;
  piece.token = TokenRecord{item.token, item.logprob, item.top, c.characters};
  if (!is_special(item.token) && (!item.is_stop || rules_.include_stop)) {
    const std::string_view text = c.decoder.push(item.token);
    c.characters += characters(text);
    piece.text = push(c, text);
  }
  if (c.matcher.stopped()) end(c, piece, "stop");
  return piece;
}

}  // namespace moebius_examples
