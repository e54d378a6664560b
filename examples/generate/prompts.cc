#include "examples/generate/prompts.h"

#include <fstream>
#include <set>

#include <fmt/format.h>

#include "examples/common/options.h"
#include "examples/common/strict_json.h"

namespace moebius_examples {
namespace {

using nlohmann::json;

[[noreturn]] void bad(const std::string& where, const std::string& what) { throw BadInput(where + ": " + what); }

// Sampling keys by the kind of value they take; the engine checks the ranges.
const std::set<std::string> kIntegers = {"max_tokens", "min_tokens", "top_k", "seed", "logprobs", "priority", "n"};
const std::set<std::string> kReals = {"temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "deadline_ms"};
const std::set<std::string> kLists = {"stop_token_ids", "allowed_token_ids"};

int64_t integer(const json& v, const std::string& where, const std::string& key) {
  if (!v.is_number_integer()) bad(where, fmt::format("{} is {}, must be an integer", key, v.dump()));
  if (v.is_number_unsigned() && v.get<uint64_t>() > INT64_MAX && key != "seed") bad(where, fmt::format("{} is {}, too large", key, v.dump()));
  return v.is_number_unsigned() ? static_cast<int64_t>(v.get<uint64_t>()) : v.get<int64_t>();
}

std::vector<int32_t> token_list(const json& v, const std::string& where, const std::string& key) {
  if (!v.is_array()) bad(where, fmt::format("{} is {}, must be a list of token ids", key, v.dump()));
  std::vector<int32_t> ids;
  for (const json& id : v) {
    const int64_t i = integer(id, where, key);
    if (i < INT32_MIN || i > INT32_MAX) bad(where, fmt::format("{} holds {}, which is no token id", key, i));
    ids.push_back(static_cast<int32_t>(i));
  }
  return ids;
}

void set_sampling(PromptEntry& p, const std::string& key, const json& v) {
  try {
    if (kIntegers.count(key)) {
      const int64_t i = integer(v, p.where, key);
      if (key == "n" && i != 1) bad(p.where, fmt::format("n is {}; a record holds one sample, so only 1 is taken here", i));
      p.request.set(key.c_str(), i);
      if (key == "logprobs") p.wants_logprobs = true;
    } else if (kReals.count(key)) {
      if (!v.is_number()) bad(p.where, fmt::format("{} is {}, must be a number", key, v.dump()));
      p.request.set_real(key.c_str(), v.get<double>());
    } else if (key == "ignore_eos") {
      if (!v.is_boolean()) bad(p.where, fmt::format("ignore_eos is {}, must be true or false", v.dump()));
      p.request.set("ignore_eos", static_cast<int64_t>(v.get<bool>()));
    } else if (kLists.count(key)) {
      p.request.set_ids(key.c_str(), token_list(v, p.where, key));
    } else if (key == "logit_bias") {
      if (!v.is_object()) bad(p.where, "logit_bias must be an object of token id and bias");
      for (const auto& [token, bias] : v.items()) {
        const std::optional<int32_t> id = token_id(token);
        if (!id || !bias.is_number()) bad(p.where, fmt::format("logit_bias '{}': {} is no token id with a number", token, bias.dump()));
        p.request.add_logit_bias(*id, bias.get<float>());
      }
    } else {
      p.request.set(key.c_str(), int64_t{0});  // the library says whether it is unsupported or unknown, and the nearest
      bad(p.where, fmt::format("unknown key '{}'", key));
    }
  } catch (const moebius_cpp::Error& e) {
    bad(p.where, e.what());
  }
}

void finish(PromptEntry& p, bool keep_logits) {
  if (p.prompt_ids.empty()) bad(p.where, "the prompt is empty");
  moebius_cpp::check([&](moebius_error** e) {
    return moebius_request_set_prompt(p.request.get(), p.prompt_ids.data(), p.prompt_ids.size(), e);
  });
  p.request.set("id", p.key);
  if (keep_logits) p.request.set("keep_logits", int64_t{1});
}

PromptEntry entry_of(const json& line, size_t index, const std::string& where, const SamplingKeys& defaults,
                     const moebius_cpp::Tokenizer* tokenizer, bool keep_logits) {
  if (!line.is_object()) bad(where, "is not a JSON object");
  PromptEntry p;
  p.where = where;
  p.id = static_cast<int64_t>(index);
  for (const auto& [key, value] : defaults.items())
    if (!line.contains(key)) set_sampling(p, key, value);
  const bool text = line.contains("prompt"), ids = line.contains("prompt_ids");
  if (text == ids) bad(where, text ? "has both prompt and prompt_ids" : "has neither prompt nor prompt_ids");
  for (const auto& [key, v] : line.items()) {
    if (key == "id") {
      if (!v.is_string() && !v.is_number_integer()) bad(where, fmt::format("id is {}, must be a string or an integer", v.dump()));
      if (v.is_string() && (v == "" || v.get<std::string>().find('\0') != std::string::npos)) bad(where, "id is empty, or has a NUL character");
      p.id = v;
    } else if (key == "prompt") {
      if (!v.is_string()) bad(where, fmt::format("prompt is {}, must be a string", v.dump()));
      if (tokenizer == nullptr) bad(where, "a text prompt needs the model's tokenizer.json; give prompt_ids instead");
      p.prompt_ids = tokenizer->encode(v.get<std::string>());
    } else if (key == "prompt_ids") {
      p.prompt_ids = token_list(v, where, key);
    } else if (key == "arrival_step" || key == "cancel_step") {
      const int64_t step = integer(v, where, key);
      if (step < 0) bad(where, fmt::format("{} is {}, must be at least 0", key, step));
      (key == "arrival_step" ? p.arrival_step : p.cancel_step) = step;
    } else {
      set_sampling(p, key, v);
    }
  }
  p.key = p.id.is_string() ? p.id.get<std::string>() : p.id.dump();
  finish(p, keep_logits);
  return p;
}

}  // namespace

std::vector<PromptEntry> read_prompts(const std::string& file, const SamplingKeys& defaults, const moebius_cpp::Tokenizer* tokenizer,
                                      bool keep_logits) {
  std::ifstream in(file);
  if (!in) throw BadInput("cannot read " + file);
  std::vector<PromptEntry> out;
  std::set<std::string> ids;
  std::string text;
  for (size_t number = 1; std::getline(in, text); ++number) {
    if (text.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = fmt::format("{}:{}", file, number);
    out.push_back(entry_of(parse_strictly(text, where), out.size(), where, defaults, tokenizer, keep_logits));
    if (!ids.insert(out.back().key).second) bad(where, fmt::format("id {} is used twice", out.back().id.dump()));
  }
  if (out.empty()) throw BadInput(file + " holds no prompt");
  return out;
}

PromptEntry one_prompt(std::vector<int32_t> ids, const std::string& where, const SamplingKeys& sampling, bool keep_logits) {
  PromptEntry p;
  p.where = where;
  p.id = int64_t{0};
  p.key = "0";
  p.prompt_ids = std::move(ids);
  for (const auto& [key, value] : sampling.items()) set_sampling(p, key, value);
  finish(p, keep_logits);
  return p;
}

}  // namespace moebius_examples
