// Text to token ids and back: a byte-level BPE tokenizer read from a Hugging Face tokenizer.json, equal to the
// `tokenizers` library id for id. Optional: the engine itself takes and returns ids.
//
// encode: ill-formed UTF-8 → U+FFFD · cut at added tokens · normalize (NFC or nothing) · cut by the pre-tokenizer's
// patterns · merge bytes by rank · wrap with the template's ids. decode: the bytes of each token, read as UTF-8.
//
// Known differences, none of which an ordinary file or text meets: classes and compositions of characters that are
// newer than the Unicode version of the installed PCRE2, utf8proc or the other side; special tokens whose contents the
// normalizer changes are left out by skip_special_tokens here, not there; a byte without a token is an error here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moebius {

// Immutable after loading; all const functions may be called from any number of threads at once.
class Tokenizer {
 public:
  // Raises Error: kNotFound or kIo for the file, kCorruptModel for malformed or inconsistent contents, kUnsupported for
  // a component or setting that we do not have (named in the message, never ignored).
  static Tokenizer load(const std::filesystem::path& tokenizer_json);
  // The same from memory; `name` stands for the file in messages.
  static Tokenizer from_json(std::string_view json, const std::string& name);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Each maximal ill-formed part of `text` is read as U+FFFD. `add_special_tokens` adds what the post-processor's
  // template puts around one sequence; special tokens written in the text are recognized either way.
  // Raises Error: kInvalidArgument for a text of over 256 MiB or one that exceeds a pattern's match limits,
  // kUnsupported for a byte that the vocabulary has no token for (Hugging Face drops it silently).
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = true) const;

  // Well-formed UTF-8: each maximal ill-formed part of the tokens' bytes becomes U+FFFD. Ids without a token
  // (negative, beyond the vocabulary, in one of its gaps) decode to nothing.
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens = false) const;

  // One more than the largest id; not less than the number of tokens.
  int vocab_size() const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

// decode() one id at a time: all pushes and finish() concatenated equal decode() of the whole, and each return value is
// well-formed UTF-8 by itself. One thread per decoder; the tokenizer (it may be moved) outlives it.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens = false);

  // The characters that this token completes; empty while one is still open.
  std::string push(int32_t id);
  // U+FFFD if a character was left open, else empty. The decoder is as new afterwards.
  std::string finish();

 private:
  const Tokenizer::Impl* tokenizer_;
  bool skip_special_tokens_;
  std::string held_;  // start of an unfinished character, 0…3 bytes
};

}  // namespace moebius
