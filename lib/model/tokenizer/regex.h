// A compiled pattern (PCRE2, just-in-time compiled where the system allows it) and one thread's working memory for it.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string_view>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace moebius::tokenizer {

struct TextRange {
  size_t begin = 0, end = 0;  // bytes
};

struct Pcre2Free {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
  void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
};
template <typename T>
using Pcre2Ptr = std::unique_ptr<T, Pcre2Free>;

// Serves any number of patterns, one search at a time.
class MatchScratch {
 public:
  MatchScratch();

 private:
  friend class Regex;
  void enlarge_stack();

  Pcre2Ptr<pcre2_match_data> data_;
  Pcre2Ptr<pcre2_match_context> context_;
  Pcre2Ptr<pcre2_jit_stack> stack_;  // null while PCRE2's own 32 KiB do
};

// Immutable; shared by threads.
class Regex {
 public:
  // `literal`: plain text to be found as it is. Otherwise a pattern in Oniguruma's dialect (regex_dialect.h).
  // Raises Error(kUnsupported) with PCRE2's complaint if it does not compile.
  Regex(std::string_view pattern, bool literal);

  // The first match that begins at or after `from` <= text.size(); `text` is well-formed UTF-8 and looked at as a
  // whole. Raises Error(kInvalidArgument) if the match exceeds a limit of memory or steps.
  std::optional<TextRange> search(std::string_view text, size_t from, MatchScratch& scratch) const;

 private:
  Pcre2Ptr<pcre2_code> code_;
};

}  // namespace moebius::tokenizer
