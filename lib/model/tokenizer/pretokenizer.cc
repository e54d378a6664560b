#include "lib/model/tokenizer/pretokenizer.h"

#include <algorithm>
#include <utility>

#include "lib/model/tokenizer/unicode.h"

namespace moebius::tokenizer {
namespace {

using Part = PreTokenizer::Scratch::Part;

// All of `piece` as matches and the non-empty stretches between them. An empty match right after another one is
// skipped.
void find_parts(std::string_view piece, const Regex& regex, MatchScratch& match, std::vector<Part>& parts) {
  parts.clear();
  size_t done = 0;
  for (size_t from = 0; from <= piece.size();) {
    const std::optional<TextRange> found = regex.search(piece, from, match);
    if (!found) break;
    const bool empty = found->begin == found->end;
    if (empty && !parts.empty() && parts.back().range.end == found->end) {
      from = found->end < piece.size() ? found->end + code_point_at(piece, found->end).length : found->end + 1;
      continue;
    }
    if (done != found->begin) parts.push_back({{done, found->begin}, false});
    parts.push_back({*found, true});
    done = from = found->end;
  }
  if (done != piece.size()) parts.push_back({{done, piece.size()}, false});
}

// Whether a part joins its neighbour: the one before it, or after it for kMergedWithNext.
bool joins(SplitBehavior behavior, bool is_match, bool neighbour_is_match) {
  switch (behavior) {
    case SplitBehavior::kContiguous: return is_match == neighbour_is_match;
    case SplitBehavior::kMergedWithPrevious:
    case SplitBehavior::kMergedWithNext: return is_match && !neighbour_is_match;
    default: return false;
  }
}

// Joins parts in place; the kinds compared are those of the original parts.
void join_parts(SplitBehavior behavior, std::vector<Part>& parts) {
  const bool backward = behavior == SplitBehavior::kMergedWithNext;
  if (backward) std::reverse(parts.begin(), parts.end());
  size_t kept = 0;
  bool neighbour_is_match = false;
  for (const Part part : parts) {
    if (kept > 0 && joins(behavior, part.is_match, neighbour_is_match)) {
      TextRange& range = parts[kept - 1].range;
      range = backward ? TextRange{part.range.begin, range.end} : TextRange{range.begin, part.range.end};
    } else {
      parts[kept++] = part;
    }
    neighbour_is_match = part.is_match;
  }
  parts.resize(kept);
  if (backward) std::reverse(parts.begin(), parts.end());
}

}  // namespace

PreTokenizer::PreTokenizer(const std::vector<SplitStage>& stages) {
  for (const SplitStage& stage : stages) {
    std::optional<Regex> regex;
    if (!stage.pattern.empty()) regex.emplace(stage.pattern, stage.literal);
    stages_.push_back({stage.add_prefix_space, std::move(regex), stage.invert, stage.behavior});
  }
}

void PreTokenizer::split(std::string_view text, Scratch& scratch, std::vector<std::string_view>& pieces) const {
  pieces.clear();
  scratch.prefixed.clear();
  if (!text.empty()) pieces.push_back(text);
  for (const Stage& stage : stages_) {
    scratch.cut.clear();
    for (const std::string_view piece : pieces) run_stage(stage, scratch, piece);
    pieces.swap(scratch.cut);
  }
}

void PreTokenizer::run_stage(const Stage& stage, Scratch& scratch, std::string_view piece) {
  if (stage.add_prefix_space && !piece.starts_with(' ')) piece = scratch.prefixed.emplace_back(" ").append(piece);
  if (!stage.regex) {
    scratch.cut.push_back(piece);
    return;
  }
  find_parts(piece, *stage.regex, scratch.match, scratch.parts);
  if (stage.invert) {
    for (Part& part : scratch.parts) part.is_match = !part.is_match;
  }
  join_parts(stage.behavior, scratch.parts);
  for (const auto& [range, is_match] : scratch.parts) {
    const bool removed = is_match && stage.behavior == SplitBehavior::kRemoved;
    if (!removed && range.begin < range.end) scratch.cut.push_back(piece.substr(range.begin, range.end - range.begin));
  }
}

}  // namespace moebius::tokenizer
