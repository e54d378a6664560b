#include <cstdio>
#include <filesystem>
#include <functional>
#include <random>

#include "tests/unit/tokenizer/fixtures.h"

using namespace moebius;
using nlohmann::json;

namespace {

struct Case {
  const char* fact;  // expected in the message
  std::function<void(json&)> change;
};

void check_refused(const std::vector<Case>& cases, Code code) {
  for (const Case& item : cases) {
    json tokenizer = byte_tokenizer({"ab"});
    tokenizer["model"]["merges"] = json::array({"a b"});
    item.change(tokenizer);
    const Failure failure = failure_of([&] { make_tokenizer(tokenizer); });
    CAPTURE(item.fact, failure.message);
    CHECK(failure.code == code);
    CHECK(failure.message.starts_with("test.json: "));
    CHECK(failure.message.find(item.fact) != std::string::npos);
  }
}

json template_of(const json& single, const json& special_tokens) {
  return {
      {"type", "TemplateProcessing"}, {"single", single}, {"pair", json::array()}, {"special_tokens", special_tokens}};
}

const json kSequence = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
const json kSpecial = {{"SpecialToken", {{"id", "B"}, {"type_id", 0}}}};

}  // namespace

TEST_CASE("wrong types and missing members are corrupt, with their place") {
  check_refused(
      {
          {"\"model\" is missing", [](json& t) { t.erase("model"); }},
          {"model is a JSON array", [](json& t) { t["model"] = json::array(); }},
          {"model: \"vocab\" is missing", [](json& t) { t["model"].erase("vocab"); }},
          {"model.vocab is a JSON array", [](json& t) { t["model"]["vocab"] = json::array(); }},
          {"model.vocab[\"ab\"] is a JSON string", [](json& t) { t["model"]["vocab"]["ab"] = "256"; }},
          {"model.vocab[\"ab\"] is a JSON number", [](json& t) { t["model"]["vocab"]["ab"] = 256.5; }},
          {"model: \"merges\" is missing", [](json& t) { t["model"].erase("merges"); }},
          {"model.merges is a JSON object", [](json& t) { t["model"]["merges"] = json::object(); }},
          {"model.merges[1] is neither", [](json& t) { t["model"]["merges"].push_back(7); }},
          {"model.merges[1] is neither", [](json& t) { t["model"]["merges"].push_back("a b c"); }},
          {"model.merges[1] is neither",
           [](json& t) {
             t["model"]["merges"].push_back(json::array({"a", "b", "c"}));
           }},
          {"model.ignore_merges is a JSON number", [](json& t) { t["model"]["ignore_merges"] = 1; }},
          {"model.byte_fallback is a JSON string", [](json& t) { t["model"]["byte_fallback"] = "no"; }},
          {"added_tokens is a JSON object", [](json& t) { t["added_tokens"] = json::object(); }},
          {"added_tokens[0] is a JSON number", [](json& t) { t["added_tokens"] = json::array({1}); }},
          {"added_tokens[0]: \"special\" is missing",
           [](json& t) {
             t["added_tokens"] = json::array({{{"id", 257}, {"content", "x"}}});
           }},
          {"added_tokens[0].content has 0 bytes",
           [](json& t) { t["added_tokens"] = json::array({added_token(257, "")}); }},
          {"normalizer is a JSON string", [](json& t) { t["normalizer"] = "NFC"; }},
          {"normalizer: \"type\" is missing", [](json& t) { t["normalizer"] = json::object(); }},
          {"pre_tokenizer: \"pretokenizers\" is missing",
           [](json& t) {
             t["pre_tokenizer"] = {{"type", "Sequence"}};
           }},
          {"pre_tokenizer: \"add_prefix_space\" is missing",
           [](json& t) { t["pre_tokenizer"].erase("add_prefix_space"); }},
          {"pre_tokenizer.pattern: \"Regex\" is missing",
           [](json& t) {
             t["pre_tokenizer"] = {{"type", "Split"}, {"pattern", json::object()}, {"behavior", "Isolated"}};
           }},
          {"post_processor.special_tokens: \"B\" is missing",
           [](json& t) {
             t["post_processor"] = template_of(json::array({kSpecial, kSequence}), json::object());
           }},
          {"leaves out the sequence",
           [](json& t) { t["post_processor"] = template_of(json::array(), json::object()); }},
          {"ids[0] is 257, the tokenizer has 257 ids",
           [](json& t) {
             t["post_processor"] =
                 template_of(json::array({kSpecial, kSequence}), {{"B", {{"ids", json::array({257})}}}});
           }},
          {"added_tokens[0].content has 5000 bytes",
           [](json& t) { t["added_tokens"] = json::array({added_token(257, std::string(5000, 'x'))}); }},
          {"more than 1024 ids",
           [](json& t) {
             json single = json::array({kSequence});
             for (int i = 0; i < 600; ++i) single.push_back(kSpecial);
             t["post_processor"] = template_of(single, {{"B", {{"ids", json::array({1, 2})}}}});
           }},
          {"the file is a JSON array", [](json& t) { t = json::array(); }},
      },
      Code::kCorruptModel);
}

TEST_CASE("ids that are negative, huge, shared or contradictory are corrupt") {
  check_refused(
      {
          {"model.vocab[\"ab\"] is -1, which is no token id", [](json& t) { t["model"]["vocab"]["ab"] = -1; }},
          {"model.vocab[\"ab\"] is 2147483648, which is no token id",
           [](json& t) { t["model"]["vocab"]["ab"] = 2147483648u; }},
          {"model.vocab[\"ab\"] is 18446744073709551615, which is no token id",
           [](json& t) { t["model"]["vocab"]["ab"] = ~uint64_t{0}; }},
          {"id 2147483647 is out of range", [](json& t) { t["model"]["vocab"]["ab"] = 2147483647; }},
          {"both have id 97", [](json& t) { t["model"]["vocab"]["ab"] = 97; }},
          {"added_tokens[0].id is -5", [](json& t) { t["added_tokens"] = json::array({added_token(-5, "<x>")}); }},
          {"id 97 of \"<x>\" belongs to \"a\"",
           [](json& t) { t["added_tokens"] = json::array({added_token(97, "<x>")}); }},
          {"added_tokens[1]: id 257 of \"<y>\" belongs to \"<x>\"",
           [](json& t) {
             t["added_tokens"] = json::array({added_token(257, "<x>"), added_token(257, "<y>")});
           }},
          {"\"<x>\" is listed twice",
           [](json& t) {
             t["added_tokens"] = json::array({added_token(257, "<x>"), added_token(258, "<x>")});
           }},
          {"\"ab\" has id 257, in model.vocab it has 256",
           [](json& t) { t["added_tokens"] = json::array({added_token(257, "ab")}); }},
          {"id 70000 is out of range", [](json& t) { t["added_tokens"] = json::array({added_token(70000, "<x>")}); }},
      },
      Code::kCorruptModel);
}

TEST_CASE("a merge of or into tokens that are not in the vocabulary is corrupt") {
  check_refused(
      {
          {"model.merges[1]: \"aa\" is not in the vocabulary",
           [](json& t) {
             t["model"]["merges"].push_back(json::array({"a", "a"}));
           }},
          {"model.merges[1]: \"bab\" is not in the vocabulary",
           [](json& t) { t["model"]["merges"].push_back("b ab"); }},
          {"\"b\" is not in the vocabulary", [](json& t) { t["model"]["vocab"].erase("b"); }},
      },
      Code::kCorruptModel);
}

TEST_CASE("what this tokenizer does not do is refused by name") {
  check_refused(
      {
          {"version \"2.0\"", [](json& t) { t["version"] = "2.0"; }},
          {"truncation",
           [](json& t) {
             t["truncation"] = {{"max_length", 5}};
           }},
          {"padding",
           [](json& t) {
             t["padding"] = {{"strategy", "BatchLongest"}};
           }},
          {"model type \"Unigram\"", [](json& t) { t["model"]["type"] = "Unigram"; }},
          {"byte_fallback", [](json& t) { t["model"]["byte_fallback"] = true; }},
          {"dropout 0.5", [](json& t) { t["model"]["dropout"] = 0.5; }},
          {"continuing_subword_prefix \"##\"", [](json& t) { t["model"]["continuing_subword_prefix"] = "##"; }},
          {"end_of_word_suffix \"</w>\"", [](json& t) { t["model"]["end_of_word_suffix"] = "</w>"; }},
          {"normalizer: type \"NFKC\"",
           [](json& t) {
             t["normalizer"] = {{"type", "NFKC"}};
           }},
          {"normalizer.normalizers[0]: type \"Lowercase\"",
           [](json& t) {
             t["normalizer"] = {{"type", "Sequence"}, {"normalizers", json::array({{{"type", "Lowercase"}}})}};
           }},
          {"pre_tokenizer: type \"Metaspace\"",
           [](json& t) {
             t["pre_tokenizer"] = {{"type", "Metaspace"}};
           }},
          {"pre_tokenizer without ByteLevel", [](json& t) { t["pre_tokenizer"] = nullptr; }},
          {"[1]: Digits after ByteLevel",
           [](json& t) {
             t["pre_tokenizer"] = {{"type", "Sequence"},
                                   {"pretokenizers", json::array({t["pre_tokenizer"],
                                                                  {{"type", "Digits"}, {"individual_digits", true}}})}};
           }},
          {"behavior \"Sideways\"",
           [](json& t) {
             t["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"String", "a"}}}, {"behavior", "Sideways"}};
           }},
          {"post_processor: type \"BertProcessing\"",
           [](json& t) {
             t["post_processor"] = {{"type", "BertProcessing"}};
           }},
          {"one \"A\" is supported",
           [](json& t) {
             t["post_processor"] = template_of(json::array({kSequence, kSequence}), json::object());
           }},
          {"a second TemplateProcessing",
           [](json& t) {
             const json once = template_of(json::array({kSequence}), json::object());
             t["post_processor"] = {{"type", "Sequence"}, {"processors", json::array({once, once})}};
           }},
          {"no decoder", [](json& t) { t["decoder"] = nullptr; }},
          {"decoder: type \"Metaspace\"",
           [](json& t) {
             t["decoder"] = {{"type", "Metaspace"}};
           }},
          {"missing closing parenthesis",
           [](json& t) {
             const json split = {{"type", "Split"}, {"pattern", {{"Regex", "(a"}}}, {"behavior", "Isolated"}};
             t["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", json::array({split, t["pre_tokenizer"]})}};
           }},
      },
      Code::kUnsupported);
}

TEST_CASE("defaults spelled out are accepted") {
  json tokenizer = byte_tokenizer();
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) tokenizer["model"][key] = "";
  tokenizer["model"]["dropout"] = 0.0;
  tokenizer["model"]["fuse_unk"] = false;
  tokenizer["model"].erase("type");
  tokenizer["padding"] = nullptr;
  for (const json& unknown : {json(nullptr), json("<unk>")}) {  // every byte is known
    tokenizer["model"]["unk_token"] = unknown;
    CHECK(make_tokenizer(tokenizer).encode("ok") == Ids{'o', 'k'});
  }
}

TEST_CASE("text that is not JSON, names a key twice or nests without end is corrupt") {
  const std::vector<std::pair<std::string, const char*>> cases = {
      {"", "not valid JSON"},
      {"{\"model\":", "not valid JSON"},
      {"{\"model\": \"\xFF\"}", "not valid JSON"},
      {R"({"model": {"vocab": {"a": 1, "b": 2, "a": 3}}})", "key 'a' is given twice"},
      {std::string(1000000, '['), "nested deeper than 32"},
      {"{\"model\":" + std::string(100000, '[') + std::string(100000, ']') + "}", "nested deeper than 32"},
  };
  for (const auto& [text, fact] : cases) {
    const Failure failure = failure_of([&, &text = text] { Tokenizer::from_json(text, "test.json"); });
    CAPTURE(failure.message);
    CHECK(failure.code == Code::kCorruptModel);
    CHECK(failure.message.starts_with("test.json: "));
    CHECK(failure.message.find(fact) != std::string::npos);
  }
}

TEST_CASE("a file that is not there is not found, a folder cannot be read") {
  const std::filesystem::path nowhere = std::filesystem::path(MOEBIUS_TEST_DATA) / "tokenizers" / "none.json";
  const Failure missing = failure_of([&] { Tokenizer::load(nowhere); });
  CHECK(missing.code == Code::kNotFound);
  CHECK(missing.message.find("none.json") != std::string::npos);
  CHECK(failure_of([&] { Tokenizer::load(nowhere.parent_path()); }).code == Code::kIo);
}

TEST_CASE("a damaged file loads or raises Error, nothing else") {
  const uint32_t seed = Catch::rngSeed() != 0 ? Catch::rngSeed() : 99;
  CAPTURE(seed);
  std::mt19937 random(seed);
  json small = byte_tokenizer({"ab"});
  small["model"]["merges"] = json::array({"a b"});
  small["added_tokens"] = json::array({added_token(257, "<x>", {"special"})});
  const json split = {
      {"type", "Split"}, {"pattern", {{"Regex", R"(\p{L}+|[^\s\p{L}]{1,3}|\s+(?!\S))"}}}, {"behavior", "Isolated"}};
  small["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", json::array({split, small["pre_tokenizer"]})}};
  const std::string intact = small.dump();
  int num_refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string damaged = intact;
    for (uint32_t n = 1 + random() % 3; n > 0; --n) {
      const size_t at = random() % damaged.size();
      const uint32_t kind = random() % 3;
      if (kind == 0) damaged[at] = static_cast<char>(random());
      if (kind == 1) damaged.erase(at, 1 + random() % 8);
      if (kind == 2) damaged.insert(at, damaged.substr(random() % damaged.size(), random() % 8));
    }
    try {
      const Tokenizer tokenizer = Tokenizer::from_json(damaged, "damaged");
      tokenizer.decode(tokenizer.encode("ab <x> 12"));
    } catch (const Error&) {
      ++num_refused;
    }
  }
  CHECK(num_refused > 1000);
}
