// What comes back: pieces of text as chunks of a stream or, gathered, as one answer, in the shapes of OpenAI's two endpoints.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "examples/serve/api.h"

namespace moebius_examples {

class Answer {
 public:
  Answer(const GenerateRequest& request, const moebius_cpp::Tokenizer& tokenizer, std::string id, std::string model,
         std::string fingerprint);

  // A piece as a chunk; null where there is nothing to say (text that is held back).
  nlohmann::json chunk(const Piece& piece);
  // The first of a chat's choice: its role.
  nlohmann::json first_chunk(int32_t choice) const;
  nlohmann::json usage_chunk(int64_t completion_tokens) const;

  void add(const Piece& piece);
  std::string whole(int64_t completion_tokens);  // once

 private:
  struct Choice {
    std::string text;
    std::map<std::string, std::string> logprobs;  // by key, a list's entries as they will be sent: as values they would take twenty times as much
    const char* finish_reason = nullptr;
  };
  nlohmann::json envelope(const char* object) const;
  nlohmann::json usage(int64_t completion_tokens) const;
  nlohmann::json chat_logprob(int32_t token, float logprob) const;
  std::string name_of(int32_t token) const;
  nlohmann::json logprobs_of(const TokenRecord& token) const;
  std::string text_of(int32_t token) const;

  const bool chat_, stream_, include_usage_, logprobs_;
  const int64_t prompt_tokens_;
  const moebius_cpp::Tokenizer& tokenizer_;
  const std::string id_, model_, fingerprint_;
  const int64_t created_;
  std::vector<Choice> choices_;
};

}  // namespace moebius_examples
