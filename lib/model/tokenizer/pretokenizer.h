// Cuts normalized text into the pre-tokens within which the model merges: a chain of stages, each cutting every piece
// of the one before.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lib/model/tokenizer/regex.h"
#include "lib/model/tokenizer/spec.h"

namespace moebius::tokenizer {

class PreTokenizer {
 public:
  // One encode call's working memory.
  struct Scratch {
    struct Part {
      TextRange range;
      bool is_match;
    };
    MatchScratch match;
    std::vector<Part> parts;
    std::vector<std::string_view> cut;
    std::deque<std::string> prefixed;  // texts of pieces that got a space in front
  };

  // Raises Error(kUnsupported) if a pattern does not compile.
  explicit PreTokenizer(const std::vector<SplitStage>& stages);

  // Sets `pieces` to the pre-tokens of well-formed `text`, none empty; they point into `text` or `scratch.prefixed`.
  void split(std::string_view text, Scratch& scratch, std::vector<std::string_view>& pieces) const;

 private:
  struct Stage {
    bool add_prefix_space;
    std::optional<Regex> regex;
    bool invert;
    SplitBehavior behavior;
  };
  static void run_stage(const Stage& stage, Scratch& scratch, std::string_view piece);

  std::vector<Stage> stages_;
};

}  // namespace moebius::tokenizer
