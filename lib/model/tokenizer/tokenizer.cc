#include "lib/model/tokenizer/tokenizer.h"

#include <algorithm>
#include <fstream>
#include <utility>

#include "lib/base/error.h"
#include "lib/model/tokenizer/added_tokens.h"
#include "lib/model/tokenizer/bpe.h"
#include "lib/model/tokenizer/byte_alphabet.h"
#include "lib/model/tokenizer/pretokenizer.h"
#include "lib/model/tokenizer/spec.h"
#include "lib/model/tokenizer/unicode.h"

namespace moebius {

using namespace tokenizer;

namespace {

constexpr uintmax_t kMaxFileBytes = uintmax_t{256} << 20;  // ten times the largest vocabularies in use
constexpr size_t kMaxTextBytes = size_t{256} << 20;  // U+FFFD and NFC each at most triple it: positions stay below 2³¹

// Added tokens of one kind. Special ones first: where two normalize to the same text, they win.
std::vector<AddedToken> select_added_tokens(const TokenizerSpec& spec, bool normalized) {
  std::vector<AddedToken> tokens;
  for (const bool special : {true, false}) {
    for (const AddedToken& token : spec.added_tokens) {
      if (token.special == special && token.normalized == normalized) tokens.push_back(token);
    }
  }
  return tokens;
}

std::string read_file(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) fail(Code::kNotFound, "{}: no such file", path.string());
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error) fail(Code::kIo, "{}: {}", path.string(), error.message());
  if (size > kMaxFileBytes)
    fail(Code::kCorruptModel, "{}: {} bytes, at most {} are read", path.string(), size, kMaxFileBytes);
  std::string contents(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(contents.data(), static_cast<std::streamsize>(size)))
    fail(Code::kIo, "{}: cannot read {} bytes", path.string(), size);
  return contents;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(const TokenizerSpec& spec)
      : nfc(spec.nfc),
        raw_tokens(select_added_tokens(spec, false)),
        normalized_tokens(select_added_tokens(spec, true)),
        pre_tokenizer(spec.stages),
        bpe(spec.vocabulary, spec.merges, spec.ignore_merges),
        prefix_ids(spec.prefix_ids),
        suffix_ids(spec.suffix_ids),
        bytes_of_id(spec.num_ids),
        is_special(spec.num_ids) {
    for (const auto& [token, id] : spec.vocabulary) set_token(id, token);
    for (const AddedToken& token : spec.added_tokens) {
      set_token(token.id, token.content);
      is_special[token.id] = token.special;
    }
  }

  // Hugging Face's decoder reads a token in the byte-level alphabet if it can, and as plain text otherwise; added
  // tokens, too.
  void set_token(int32_t id, const std::string& token) { bytes_of_id[id] = bytes_of_symbols(token).value_or(token); }

  std::string_view bytes_of(int32_t id, bool skip_special_tokens) const {
    if (id < 0 || id >= static_cast<int32_t>(bytes_of_id.size()) || (skip_special_tokens && is_special[id])) return {};
    return bytes_of_id[id];
  }

  // One encode call's working memory and result.
  struct Encoding {
    std::vector<int32_t> ids;
    std::vector<std::string_view> pre_tokens;
    PreTokenizer::Scratch cut;
    Bpe::Scratch merge;
  };

  void encode_raw(std::string_view text, Encoding& out) const {
    encode_around(raw_tokens, text, out, [&](std::string_view piece) {
      if (nfc) {
        encode_normalized(to_nfc(piece), out);
      } else {
        encode_normalized(piece, out);
      }
    });
  }

  void encode_normalized(std::string_view text, Encoding& out) const {
    encode_around(normalized_tokens, text, out, [&](std::string_view piece) {
      pre_tokenizer.split(piece, out.cut, out.pre_tokens);
      for (const std::string_view pre_token : out.pre_tokens) bpe.encode(pre_token, out.merge, out.ids);
    });
  }

  // Appends the ids of the matcher's tokens and calls `encode_text` with the stretches between them.
  template <typename EncodeText>
  static void encode_around(const AddedTokenMatcher& matcher, std::string_view text, Encoding& out,
                            EncodeText encode_text) {
    for (const auto& [range, id] : matcher.split(text)) {
      if (id == AddedTokenMatcher::kText) {
        encode_text(text.substr(range.begin, range.end - range.begin));
      } else {
        out.ids.push_back(id);
      }
    }
  }

  bool nfc;
  AddedTokenMatcher raw_tokens, normalized_tokens;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  std::vector<int32_t> prefix_ids, suffix_ids;
  std::vector<std::string> bytes_of_id;  // [vocab_size]; empty for gaps
  std::vector<bool> is_special;          // [vocab_size]
};

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::load(const std::filesystem::path& tokenizer_json) {
  return from_json(read_file(tokenizer_json), tokenizer_json.string());
}

Tokenizer Tokenizer::from_json(std::string_view json, const std::string& name) {
  try {
    return Tokenizer(std::make_unique<const Impl>(read_tokenizer_spec(json)));
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("{}: {}", name, error.what()), error.where());
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  if (text.size() > kMaxTextBytes)
    fail(Code::kInvalidArgument, "text of {} bytes, at most {} are encoded", text.size(), kMaxTextBytes);
  Impl::Encoding encoding;
  if (add_special_tokens) encoding.ids = impl_->prefix_ids;
  impl_->encode_raw(to_well_formed(text), encoding);
  if (add_special_tokens) encoding.ids.insert(encoding.ids.end(), impl_->suffix_ids.begin(), impl_->suffix_ids.end());
  return std::move(encoding.ids);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const int32_t id : ids) bytes.append(impl_->bytes_of(id, skip_special_tokens));
  return to_well_formed(bytes);
}

int Tokenizer::vocab_size() const { return static_cast<int>(impl_->bytes_of_id.size()); }

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens)
    : tokenizer_(tokenizer.impl_.get()), skip_special_tokens_(skip_special_tokens) {}

std::string StreamDecoder::push(int32_t id) {
  held_.append(tokenizer_->bytes_of(id, skip_special_tokens_));
  std::string text;
  const size_t open = append_well_formed(held_, text);
  held_.erase(0, held_.size() - open);
  return text;
}

std::string StreamDecoder::finish() { return to_well_formed(std::exchange(held_, {})); }

}  // namespace moebius
