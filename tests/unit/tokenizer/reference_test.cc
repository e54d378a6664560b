#include <thread>

#include "tests/unit/tokenizer/fixtures.h"

using namespace moebius;

namespace {

struct Reference {
  std::string folder;
  nlohmann::json cases;  // [{text, ids, ids_without_special (if they differ), decoded (of the latter)}]
};

std::vector<Reference> references() {
  std::vector<Reference> all;
  for (const std::string& folder : reference_folders()) {
    nlohmann::json file = read_json(folder + "/reference.json");
    all.push_back({folder, file.is_object() ? file.at("tokenizer") : file});
  }
  return all;
}

}  // namespace

TEST_CASE("encode and decode equal Hugging Face's on every reference text") {
  for (const Reference& reference : references()) {
    const Tokenizer tokenizer = Tokenizer::load(reference.folder + "/tokenizer.json");
    REQUIRE(reference.cases.size() >= 20);
    for (const nlohmann::json& item : reference.cases) {
      INFO(reference.folder << ": " << item.at("text"));
      const auto ids = item.at("ids").get<Ids>();
      CHECK(tokenizer.encode(item.at("text").get<std::string>()) == ids);
      const auto plain_ids = item.value("ids_without_special", item.at("ids")).get<Ids>();
      CHECK(tokenizer.encode(item.at("text").get<std::string>(), false) == plain_ids);
      CHECK(tokenizer.decode(plain_ids) == item.at("decoded").get<std::string>());
    }
  }
}

TEST_CASE("vocab_size counts added tokens") {
  CHECK(Tokenizer::load(MOEBIUS_TEST_DATA "/tokenizers/nfc-legacy-merges/tokenizer.json").vocab_size() == 1026);
  CHECK(Tokenizer::load(MOEBIUS_TEST_DATA "/tokenizers/staged-splits-bos/tokenizer.json").vocab_size() == 1024);
}

TEST_CASE("four threads encode with one tokenizer and agree with one thread") {
  for (const Reference& reference : references()) {
    const Tokenizer tokenizer = Tokenizer::load(reference.folder + "/tokenizer.json");
    std::vector<int> differences(4, 0);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (int round = 0; round < 5; ++round) {
          for (const nlohmann::json& item : reference.cases) {
            const bool same =
                tokenizer.encode(item.at("text").get_ref<const std::string&>()) == item.at("ids").get<Ids>();
            differences[t] += same ? 0 : 1;
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(differences == std::vector<int>(4, 0));
  }
}
