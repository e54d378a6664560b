#include "examples/serve/api.h"

#include <algorithm>
#include <map>
#include <set>

#include <fmt/format.h>

#include "examples/common/options.h"
#include "examples/common/strict_json.h"
#include "examples/serve/http_error.h"

namespace moebius_examples {
namespace {

using nlohmann::json;

constexpr size_t kMostStops = 16;

// Keys that the engine takes as they are; it checks the ranges.
const std::set<std::string> kIntegers = {"min_tokens", "top_k", "seed", "priority"};
const std::set<std::string> kReals = {"temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"};
const std::set<std::string> kLists = {"stop_token_ids", "allowed_token_ids"};
// Keys that are known and not supported, with the values that ask for nothing; null always does.
const std::map<std::string, std::vector<json>> kNeutral = {
    {"best_of", {1}},
    {"echo", {false}},
    {"suffix", {""}},
    {"tools", {json::array()}},
    {"functions", {json::array()}},
    {"tool_choice", {"none", "auto"}},
    {"function_call", {"none", "auto"}},
    {"parallel_tool_calls", {true, false}},
    {"response_format", {json{{"type", "text"}}}},
    {"modalities", {json::array({"text"})}},
    {"store", {false}},
    {"service_tier", {"auto", "default"}},
    {"skip_special_tokens", {true}},
    {"spaces_between_special_tokens", {true}},
    {"use_beam_search", {false}},
    {"length_penalty", {1, 1.0}},
    {"add_generation_prompt", {true}},
    {"continue_final_message", {false}},
    {"return_tokens_as_token_ids", {false}},
};
const std::set<std::string> kIgnored = {"user", "safety_identifier", "metadata", "request_id"};  // labels that change no answer

[[noreturn]] void bad(const std::string& key, const std::string& what, const char* code = "") {
  throw HttpError(400, key + what, key, code);
}

std::string shown(const json& v) {
  const std::string text = line_of(v);
  return text.size() <= 80 ? text : text.substr(0, 60) + "…";
}

int64_t integer(const std::string& key, const json& v) {
  if (v.is_number_integer() && !(v.is_number_unsigned() && v.get<uint64_t>() > INT64_MAX)) return v.get<int64_t>();
  if (v.is_number_unsigned() && key == "seed") return static_cast<int64_t>(v.get<uint64_t>());
  bad(key, fmt::format(" is {}, must be an integer", shown(v)));
}

bool boolean(const std::string& key, const json& v) {
  if (!v.is_boolean()) bad(key, fmt::format(" is {}, must be true or false", shown(v)));
  return v.get<bool>();
}

std::vector<int32_t> ids(const std::string& key, const json& v) {
  if (!v.is_array()) bad(key, fmt::format(" is {}, must be a list of token ids", shown(v)));
  std::vector<int32_t> out;
  out.reserve(v.size());
  for (const json& id : v) {
    const int64_t i = integer(key, id);
    if (i < 0 || i > INT32_MAX) bad(key, fmt::format(" holds {}, which is no token id", i));
    out.push_back(static_cast<int32_t>(i));
  }
  return out;
}

class Reader {
 public:
  Reader(const json& body, bool chat, const Serving& serving) : body_(body), serving_(serving) {
    out_.chat = chat;
    if (!body.is_object()) throw HttpError(400, "the body must be a JSON object");
  }

  GenerateRequest read() {
    check_model();
    read_own_keys();
    const std::vector<std::vector<int32_t>> list = prompts();
    if (static_cast<int64_t>(list.size()) * out_.n > serving_.max_choices)
      bad("n", fmt::format(": {} prompts of n = {} are more than {} choices", list.size(), out_.n, serving_.max_choices));
    for (const std::vector<int32_t>& prompt : list) out_.requests.push_back(request_for(prompt));
    return std::move(out_);
  }

 private:
  // Null where the key is absent or null.
  const json& value(const char* key) const {
    static const json null;
    const auto it = body_.find(key);
    return it == body_.end() ? null : *it;
  }

  void check_model() const {
    const json& m = value("model");
    if (m.is_null()) return;
    if (!m.is_string()) bad("model", " must be a string");
    if (m != serving_.model_name)
      throw HttpError(404, fmt::format("model '{}' is not served here, '{}' is", m.get<std::string>(), serving_.model_name), "model",
                      "model_not_found");
  }

  // The keys that are this layer's, not the engine's.
  void read_own_keys() {
    if (const json& v = value("stream"); !v.is_null()) out_.stream = boolean("stream", v);
    if (const json& v = value("n"); !v.is_null()) {
      const int64_t n = integer("n", v);
      if (n < 1 || n > serving_.max_choices) bad("n", fmt::format(" is {}, must be in [1, {}]", n, serving_.max_choices));
      out_.n = static_cast<int32_t>(n);
    }
    if (const json& v = value("min_tokens"); !v.is_null()) out_.text.min_tokens = integer("min_tokens", v);
    if (const json& v = value("include_stop_str_in_output"); !v.is_null())
      out_.text.include_stop = boolean("include_stop_str_in_output", v);
    read_stops();
    read_stream_options();
    read_logprobs();
  }

  void read_stops() {
    const json& v = value("stop");
    if (v.is_null()) return;
    const json list = v.is_array() ? v : json::array({v});
    if (list.size() > kMostStops) bad("stop", fmt::format(" has {} strings, at most {} are taken", list.size(), kMostStops));
    for (const json& s : list) {
      if (!s.is_string() || s.get_ref<const std::string&>().empty()) bad("stop", " must be a string that is not empty, or a list of such");
      out_.text.stop.push_back(s);
    }
  }

  void read_stream_options() {
    const json& v = value("stream_options");
    if (v.is_null()) return;
    if (!v.is_object()) bad("stream_options", " must be an object");
    if (!out_.stream) bad("stream_options", " is only for stream: true");
    for (const auto& [key, option] : v.items()) {
      if (key == "include_usage")
        out_.include_usage = boolean("stream_options", option);
      else if (option != json(false))
        bad("stream_options", fmt::format(": '{}' is not supported", key), "unsupported");
    }
  }

  void read_logprobs() {
    const json& v = value("logprobs");
    const json& top = value("top_logprobs");
    if (!out_.chat) {
      if (!top.is_null()) bad("top_logprobs", " is of chat completions; here logprobs is the number");
      if (v.is_null()) return;
      if (v.is_boolean()) bad("logprobs", " must be a number from 0 to 20");
      top_logprobs_ = integer("logprobs", v);
      out_.logprobs = true;
      return;
    }
    out_.logprobs = !v.is_null() && boolean("logprobs", v);
    if (top.is_null()) return;
    top_logprobs_ = integer("top_logprobs", top);
    if (!out_.logprobs && top_logprobs_ != 0) bad("top_logprobs", " needs logprobs: true");
  }

  std::vector<std::vector<int32_t>> prompts() const {
    if (out_.chat)
      return {serving_.tokenizer.encode(serving_.chat.prompt(read_messages(value("messages"))), serving_.chat.wants_special_tokens())};
    const json& p = value("prompt");
    const bool add = value("add_special_tokens").is_null() || boolean("add_special_tokens", value("add_special_tokens"));
    if (p.is_string()) return {serving_.tokenizer.encode(p.get_ref<const std::string&>(), add)};
    if (!p.is_array() || p.empty()) bad("prompt", " must be a string, a list of strings, a list of token ids or a list of such lists");
    if (p.front().is_number()) return {ids("prompt", p)};
    if (static_cast<int64_t>(p.size()) > serving_.max_choices)
      bad("prompt", fmt::format(" has {} entries, at most {} are taken", p.size(), serving_.max_choices));
    std::vector<std::vector<int32_t>> out;
    for (const json& entry : p)
      out.push_back(entry.is_string() ? serving_.tokenizer.encode(entry.get_ref<const std::string&>(), add) : ids("prompt", entry));
    return out;
  }

  moebius_cpp::Request request_for(const std::vector<int32_t>& prompt) {
    const char* const prompt_key = out_.chat ? "messages" : "prompt";
    if (prompt.empty()) bad(prompt_key, ": the prompt is empty");
    out_.prompt_tokens += static_cast<int64_t>(prompt.size());
    moebius_cpp::Request r(prompt);
    r.set("n", int64_t{out_.n});
    const char* const most_key = out_.chat && !value("max_completion_tokens").is_null() ? "max_completion_tokens" : "max_tokens";
    set(most_key, [&] { r.set("max_tokens", max_tokens(most_key, static_cast<int64_t>(prompt.size()))); });
    if (out_.logprobs) set(out_.chat ? "top_logprobs" : "logprobs", [&] { r.set("logprobs", top_logprobs_); });
    for (const auto& [key, v] : body_.items())
      if (!v.is_null()) set_key(r, key, v);
    check(r);
    return r;
  }

  // The engine's messages begin with the key that they are about, where it is one.
  void check(const moebius_cpp::Request& r) const {
    try {
      serving_.engine.validate(r);
    } catch (const moebius_cpp::Error& e) {
      const std::string message = e.what(), word = message.substr(0, message.find(' '));
      throw http_error(e, body_.contains(word) ? word : "");
    }
  }

  int64_t max_tokens(const char* key, int64_t prompt_tokens) const {
    if (!value(key).is_null()) return integer(key, value(key));
    return out_.chat ? std::max<int64_t>(1, serving_.max_context - prompt_tokens) : 16;
  }

  template <class Body>
  static void set(const std::string& key, Body&& body) {
    try {
      body();
    } catch (const moebius_cpp::Error& e) {
      throw http_error(e, key);
    }
  }

  void set_key(moebius_cpp::Request& r, const std::string& key, const json& v) const {
    static const std::set<std::string> kOwn = {"model",          "stream",   "n",          "stop",
                                               "stream_options", "logprobs", "max_tokens", "include_stop_str_in_output"};
    static const std::set<std::string> kOfChat = {"messages", "max_completion_tokens", "top_logprobs"},
                                       kOfText = {"prompt", "add_special_tokens"};
    if (kOwn.count(key) || kIgnored.count(key) || (out_.chat ? kOfChat : kOfText).count(key)) return;
    if (kIntegers.count(key)) return set(key, [&] { r.set(key.c_str(), integer(key, v)); });
    if (kReals.count(key)) {
      if (!v.is_number()) bad(key, fmt::format(" is {}, must be a number", shown(v)));
      return set(key, [&] { r.set_real(key.c_str(), v.get<double>()); });
    }
    if (kLists.count(key)) return set(key, [&] { r.set_ids(key.c_str(), ids(key, v)); });
    if (key == "ignore_eos") return set(key, [&] { r.set("ignore_eos", int64_t{boolean(key, v)}); });
    if (key == "logit_bias") return set_logit_bias(r, v);
    const auto neutral = kNeutral.find(key);
    if (neutral == kNeutral.end()) bad(key, " is not supported", "unsupported");
    if (std::count(neutral->second.begin(), neutral->second.end(), v) == 0)
      bad(key, fmt::format(" = {} is not supported", shown(v)), "unsupported");
  }

  static void set_logit_bias(moebius_cpp::Request& r, const json& v) {
    if (!v.is_object()) bad("logit_bias", " must be an object of token id and bias");
    for (const auto& [token, bias] : v.items()) {
      const std::optional<int32_t> id = token_id(token);
      if (!id || !bias.is_number())
        bad("logit_bias", fmt::format(": '{}': {} is no token id with a number", token.substr(0, 40), shown(bias)));
      set("logit_bias", [&] { r.add_logit_bias(*id, bias.get<float>()); });
    }
  }

  const json& body_;
  const Serving& serving_;
  GenerateRequest out_;
  int64_t top_logprobs_ = 0;
};

}  // namespace

GenerateRequest read_generate_request(const std::string& body, bool chat, const Serving& serving) {
  try {
    return Reader(parse_strictly(body, "the body"), chat, serving).read();
  } catch (const BadInput& e) {
    throw HttpError(400, e.what());
  } catch (const moebius_cpp::Error& e) {
    throw http_error(e);
  }
}

}  // namespace moebius_examples
