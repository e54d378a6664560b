#include "lib/model/tokenizer/spec.h"

#include <algorithm>
#include <unordered_map>

#include "lib/base/error.h"
#include "lib/model/tokenizer/unicode.h"

namespace moebius::tokenizer {
namespace {

using nlohmann::json;

// Ids index tables, so a small file must not ask for large ones. Real vocabularies have a few thousand gaps at most.
constexpr size_t kMaxIdGaps = 65536;

// Looking for added tokens takes up to this many steps per byte of text; real ones are shorter than a hundred bytes.
constexpr size_t kMaxAddedTokenBytes = 4096;

void check_version(const JsonNode& root) {
  const auto version = root.find("version");
  if (version && version->as_string() != "1.0") {
    fail(Code::kUnsupported, "tokenizer version \"{}\", this reads \"1.0\"", version->as_string());
  }
  for (const char* key : {"truncation", "padding"}) {
    if (root.find(key)) fail(Code::kUnsupported, "{} is not supported: encode neither cuts nor pads", key);
  }
}

// Settings of the BPE model that we read only at the value that turns them off. (unk_token never comes up: text is bytes, and one without a
// token is refused when it is met.)
void check_model_settings(const JsonNode& model) {
  if (const auto type = model.find("type"); type && type->as_string() != "BPE") {
    fail(Code::kUnsupported, "model type \"{}\" is not supported, BPE is", type->as_string());
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const auto text = model.find(key);
    if (text && !text->as_string().empty())
      fail(Code::kUnsupported, "model.{} \"{}\" is not supported", key, text->as_string());
  }
  if (model.bool_or("byte_fallback", false)) fail(Code::kUnsupported, "model.byte_fallback is not supported");
  if (const auto dropout = model.find("dropout"); dropout && dropout->value() != 0.0) {
    fail(Code::kUnsupported, "model.dropout {} is not supported", dropout->value().dump());
  }
}

void read_vocabulary(const JsonNode& node, TokenizerSpec& spec) {
  std::unordered_map<int32_t, std::string_view> token_of;
  spec.vocabulary.reserve(node.object().size());
  token_of.reserve(node.object().size());
  for (const auto& [token, value] : node.object().items()) {
    const int32_t id = JsonNode(value, fmt::format("{}[\"{}\"]", node.path(), token)).as_id();
    const auto [other, is_new] = token_of.emplace(id, token);
    if (!is_new) fail(Code::kCorruptModel, "tokens \"{}\" and \"{}\" both have id {}", other->second, token, id);
    spec.vocabulary.emplace(token, id);
  }
}

int32_t id_in_merge(const TokenizerSpec& spec, size_t rank, std::string_view token) {
  const auto found = spec.vocabulary.find(token);
  if (found == spec.vocabulary.end())
    fail(Code::kCorruptModel, "model.merges[{}]: \"{}\" is not in the vocabulary", rank, token);
  return found->second;
}

// A merge is written ["a", "b"] or, in older files, "a b"; the latter may begin with a line "#version: …".
Merge read_merge(const json& value, size_t rank, const TokenizerSpec& spec) {
  std::string_view left, right;
  if (value.is_array() && value.size() == 2 && value[0].is_string() && value[1].is_string()) {
    left = value[0].get_ref<const std::string&>();
    right = value[1].get_ref<const std::string&>();
  } else {
    const std::string_view line = value.is_string() ? value.get_ref<const std::string&>() : std::string_view();
    const size_t space = line.find(' ');
    if (space == line.npos || line.find(' ', space + 1) != line.npos) {
      fail(Code::kCorruptModel, "model.merges[{}] is neither \"left right\" nor [\"left\", \"right\"]", rank);
    }
    left = line.substr(0, space);
    right = line.substr(space + 1);
  }
  const int32_t result = id_in_merge(spec, rank, std::string(left).append(right));
  return {id_in_merge(spec, rank, left), id_in_merge(spec, rank, right), result};
}

void read_merges(const JsonNode& node, TokenizerSpec& spec) {
  if (!node.value().is_array())
    fail(Code::kCorruptModel, "{} is a JSON {}, not an array", node.path(), node.value().type_name());
  spec.merges.reserve(node.value().size());
  for (size_t rank = 0; rank < node.value().size(); ++rank) {
    const json& merge = node.value()[rank];
    if (merge.is_string() && merge.get_ref<const std::string&>().starts_with("#version")) continue;
    spec.merges.push_back(read_merge(merge, rank, spec));
  }
}

AddedToken read_added_token(const JsonNode& node) {
  AddedToken token{
      .id = node.at("id").as_id(),
      .content = node.at("content").as_string(),
      .special = node.at("special").as_bool(),
      .normalized = node.at("normalized").as_bool(),
      .lstrip = node.at("lstrip").as_bool(),
      .rstrip = node.at("rstrip").as_bool(),
      .single_word = node.at("single_word").as_bool(),
  };
  const size_t size = token.content.size();
  if (size == 0 || size > kMaxAddedTokenBytes) {
    fail(Code::kCorruptModel, "{}.content has {} bytes, not 1 to {}", node.path(), size, kMaxAddedTokenBytes);
  }
  return token;
}

// An added token is a vocabulary entry under its own id, or a new entry under an id that nobody has.
void read_added_tokens(const JsonNode& node, TokenizerSpec& spec) {
  std::unordered_map<int32_t, std::string> token_of;
  Vocabulary added;
  for (const auto& [token, id] : spec.vocabulary) token_of.emplace(id, token);
  for (const JsonNode& element : node.elements()) {
    AddedToken token = read_added_token(element);
    if (!added.emplace(token.content, token.id).second) {
      fail(Code::kCorruptModel, "{}: \"{}\" is listed twice", element.path(), token.content);
    }
    const auto in_vocabulary = spec.vocabulary.find(token.content);
    if (in_vocabulary != spec.vocabulary.end() && in_vocabulary->second != token.id) {
      fail(Code::kCorruptModel, "{}: \"{}\" has id {}, in model.vocab it has {}", element.path(), token.content,
           token.id, in_vocabulary->second);
    }
    const auto [owner, is_new] = token_of.emplace(token.id, token.content);
    if (!is_new && owner->second != token.content) {
      fail(Code::kCorruptModel, "{}: id {} of \"{}\" belongs to \"{}\"", element.path(), token.id, token.content,
           owner->second);
    }
    spec.added_tokens.push_back(std::move(token));
  }
}

int32_t count_ids(const TokenizerSpec& spec) {
  int32_t largest = -1;
  for (const auto& [token, id] : spec.vocabulary) largest = std::max(largest, id);
  for (const AddedToken& token : spec.added_tokens) largest = std::max(largest, token.id);
  const size_t num_tokens = spec.vocabulary.size() + spec.added_tokens.size();
  if (static_cast<size_t>(largest + int64_t{1}) > num_tokens + kMaxIdGaps) {
    fail(Code::kCorruptModel, "id {} is out of range: the file has {} tokens, ids may leave out {}", largest,
         num_tokens, kMaxIdGaps);
  }
  return largest + 1;
}

}  // namespace

TokenizerSpec read_tokenizer_spec(std::string_view text) {
  const JsonTree tree = parse_json(text, "JSON");
  const JsonNode root(tree.root(), "");
  const JsonNode model = root.at("model");
  TokenizerSpec spec;
  check_version(root);
  check_model_settings(model);
  read_vocabulary(model.at("vocab"), spec);
  read_merges(model.at("merges"), spec);
  spec.ignore_merges = model.bool_or("ignore_merges", false);
  if (const auto added_tokens = root.find("added_tokens")) read_added_tokens(*added_tokens, spec);
  spec.num_ids = count_ids(spec);
  spec.nfc = read_normalizer(root);
  for (AddedToken& token : spec.added_tokens) {
    if (spec.nfc && token.normalized) token.content = to_nfc(token.content);
  }
  spec.stages = read_pre_tokenizer(root);
  read_post_processor(root, spec);
  check_decoder(root);
  return spec;
}

}  // namespace moebius::tokenizer
