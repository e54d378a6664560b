#include "lib/model/tokenizer/regex_dialect.h"
#include "lib/model/tokenizer/unicode.h"
#include "tests/unit/tokenizer/fixtures.h"

using namespace moebius;
using nlohmann::json;

namespace {

json split(const std::string& pattern, const std::string& behavior, bool invert = false,
           const std::string& kind = "Regex") {
  return {{"type", "Split"}, {"pattern", {{kind, pattern}}}, {"behavior", behavior}, {"invert", invert}};
}

json byte_level(bool add_prefix_space, bool use_regex) {
  return {
      {"type", "ByteLevel"}, {"add_prefix_space", add_prefix_space}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

// The pieces that pre-tokenizers make of a text, made visible: each becomes one token, written here with a | before it.
std::string pieces_of(const json& pre_tokenizers, const std::string& text) {
  json tokenizer = byte_tokenizer();
  tokenizer["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", pre_tokenizers}};
  tokenizer["pre_tokenizer"]["pretokenizers"].push_back(
      byte_level(true, false));  // one space before each piece that has none
  std::string pieces = make_tokenizer(tokenizer).decode(make_tokenizer(tokenizer).encode(text));
  std::replace(pieces.begin(), pieces.end(), ' ', '|');
  return pieces;
}

std::string normalized(const std::string& text) { return tokenizer::to_nfc(text); }

}  // namespace

// The expected pieces here were taken from Hugging Face's tokenizers 0.23.
TEST_CASE("Split treats matches as its behavior says") {
  const std::string text = "xaayab";
  const std::vector<std::tuple<std::string, std::string, std::string>> cases = {
      {"Isolated", "|x|a|a|y|a|b", "|x|a|a|y|a|b"},       {"Removed", "|x|y|b", "|a|a|a"},
      {"MergedWithPrevious", "|xa|a|ya|b", "|x|a|ay|ab"}, {"MergedWithNext", "|x|a|ay|ab", "|xa|a|ya|b"},
      {"Contiguous", "|x|aa|y|a|b", "|x|aa|y|a|b"},
  };
  for (const auto& [behavior, pieces, inverted] : cases) {
    CAPTURE(behavior);
    CHECK(pieces_of(json::array({split("a", behavior)}), text) == pieces);
    CHECK(pieces_of(json::array({split("a", behavior, true)}), text) == inverted);
    CHECK(pieces_of(json::array({split("a", behavior, false, "String")}), text) == pieces);
  }
}

TEST_CASE("a String pattern is plain text") {
  CHECK(pieces_of(json::array({split("a.+", "Isolated", false, "String")}), "aba.+b") == "|ab|a.+|b");
}

TEST_CASE("empty matches cut without taking anything") {
  CHECK(pieces_of(json::array({split("(?=b)", "Isolated")}), "abab") == "|a|ba|b");
  CHECK(pieces_of(json::array({split("x*", "Isolated")}), "a\xC3\xA9x") == "|a|\xC3\xA9|x");
}

TEST_CASE("Digits cuts numbers off, one by one or together") {
  const auto digits = [](bool one_by_one) { return json{{"type", "Digits"}, {"individual_digits", one_by_one}}; };
  CHECK(pieces_of(json::array({digits(true)}), "a12b") == "|a|1|2|b");
  CHECK(pieces_of(json::array({digits(false)}), "a12b") == "|a|12|b");
}

TEST_CASE("later stages cut the pieces of earlier ones") {
  CHECK(pieces_of(json::array({split("-", "Removed"), split("b", "MergedWithNext")}), "abc-bb") == "|a|bc|b|b");
}

TEST_CASE("ByteLevel with use_regex cuts like GPT-2, and a prefix space is added once") {
  json tokenizer = byte_tokenizer({"\xC4\xA0hi", "\xC4\xA0you", "'s"});
  tokenizer["model"]["ignore_merges"] = true;
  tokenizer["pre_tokenizer"] = byte_level(true, true);
  CHECK(make_tokenizer(tokenizer).encode("hi you's") == Ids{256, 257, 258});
  CHECK(make_tokenizer(tokenizer).encode(" hi you") == Ids{256, 257});
  CHECK(make_tokenizer(tokenizer).encode("") == Ids{});
}

TEST_CASE("U+180E is no white space") {
  CHECK(pieces_of(json::array({split(R"(\s)", "Removed")}), "a\xE1\xA0\x8E\xC2\xA0") == "|a\xE1\xA0\x8E");
  CHECK(pieces_of(json::array({split(R"([^\s])", "Removed")}), "a\xE1\xA0\x8E\t") == "|\t");
  CHECK(pieces_of(json::array({split(R"(\S)", "Removed")}), "a\xE1\xA0\x8E\t") == "|\t");
}

TEST_CASE("what the two regular-expression dialects read differently is refused with its place") {
  const std::vector<std::string> refused = {
      R"(\w+)",  R"(\bx)",  R"(\h)",     R"(\v)",         R"(a\1)",  R"(\012)",        "[a[b]]", "[a&&b]",
      "a{,3}",   "a{1,2}+", "(*ACCEPT)", "(?<n>a)",       "(?m:a)",  "a(?i)b",         "[]a]",   "[^]a]",
      R"(\xFF)", R"(\pL)",  R"(\p{L&})", "(?i:\xC3\x9F)", "(?i:ss)", R"((?i:\x{DF}))", R"(\K)",  R"(\X)",
      "(?#a)",   "(?<",     "\\",        R"(\p{L)",       R"(\x{}a)"};
  for (const std::string& pattern : refused) {
    CAPTURE(pattern);
    const Failure failure = failure_of([&] { tokenizer::to_pcre2_dialect("a" + pattern); });
    CHECK(failure.code == Code::kUnsupported);
    CHECK(failure.message.find("at byte ") != std::string::npos);
  }
}

TEST_CASE("what they read alike is passed on") {
  for (const std::string pattern :
       {"(?i)abc", R"((?i:'s|'t)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[\p{P}]*?)", R"(^a$|\.\[x\]{2,})", "{a}"}) {
    CHECK(tokenizer::to_pcre2_dialect(pattern) == pattern);
  }
  CHECK(tokenizer::to_pcre2_dialect(R"(\u4e00\x41\p{Han}\P{^Greek})") == R"(\x{4e00}\x{41}\p{sc:Han}\P{^sc:Greek})");
}

TEST_CASE("a match that exceeds PCRE2's memory is an error, not an end of the text") {
  json tokenizer = byte_tokenizer();
  tokenizer["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers", json::array({split("(?:a|b(?=a)|ab)*c", "Isolated"), byte_level(false, false)})}};
  const Tokenizer nested = make_tokenizer(tokenizer);
  CHECK(nested.encode(std::string(20000, 'a') + "c").size() == 20001);  // more than PCRE2's own stack, less than ours
  const Failure failure = failure_of([&] { nested.encode(std::string(4 << 20, 'a')); });
  CHECK(failure.code == Code::kInvalidArgument);
  CHECK(failure.message.find("byte 0 of 4194304") != std::string::npos);
}

TEST_CASE("NFC composes, orders marks and leaves what is composed alone") {
  CHECK(normalized("abc\xC3\xA9") == "abc\xC3\xA9");
  CHECK(normalized("e\xCC\x81") == "\xC3\xA9");
  CHECK(normalized("\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8") == "\xEA\xB0\x81");  // Hangul syllable
  CHECK(normalized("q\xCC\x87\xCC\xA3") == "q\xCC\xA3\xCC\x87");                // dot below before dot above
  CHECK(normalized("\xE2\x84\xAB") == "\xC3\x85");                              // Ångström sign
  CHECK(normalized("\xF0\x9D\x85\x97\xF0\x9D\x85\xA5") == "\xF0\x9D\x85\x97\xF0\x9D\x85\xA5");  // composition exclusion
}

TEST_CASE("NFC of a long run of marks in alternating order is in order") {
  std::string marks = "q", ordered = "q";
  for (int i = 0; i < 100000; ++i) marks += "\xCC\x87\xCC\xA3";
  for (int i = 0; i < 100000; ++i) ordered += "\xCC\xA3";
  for (int i = 0; i < 100000; ++i) ordered += "\xCC\x87";
  CHECK((normalized(marks) == ordered));
}

TEST_CASE("added tokens are found leftmost and longest") {
  json tokenizer = byte_tokenizer();
  tokenizer["added_tokens"] =
      json::array({added_token(256, "<a>"), added_token(257, "<a>b"), added_token(258, "a>bc")});
  const Tokenizer t = make_tokenizer(tokenizer);
  CHECK(t.encode("x<a>bcd") == Ids{'x', 257, 'c', 'd'});
  CHECK(t.encode("<a><a") == Ids{256, '<', 'a'});
  CHECK(t.encode("a>bc") == Ids{258});
}

TEST_CASE("added tokens take white space along and keep out of words as flagged") {
  json tokenizer = byte_tokenizer();
  tokenizer["added_tokens"] = json::array({added_token(256, "<l>", {"lstrip"}), added_token(257, "<r>", {"rstrip"}),
                                           added_token(258, "<w>", {"single_word"})});
  const Tokenizer t = make_tokenizer(tokenizer);
  CHECK(t.encode("a \n<l> b") == Ids{'a', 256, ' ', 'b'});
  CHECK(t.encode("a <r>\xC2\xA0 b") == Ids{'a', ' ', 257, 'b'});
  CHECK(t.encode("<r> <l>") == Ids{257, 256});
  CHECK(t.encode("-<w>.") == Ids{'-', 258, '.'});
  CHECK(t.encode("a<w>") == Ids{'a', '<', 'w', '>'});
  CHECK(t.encode("<w>\xC3\xA9") == Ids{'<', 'w', '>', 0xC3, 0xA9});
}

TEST_CASE("a token whose white space another one took along is not found again") {
  json tokenizer = byte_tokenizer();
  tokenizer["added_tokens"] = json::array({added_token(256, "<r>", {"rstrip"}), added_token(257, "  ", {"lstrip"})});
  CHECK(make_tokenizer(tokenizer).encode("<r>  x") == Ids{256, 'x'});
  CHECK(make_tokenizer(tokenizer).encode("x   ") == Ids{'x', 257, ' '});
}

TEST_CASE("added tokens are looked for before or after normalization as flagged") {
  json tokenizer = byte_tokenizer();
  tokenizer["normalizer"] = {{"type", "Sequence"}, {"normalizers", json::array({{{"type", "NFC"}}})}};
  tokenizer["added_tokens"] =
      json::array({added_token(256, "n\xC3\xA9", {"normalized"}), added_token(257, "r\xC3\xA9")});
  const Tokenizer t = make_tokenizer(tokenizer);
  CHECK(t.encode("ne\xCC\x81") == Ids{256});
  CHECK(t.encode("r\xC3\xA9") == Ids{257});
  CHECK(t.encode("re\xCC\x81") == Ids{'r', 0xC3, 0xA9});
}

TEST_CASE("the template's ids surround the sequence unless special tokens are declined") {
  json tokenizer = byte_tokenizer();
  const auto special = [](const char* name) { return json{{"SpecialToken", {{"id", name}, {"type_id", 0}}}}; };
  const json sequence = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const json processor = {
      {"type", "TemplateProcessing"},
      {"single", json::array({special("B"), sequence, special("E"), special("B")})},
      {"pair", json::array()},
      {"special_tokens",
       {{"B", {{"id", "B"}, {"ids", json::array({1, 2})}}}, {"E", {{"id", "E"}, {"ids", json::array({3})}}}}}};
  tokenizer["post_processor"] = {{"type", "Sequence"},
                                 {"processors", json::array({{{"type", "ByteLevel"}}, processor})}};
  const Tokenizer t = make_tokenizer(tokenizer);
  CHECK(t.encode("x") == Ids{1, 2, 'x', 3, 1, 2});
  CHECK(t.encode("x", false) == Ids{'x'});
  CHECK(t.encode("") == Ids{1, 2, 3, 1, 2});
}
