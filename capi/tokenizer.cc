#include "lib/model/tokenizer/tokenizer.h"

#include "capi/guarded.h"
#include "capi/source.h"

struct moebius_tokenizer {
  moebius::Tokenizer tokenizer;
};

struct moebius_decoder {
  const moebius::Tokenizer& tokenizer;
  moebius::StreamDecoder decoder;
  std::string text;  // lent to the caller until the next call
};

namespace {

using moebius::Code;
using moebius::fail;
using moebius::capi::guarded;
using moebius::capi::not_null;

void lend(moebius_decoder& d, std::string text, const char** out_text, size_t* out_bytes) {
  d.text = std::move(text);
  if (out_text != nullptr) *out_text = d.text.c_str();
  if (out_bytes != nullptr) *out_bytes = d.text.size();
}

// The engine's ids may go further than the tokenizer's: a model's vocabulary is often padded.
void require_known(const moebius::Tokenizer& t, int32_t id) {
  if (id < 0 || id >= t.vocab_size()) fail(Code::kInvalidArgument, "id {} is outside the tokenizer's vocabulary of {}", id, t.vocab_size());
}

}  // namespace

extern "C" {

moebius_status moebius_tokenizer_load(const char* model_dir, moebius_tokenizer** out_tokenizer, moebius_error** err) {
  return guarded(err, [&] {
    not_null(model_dir, "model_dir");
    not_null(out_tokenizer, "out_tokenizer");
    *out_tokenizer = new moebius_tokenizer{moebius::Tokenizer::load(std::filesystem::path(model_dir) / "tokenizer.json")};
  });
}

moebius_status moebius_tokenizer_load_from(const moebius_source* source, moebius_tokenizer** out_tokenizer, moebius_error** err) {
  return guarded(err, [&] {
    const moebius::ModelFiles& files = not_null(source, "source").files;
    not_null(out_tokenizer, "out_tokenizer");
    constexpr uint64_t kMaxBytes = uint64_t{256} << 20;
    const char* const file = "tokenizer.json";
    *out_tokenizer = new moebius_tokenizer{moebius::Tokenizer::from_json(read_text(files, file, kMaxBytes), files.name_of(file))};
  });
}

void moebius_tokenizer_destroy(moebius_tokenizer* tokenizer) { delete tokenizer; }

moebius_status moebius_tokenizer_encode(const moebius_tokenizer* tokenizer, const char* text, size_t num_bytes, int32_t add_special_tokens,
                                        int32_t* out_ids, size_t capacity, size_t* out_count, moebius_error** err) {
  return guarded(err, [&] {
    const moebius_tokenizer& t = not_null(tokenizer, "tokenizer");
    if (num_bytes > 0) not_null(text, "text");
    const std::vector<int32_t> ids = t.tokenizer.encode({text, num_bytes}, add_special_tokens != 0);
    if (out_count != nullptr) *out_count = ids.size();
    if (capacity == 0) return;
    not_null(out_ids, "out_ids");
    if (capacity < ids.size()) fail(Code::kInvalidArgument, "capacity is {} ids, the text has {}", capacity, ids.size());
    std::copy(ids.begin(), ids.end(), out_ids);
  });
}

moebius_status moebius_tokenizer_decode(const moebius_tokenizer* tokenizer, const int32_t* ids, size_t num_ids, int32_t skip_special_tokens,
                                        char* out_text, size_t capacity, size_t* out_bytes, moebius_error** err) {
  return guarded(err, [&] {
    const moebius_tokenizer& t = not_null(tokenizer, "tokenizer");
    if (num_ids > 0) not_null(ids, "ids");
    for (size_t i = 0; i < num_ids; ++i) require_known(t.tokenizer, ids[i]);
    const std::string text = t.tokenizer.decode({ids, num_ids}, skip_special_tokens != 0);
    if (out_bytes != nullptr) *out_bytes = text.size();
    if (capacity == 0) return;
    not_null(out_text, "out_text");
    if (capacity < text.size()) fail(Code::kInvalidArgument, "capacity is {} bytes, the text has {}", capacity, text.size());
    std::memcpy(out_text, text.data(), text.size());
  });
}

moebius_status moebius_decoder_create(const moebius_tokenizer* tokenizer, moebius_decoder** out_decoder, moebius_error** err) {
  return guarded(err, [&] {
    not_null(out_decoder, "out_decoder");
    const moebius_tokenizer& t = not_null(tokenizer, "tokenizer");
    *out_decoder = new moebius_decoder{t.tokenizer, moebius::StreamDecoder(t.tokenizer), {}};
  });
}

void moebius_decoder_destroy(moebius_decoder* decoder) { delete decoder; }

moebius_status moebius_decoder_push(moebius_decoder* decoder, int32_t id, const char** out_text, size_t* out_bytes, moebius_error** err) {
  return guarded(err, [&] {
    moebius_decoder& d = not_null(decoder, "decoder");
    require_known(d.tokenizer, id);
    lend(d, d.decoder.push(id), out_text, out_bytes);
  });
}

moebius_status moebius_decoder_finish(moebius_decoder* decoder, const char** out_text, size_t* out_bytes, moebius_error** err) {
  return guarded(err, [&] {
    moebius_decoder& d = not_null(decoder, "decoder");
    lend(d, d.decoder.finish(), out_text, out_bytes);
  });
}

}  // extern "C"
