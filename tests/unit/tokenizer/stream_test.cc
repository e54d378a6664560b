#include <random>

#include "tests/unit/tokenizer/fixtures.h"

using namespace moebius;

namespace {

Ids bytes_as_ids(std::string_view bytes) {  // for byte_tokenizer
  Ids ids;
  for (const char byte : bytes) ids.push_back(static_cast<uint8_t>(byte));
  return ids;
}

// JSON refuses to print ill-formed UTF-8, so this does the checking.
bool is_well_formed(const std::string& text) {
  try {
    return !nlohmann::json(text).dump().empty();
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

std::string stream(const Tokenizer& tokenizer, const Ids& ids, bool skip_special_tokens = false) {
  StreamDecoder decoder(tokenizer, skip_special_tokens);
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = decoder.push(id);
    CHECK(is_well_formed(piece));
    text += piece;
  }
  return text + decoder.finish();
}

}  // namespace

TEST_CASE("a character is returned with the token that completes it, not before") {
  const Tokenizer tokenizer = make_tokenizer(byte_tokenizer());
  StreamDecoder decoder(tokenizer);
  CHECK(decoder.push('x') == "x");
  CHECK(decoder.push(0xF0) == "");
  CHECK(decoder.push(0x9F) == "");
  CHECK(decoder.push(0x91) == "");
  CHECK(decoder.push(0xA9) == "\xF0\x9F\x91\xA9");
  CHECK(decoder.finish() == "");
}

TEST_CASE("finish returns U+FFFD for a character left open and leaves the decoder as new") {
  const Tokenizer tokenizer = make_tokenizer(byte_tokenizer());
  StreamDecoder decoder(tokenizer);
  CHECK(decoder.push(0xE6) == "");
  CHECK(decoder.push(0x97) == "");
  CHECK(decoder.finish() == "\xEF\xBF\xBD");
  CHECK(decoder.finish() == "");
  CHECK(decoder.push('y') == "y");
}

TEST_CASE("each maximal ill-formed part decodes to one U+FFFD") {
  const Tokenizer tokenizer = make_tokenizer(byte_tokenizer());
  const std::string u = "\xEF\xBF\xBD";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\x80", u},                          // continuation alone
      {"\xC0\xAF", u + u},                  // overlong
      {"\xE0\x80\x80", u + u + u},          // overlong, refused at the second byte
      {"\xED\xA0\x80", u + u + u},          // surrogate
      {"\xF4\x90\x80\x80", u + u + u + u},  // above U+10FFFF
      {"\xF0\x9F\x91"
       "a",
       u + "a"},  // one part of three bytes
      {"\xE6\x97\xE6\x97\xA5", u + "\xE6\x97\xA5"},
      {"a\xFF"
       "b\xC3",
       "a" + u + "b" + u},
  };
  for (const auto& [bytes, text] : cases) {
    CHECK(tokenizer.decode(bytes_as_ids(bytes)) == text);
    CHECK(stream(tokenizer, bytes_as_ids(bytes)) == text);
  }
}

TEST_CASE("pushes and finish concatenated equal decode for every prefix of every reference") {
  for (const std::string& folder : reference_folders()) {
    const Tokenizer tokenizer = Tokenizer::load(folder + "/tokenizer.json");
    const nlohmann::json file = read_json(folder + "/reference.json");
    for (const nlohmann::json& item : file.is_object() ? file.at("tokenizer") : file) {
      const Ids ids = item.at("ids").get<Ids>();
      for (size_t length = 0; length <= ids.size(); ++length) {
        const Ids prefix(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(length));
        CHECK(stream(tokenizer, prefix) == tokenizer.decode(prefix));
        CHECK(stream(tokenizer, prefix, true) == tokenizer.decode(prefix, true));
      }
    }
  }
}

TEST_CASE("pushes and finish concatenated equal decode for random ids") {
  const uint32_t seed = Catch::rngSeed() != 0 ? Catch::rngSeed() : 20240607;
  CAPTURE(seed);
  std::mt19937 random(seed);
  const Tokenizer tokenizer = Tokenizer::load(reference_folders()[0] + "/tokenizer.json");
  for (int round = 0; round < 500; ++round) {
    Ids ids(random() % 12);
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % (tokenizer.vocab_size() + 10)) - 5;
    const std::string whole = tokenizer.decode(ids);
    CHECK(is_well_formed(whole));
    CHECK(stream(tokenizer, ids) == whole);
  }
}

TEST_CASE("special tokens are left out when asked, others are not") {
  nlohmann::json json = byte_tokenizer();
  json["added_tokens"] = nlohmann::json::array({added_token(256, "<s>", {"special"}), added_token(257, "<t>")});
  const Tokenizer tokenizer = make_tokenizer(json);
  const Ids ids = {256, 'a', 257, 256, 'b'};
  CHECK(tokenizer.decode(ids) == "<s>a<t><s>b");
  CHECK(tokenizer.decode(ids, true) == "a<t>b");
  CHECK(stream(tokenizer, ids, true) == "a<t>b");
}

TEST_CASE("ids without a token decode to nothing") {
  nlohmann::json json = byte_tokenizer();
  json["added_tokens"] = nlohmann::json::array({added_token(300, "<far>")});
  const Tokenizer tokenizer = make_tokenizer(json);
  CHECK(tokenizer.vocab_size() == 301);
  CHECK(tokenizer.decode(Ids{'a', -1, 299, 301, 2147483647, 'b', 300}) == "ab<far>");
}

TEST_CASE("a stream decoder outlives a move of its tokenizer") {
  Tokenizer tokenizer = make_tokenizer(byte_tokenizer());
  StreamDecoder decoder(tokenizer);
  const Tokenizer moved = std::move(tokenizer);
  CHECK(decoder.push('a') == "a");
}
