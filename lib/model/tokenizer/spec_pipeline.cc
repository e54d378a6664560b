#include <array>
#include <utility>

#include "lib/base/error.h"
#include "lib/model/tokenizer/spec.h"

namespace moebius::tokenizer {
namespace {

// How GPT-2 cuts text, and ByteLevel does when its use_regex is set.
constexpr const char* kGpt2Pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// A template may name the same list of ids again and again: its length is not bounded by the file's.
constexpr size_t kMaxTemplateIds = 1024;

[[noreturn]] void fail_unknown(const JsonNode& component) {
  fail(Code::kUnsupported, "{}: type \"{}\" is not supported", component.path(), component.type());
}

bool read_one_normalizer(const JsonNode& node) {
  if (node.type() == "NFC") return true;
  if (node.type() != "Sequence") fail_unknown(node);
  bool nfc = false;
  for (const JsonNode& element : node.at("normalizers").elements()) nfc |= read_one_normalizer(element);
  return nfc;
}

SplitBehavior read_behavior(const JsonNode& node) {
  constexpr std::array<std::pair<const char*, SplitBehavior>, 5> kNames = {{
      {"Isolated", SplitBehavior::kIsolated},
      {"Removed", SplitBehavior::kRemoved},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext},
      {"Contiguous", SplitBehavior::kContiguous},
  }};
  for (const auto& [name, behavior] : kNames) {
    if (node.as_string() == name) return behavior;
  }
  fail(Code::kUnsupported, "{} \"{}\" is not supported", node.path(), node.as_string());
}

SplitStage read_split(const JsonNode& node) {
  const JsonNode pattern = node.at("pattern");
  const auto literal = pattern.find("String");
  SplitStage stage{.pattern = literal ? literal->as_string() : pattern.at("Regex").as_string(),
                   .literal = literal.has_value(),
                   .invert = node.bool_or("invert", false),
                   .behavior = read_behavior(node.at("behavior"))};
  if (stage.pattern.empty()) fail(Code::kCorruptModel, "{} is empty", pattern.path());
  return stage;
}

SplitStage read_digits(const JsonNode& node) {
  const bool one_by_one = node.at("individual_digits").as_bool();
  return {.pattern = R"(\p{N})", .behavior = one_by_one ? SplitBehavior::kIsolated : SplitBehavior::kContiguous};
}

SplitStage read_byte_level(const JsonNode& node) {
  return {.add_prefix_space = node.at("add_prefix_space").as_bool(),
          .pattern = node.bool_or("use_regex", true) ? kGpt2Pattern : ""};
}

// Appends the stages of a component. ByteLevel also turns text into the byte-level alphabet, where later patterns would
// see other characters than the text's: it has to come last, and it has to come.
void read_stages(const JsonNode& node, std::vector<SplitStage>& stages, bool& is_byte_level) {
  if (node.type() == "Sequence") {
    for (const JsonNode& element : node.at("pretokenizers").elements()) read_stages(element, stages, is_byte_level);
    return;
  }
  if (is_byte_level) fail(Code::kUnsupported, "{}: {} after ByteLevel is not supported", node.path(), node.type());
  if (node.type() == "Split") {
    stages.push_back(read_split(node));
  } else if (node.type() == "Digits") {
    stages.push_back(read_digits(node));
  } else if (node.type() == "ByteLevel") {
    stages.push_back(read_byte_level(node));
    is_byte_level = true;
  } else {
    fail_unknown(node);
  }
}

void append_special_token(const JsonNode& name, const JsonNode& processor, TokenizerSpec& spec,
                          std::vector<int32_t>& ids) {
  for (const JsonNode& element : processor.at("special_tokens").at(name.as_string()).at("ids").elements()) {
    const int32_t id = element.as_id();
    if (id >= spec.num_ids)
      fail(Code::kCorruptModel, "{} is {}, the tokenizer has {} ids", element.path(), id, spec.num_ids);
    if (ids.size() == kMaxTemplateIds) fail(Code::kCorruptModel, "{}: more than {} ids", name.path(), kMaxTemplateIds);
    ids.push_back(id);
  }
}

// TemplateProcessing: special tokens, once the sequence, special tokens.
void read_template(const JsonNode& node, TokenizerSpec& spec) {
  const JsonNode single = node.at("single");
  bool seen_sequence = false;
  for (const JsonNode& piece : single.elements()) {
    if (const auto special = piece.find("SpecialToken")) {
      append_special_token(special->at("id"), node, spec, seen_sequence ? spec.suffix_ids : spec.prefix_ids);
      continue;
    }
    const JsonNode sequence = piece.at("Sequence").at("id");
    if (sequence.as_string() != "A" || std::exchange(seen_sequence, true)) {
      fail(Code::kUnsupported, "{}: sequence \"{}\"; one \"A\" is supported", piece.path(), sequence.as_string());
    }
  }
  if (!seen_sequence) fail(Code::kCorruptModel, "{} leaves out the sequence itself", single.path());
}

void read_processors(const JsonNode& node, bool& seen_template, TokenizerSpec& spec) {
  if (node.type() == "Sequence") {
    for (const JsonNode& element : node.at("processors").elements()) read_processors(element, seen_template, spec);
  } else if (node.type() == "TemplateProcessing") {
    if (std::exchange(seen_template, true)) fail(Code::kUnsupported, "{}: a second TemplateProcessing", node.path());
    read_template(node, spec);
  } else if (node.type() != "ByteLevel") {  // ByteLevel as a post-processor corrects offsets, not ids
    fail_unknown(node);
  }
}

}  // namespace

bool read_normalizer(const JsonNode& root) {
  const auto node = root.find("normalizer");
  return node && read_one_normalizer(*node);
}

std::vector<SplitStage> read_pre_tokenizer(const JsonNode& root) {
  std::vector<SplitStage> stages;
  bool is_byte_level = false;
  if (const auto node = root.find("pre_tokenizer")) read_stages(*node, stages, is_byte_level);
  if (!is_byte_level) fail(Code::kUnsupported, "pre_tokenizer without ByteLevel: only byte-level BPE is supported");
  return stages;
}

void read_post_processor(const JsonNode& root, TokenizerSpec& spec) {
  bool seen_template = false;
  if (const auto node = root.find("post_processor")) read_processors(*node, seen_template, spec);
}

void check_decoder(const JsonNode& root) {
  const auto node = root.find("decoder");
  if (!node) fail(Code::kUnsupported, "no decoder: only ByteLevel is supported");
  if (node->type() != "ByteLevel") fail_unknown(*node);
}

}  // namespace moebius::tokenizer
