// What a tokenizer.json says, read and checked but not yet compiled. Reading refuses by name what this tokenizer does
// not do (kUnsupported) and by place what cannot be right (kCorruptModel).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "lib/model/tokenizer/bpe.h"
#include "lib/model/tokenizer/json_node.h"

namespace moebius::tokenizer {

// A token recognized in the text itself, before any pattern or merge.
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;      // left out by decode(skip_special_tokens)
  bool normalized = false;   // looked for in the normalized text, otherwise in the raw one; content is normalized, too
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // … and after it
  bool single_word = false;  // not inside a word
};

// What becomes of a pattern's matches ("parts" are the matches and the stretches between them).
enum class SplitBehavior {
  kIsolated,            // every part is a piece
  kRemoved,             // matches are dropped
  kMergedWithPrevious,  // a match joins the part before it
  kMergedWithNext,      // … after it
  kContiguous,          // neighbouring parts of the same kind join
};

// One step of the pre-tokenizer; it cuts every piece that the steps before it made.
struct SplitStage {
  bool add_prefix_space = false;  // first put a space before each piece that has none
  std::string pattern;            // empty: no cut
  bool literal = false;           // the pattern is plain text, otherwise a regular expression in Oniguruma's dialect
  bool invert = false;            // matches are what the pattern does not match
  SplitBehavior behavior = SplitBehavior::kIsolated;
};

struct TokenizerSpec {
  bool nfc = false;
  std::vector<AddedToken> added_tokens;
  std::vector<SplitStage> stages;  // the bytes of the final pieces go to the model
  Vocabulary vocabulary;  // as written, in the byte-level alphabet; added tokens only where model.vocab has them, too
  std::vector<Merge> merges;
  bool ignore_merges = false;
  std::vector<int32_t> prefix_ids, suffix_ids;  // what the template puts around one sequence
  int32_t num_ids = 0;                          // one more than the largest id
};

TokenizerSpec read_tokenizer_spec(std::string_view json);

// Parts of the above, in spec_pipeline.cc: the components that are chosen by "type".
bool read_normalizer(const JsonNode& root);
std::vector<SplitStage> read_pre_tokenizer(const JsonNode& root);
void read_post_processor(const JsonNode& root, TokenizerSpec& spec);
void check_decoder(const JsonNode& root);

}  // namespace moebius::tokenizer
