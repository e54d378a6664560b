#include <random>

#include "tests/unit/tokenizer/fixtures.h"

using namespace moebius;

namespace {

// The definition, quadratic: again and again join the pair of lowest rank, the leftmost among equals.
Ids encode_slowly(const nlohmann::json& model, const std::string& text) {
  std::vector<std::string> symbols;
  for (const char c : text) symbols.emplace_back(1, c);
  const nlohmann::json& merges = model["merges"];
  for (;;) {
    size_t best_rank = merges.size(), best = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank][0] == symbols[i] && merges[rank][1] == symbols[i + 1]) best_rank = rank, best = i;
      }
    }
    if (best_rank == merges.size()) break;
    symbols[best] += symbols[best + 1];
    symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(best) + 1);
  }
  Ids ids;
  for (const std::string& symbol : symbols) ids.push_back(model["vocab"][symbol].get<int32_t>());
  return ids;
}

nlohmann::json with_merges(const std::vector<std::pair<std::string, std::string>>& merges,
                           std::vector<std::string> more_tokens = {}) {
  std::vector<std::string> tokens;
  for (const auto& [left, right] : merges) {
    if (std::find(tokens.begin(), tokens.end(), left + right) == tokens.end()) tokens.push_back(left + right);
  }
  tokens.insert(tokens.end(), more_tokens.begin(), more_tokens.end());
  nlohmann::json json = byte_tokenizer(tokens);
  json["model"]["merges"] = merges;
  return json;
}

}  // namespace

TEST_CASE("merges equal the definition's on random vocabularies and texts") {
  const uint32_t seed = Catch::rngSeed() != 0 ? Catch::rngSeed() : 7;
  CAPTURE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 40; ++round) {
    std::vector<std::string> tokens = {"a", "b", "c"};
    std::vector<std::pair<std::string, std::string>> merges;
    for (int i = 0; i < 12; ++i) {
      const std::string left = tokens[random() % tokens.size()], right = tokens[random() % tokens.size()];
      // Each token from one pair only: with several, Hugging Face (and we) join an outdated pair at the older rank.
      if (std::find(tokens.begin(), tokens.end(), left + right) != tokens.end()) continue;
      merges.emplace_back(left, right);
      tokens.push_back(left + right);
    }
    const nlohmann::json json = with_merges(merges);
    const Tokenizer tokenizer = make_tokenizer(json);
    for (int i = 0; i < 20; ++i) {
      std::string text;
      for (uint32_t n = random() % 40; n > 0; --n) text += static_cast<char>('a' + random() % 3);
      CAPTURE(text, json["model"]["merges"].dump());
      CHECK(tokenizer.encode(text) == encode_slowly(json["model"], text));
    }
  }
}

TEST_CASE("a pre-token of a megabyte is merged to the end") {
  std::vector<std::pair<std::string, std::string>> merges;
  for (size_t length = 1; length <= 64; length *= 2)
    merges.emplace_back(std::string(length, 'a'), std::string(length, 'a'));
  const nlohmann::json json = with_merges(merges);
  const int32_t longest = json["model"]["vocab"][std::string(128, 'a')].get<int32_t>();
  const Ids ids = make_tokenizer(json).encode(std::string(1 << 20, 'a') + "a");
  REQUIRE(ids.size() == (1 << 13) + 1);
  CHECK(std::count(ids.begin(), ids.end(), longest) == 1 << 13);
  CHECK(ids.back() == 'a');
}

TEST_CASE("with ignore_merges a whole pre-token that is in the vocabulary wins, without it merges decide") {
  nlohmann::json json = with_merges({{"a", "b"}}, {"abc"});
  CHECK(make_tokenizer(json).encode("abc") == Ids{256, 'c'});
  json["model"]["ignore_merges"] = true;
  CHECK(make_tokenizer(json).encode("abc") == Ids{257});
  CHECK(make_tokenizer(json).encode("abca") == Ids{256, 'c', 'a'});
}

TEST_CASE("of a merge listed twice the later rank counts") {
  const nlohmann::json json = with_merges({{"a", "b"}, {"b", "c"}, {"a", "b"}});
  CHECK(make_tokenizer(json).encode("abc") == Ids{'a', 257});
}

TEST_CASE("merges are read in both spellings, with or without a version line") {
  nlohmann::json json = with_merges({{"a", "b"}, {"ab", "c"}});
  json["model"]["merges"] = nlohmann::json::array({"#version: 0.2", "a b", "ab c"});
  CHECK(make_tokenizer(json).encode("abcab") == Ids{257, 256});
}

TEST_CASE("a byte without a token is reported, not dropped") {
  nlohmann::json json = byte_tokenizer();
  json["model"]["vocab"].erase("q");
  const Tokenizer tokenizer = make_tokenizer(json);
  CHECK(tokenizer.encode("abc") == Ids{'a', 'b', 'c'});
  const Failure failure = failure_of([&] { tokenizer.encode("aqc"); });
  CHECK(failure.code == Code::kUnsupported);
  CHECK(failure.message.find("0x71") != std::string::npos);
}

TEST_CASE("random well-formed text survives encode and decode") {
  const uint32_t seed = Catch::rngSeed() != 0 ? Catch::rngSeed() : 20240608;
  CAPTURE(seed);
  std::mt19937 random(seed);
  // Without a normalizer; the NFC one does not round-trip by design.
  for (const size_t folder : {1, 2}) {
    const Tokenizer tokenizer = Tokenizer::load(reference_folders()[folder] + "/tokenizer.json");
    for (int round = 0; round < 500; ++round) {
      const std::string text = random_text(random, random() % 60);
      CAPTURE(folder, text);
      CHECK(tokenizer.decode(tokenizer.encode(text, false)) == text);
    }
  }
}

TEST_CASE("ill-formed text is encoded as U+FFFD per maximal part") {
  const Tokenizer tokenizer = make_tokenizer(byte_tokenizer());
  CHECK(tokenizer.encode("a\xF0\x9F\x91") == Ids{'a', 0xEF, 0xBF, 0xBD});
  CHECK(tokenizer.encode("\xFF\xC3"
                         "b") == Ids{0xEF, 0xBF, 0xBD, 0xEF, 0xBF, 0xBD, 'b'});
  CHECK(tokenizer.encode(std::string_view("a\0b", 3)) == Ids{'a', 0, 'b'});
}
