// The bodies of /v1/completions and /v1/chat/completions as requests of the engine.
#pragma once

#include <string>
#include <vector>

#include "examples/serve/chat.h"
#include "examples/serve/transcript.h"

namespace moebius_examples {

// What requests are read against.
struct Serving {
  const moebius_cpp::Engine& engine;
  const moebius_cpp::Tokenizer& tokenizer;
  const ChatTemplate& chat;
  std::string model_name;
  int64_t max_context = 0;  // tokens of a request that fit the context and either layout's KV
  int64_t max_choices = 0;  // of one HTTP request, prompts × n: no more than may wait, lest it could never be taken
};

struct GenerateRequest {
  bool chat = false, stream = false, include_usage = false, logprobs = false;
  int32_t n = 1;
  std::vector<moebius_cpp::Request> requests;  // [prompts]
  int64_t prompt_tokens = 0;                   // of all of them
  TextRules text;

  size_t choices() const { return requests.size() * static_cast<size_t>(n); }
};

// Throws HttpError that names the key: for what is malformed, and for what OpenAI or vLLM know and this server does not, unless the value
// asks for nothing.
GenerateRequest read_generate_request(const std::string& body, bool chat, const Serving& serving);

}  // namespace moebius_examples
