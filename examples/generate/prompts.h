// The requests of a run: from flags or from a file of JSON lines, all checked before anything runs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "moebius/moebius.hpp"

namespace moebius_examples {

// Sampling flags and defaults of a prompts file's lines: request keys of the C ABI with their values.
using SamplingKeys = nlohmann::ordered_json;

struct PromptEntry {
  nlohmann::json id;                // as given: a string or an integer
  std::string key;                  // the same as text; names the request to the engine
  std::vector<int32_t> prompt_ids;
  moebius_cpp::Request request{{}};
  int64_t arrival_step = 0, cancel_step = -1;
  bool wants_logprobs = false;
  std::string where;                // for messages: "FILE:12" or "--prompt"
};

// keep_logits is set on every request where asked. tokenizer may be null: then text prompts are refused.
std::vector<PromptEntry> read_prompts(const std::string& file, const SamplingKeys& defaults, const moebius_cpp::Tokenizer* tokenizer,
                                      bool keep_logits);
PromptEntry one_prompt(std::vector<int32_t> ids, const std::string& where, const SamplingKeys& sampling, bool keep_logits);

}  // namespace moebius_examples
