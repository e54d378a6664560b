#include "examples/serve/answer.h"

#include <algorithm>
#include <ctime>

#include <fmt/format.h>

#include "examples/common/strict_json.h"

namespace moebius_examples {
namespace {

using nlohmann::json;

constexpr const char* kReplacement = "\xEF\xBF\xBD";  // stands for bytes that are no whole character

// JSON has no infinity.
double finite(float logprob) { return std::max(static_cast<double>(logprob), -9999.0); }

json reason_or_null(const char* reason) { return reason == nullptr ? json() : json(reason); }

}  // namespace

Answer::Answer(const GenerateRequest& r, const moebius_cpp::Tokenizer& tokenizer, std::string id, std::string model,
               std::string fingerprint)
    : chat_(r.chat),
      stream_(r.stream),
      include_usage_(r.include_usage),
      logprobs_(r.logprobs),
      prompt_tokens_(r.prompt_tokens),
      tokenizer_(tokenizer),
      id_(std::move(id)),
      model_(std::move(model)),
      fingerprint_(std::move(fingerprint)),
      created_(std::time(nullptr)),
      choices_(r.choices()) {
  if (!logprobs_) return;
  const std::vector<const char*> keys = chat_ ? std::vector{"content"} : std::vector{"tokens", "token_logprobs", "top_logprobs", "text_offset"};
  for (Choice& c : choices_)
    for (const char* key : keys) c.logprobs[key];
}

json Answer::envelope(const char* object) const {
  json out = {{"id", id_}, {"object", object}, {"created", created_}, {"model", model_}, {"system_fingerprint", fingerprint_}};
  if (stream_ && include_usage_) out["usage"] = nullptr;
  return out;
}

json Answer::usage(int64_t completion_tokens) const {
  return {
      {"prompt_tokens", prompt_tokens_}, {"completion_tokens", completion_tokens}, {"total_tokens", prompt_tokens_ + completion_tokens}};
}

std::string Answer::text_of(int32_t token) const {
  try {
    return tokenizer_.decode({token});
  } catch (const moebius_cpp::Error&) {
    return {};  // the model's vocabulary is padded beyond the tokenizer's
  }
}

// The bytes of a token that is no whole character are not known here: null, as OpenAI's schema allows.
json Answer::chat_logprob(int32_t token, float logprob) const {
  const std::string text = text_of(token);
  json bytes;
  if (text.find(kReplacement) == std::string::npos) {
    bytes = json::array();
    for (unsigned char byte : text) bytes.push_back(byte);
  }
  return {{"token", text}, {"logprob", finite(logprob)}, {"bytes", bytes}};
}

// Unique also for tokens that are no whole character: they are keys of an object.
std::string Answer::name_of(int32_t token) const {
  const std::string text = text_of(token);
  return text.empty() || text.find(kReplacement) != std::string::npos ? fmt::format("token_id:{}", token) : text;
}

// Lists of one entry, by key.
json Answer::logprobs_of(const TokenRecord& t) const {
  if (chat_) {
    json entry = chat_logprob(t.token, t.logprob);
    entry["top_logprobs"] = json::array();
    for (const auto& [token, logprob] : t.top) entry["top_logprobs"].push_back(chat_logprob(token, logprob));
    return {{"content", json::array({std::move(entry)})}};
  }
  json top = json::object();
  for (const auto& [token, logprob] : t.top) top[name_of(token)] = finite(logprob);
  const std::string name = name_of(t.token);
  top[name] = finite(t.logprob);
  return {{"tokens", json::array({name})},
          {"token_logprobs", json::array({finite(t.logprob)})},
          {"top_logprobs", json::array({std::move(top)})},
          {"text_offset", json::array({t.offset})}};
}

json Answer::chunk(const Piece& p) {
  Choice& c = choices_[static_cast<size_t>(p.choice)];
  const bool says_logprobs = logprobs_ && p.token;
  if (p.text.empty() && p.finish_reason == nullptr && !says_logprobs) return nullptr;
  json logprobs = says_logprobs ? logprobs_of(*p.token) : json();
  json choice = {{"index", p.choice}, {"logprobs", std::move(logprobs)}, {"finish_reason", reason_or_null(p.finish_reason)}};
  if (chat_)
    choice["delta"] = p.text.empty() ? json::object() : json{{"content", p.text}};
  else
    choice["text"] = p.text;
  json out = envelope(chat_ ? "chat.completion.chunk" : "text_completion");
  out["choices"] = json::array({std::move(choice)});
  return out;
}

json Answer::first_chunk(int32_t choice) const {
  json out = envelope("chat.completion.chunk");
  out["choices"] = json::array(
      {{{"index", choice}, {"delta", {{"role", "assistant"}, {"content", ""}}}, {"logprobs", nullptr}, {"finish_reason", nullptr}}});
  return out;
}

json Answer::usage_chunk(int64_t completion_tokens) const {
  json out = envelope(chat_ ? "chat.completion.chunk" : "text_completion");
  out["choices"] = json::array();
  out["usage"] = usage(completion_tokens);
  return out;
}

void Answer::add(const Piece& p) {
  Choice& c = choices_[static_cast<size_t>(p.choice)];
  c.text += p.text;
  if (logprobs_ && p.token) {
    const json one = logprobs_of(*p.token);
    for (const auto& [key, list] : one.items()) {
      std::string& entries = c.logprobs[key];
      if (!entries.empty()) entries += ',';
      entries += line_of(list[0]);
    }
  }
  if (p.finish_reason != nullptr) c.finish_reason = p.finish_reason;
}

std::string Answer::whole(int64_t completion_tokens) {
  json head = envelope(chat_ ? "chat.completion" : "text_completion");
  head["usage"] = usage(completion_tokens);
  std::string out = line_of(head);
  out.back() = ',';  // for its closing brace
  out += "\"choices\":[";
  for (size_t i = 0; i < choices_.size(); ++i) {
    Choice& c = choices_[i];
    json choice = {{"index", i}, {"finish_reason", reason_or_null(c.finish_reason)}};
    if (chat_)
      choice["message"] = {{"role", "assistant"}, {"content", c.text}};
    else
      choice["text"] = c.text;
    out += (i > 0 ? "," : "") + line_of(choice);
    out.back() = ',';
    out += logprobs_ ? "\"logprobs\":{" : "\"logprobs\":null";
    for (const auto& [key, entries] : c.logprobs) {
      if (out.back() != '{') out += ',';
      out.append("\"").append(key).append("\":[").append(entries).append("]");
    }
    out += logprobs_ ? "}}" : "}";
    c.logprobs.clear();
  }
  return out += "]}";
}

}  // namespace moebius_examples
