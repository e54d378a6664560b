#include "examples/serve/chat.h"

#include <filesystem>
#include <fstream>
#include <sstream>

#include <fmt/format.h>

#include "examples/common/options.h"
#include "examples/common/strict_json.h"
#include "examples/serve/http_error.h"

namespace moebius_examples {
namespace {

using nlohmann::json;

std::optional<std::string> contents(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  if (!in) return std::nullopt;
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

// A token is given as text or as an object of its content and flags.
std::string token_text(const json& config, const char* key) {
  if (!config.contains(key)) return {};
  const json& t = config[key];
  if (t.is_object() && t.contains("content") && t["content"].is_string()) return t["content"];
  return t.is_string() ? t.get<std::string>() : std::string();
}

// A template is one text, or a list of named ones.
std::string template_text(const json& config) {
  if (!config.contains("chat_template")) return {};
  const json& t = config["chat_template"];
  if (t.is_string()) return t;
  if (t.is_array())
    for (const json& named : t)
      if (named.is_object() && named.value("name", json()) == "default" && named.value("template", json()).is_string())
        return named["template"];
  return {};
}

std::string content_of(const json& content, const std::string& where) {
  if (content.is_string()) return content;
  if (!content.is_array()) throw HttpError(400, where + ".content must be a string, or a list of parts of type text", "messages");
  std::string text;
  for (const json& part : content) {
    if (!part.is_object() || part.value("type", json()) != "text" || !part.value("text", json()).is_string())
      throw HttpError(400, where + ".content: only parts of type text are supported", "messages");
    text += part["text"].get<std::string>();
  }
  return text;
}

}  // namespace

std::vector<ChatMessage> read_messages(const json& messages) {
  if (!messages.is_array() || messages.empty()) throw HttpError(400, "messages must be a list of at least one message", "messages");
  std::vector<ChatMessage> out;
  for (size_t i = 0; i < messages.size(); ++i) {
    const json& m = messages[i];
    const std::string where = fmt::format("messages[{}]", i);
    if (!m.is_object() || !m.value("role", json()).is_string()) throw HttpError(400, where + " must be an object with a role", "messages");
    for (const auto& [key, value] : m.items())
      if (key != "role" && key != "content" && !value.is_null())
        throw HttpError(400, fmt::format("{}.{} is not supported", where, key), "messages", "unsupported");
    std::string role = m["role"];
    if (role == "developer") role = "system";
    if (role != "system" && role != "user" && role != "assistant")
      throw HttpError(400, fmt::format("{}.role is '{}', must be system, developer, user or assistant", where, role), "messages");
    out.push_back({role, content_of(m.value("content", json()), where)});
  }
  return out;
}

ChatTemplate::ChatTemplate(const std::string& model_dir, const std::string& forced) {
  const std::filesystem::path dir(model_dir), config_file = dir / "tokenizer_config.json";
  json config = json::object();
  if (const auto text = contents(config_file)) config = parse_strictly(*text, config_file.string());
  bos_ = token_text(config, "bos_token");
  eos_ = token_text(config, "eos_token");
  const std::string text = contents(dir / "chat_template.jinja").value_or(template_text(config));
  const auto has = [&](const char* piece) { return text.find(piece) != std::string::npos; };
  if (forced == "chatml" || (forced.empty() && has("<|im_start|>")))
    kind_ = Kind::kChatml;
  else if (forced == "mistral" || (forced.empty() && has("[INST]")))
    kind_ = Kind::kMistral;
  else if (forced == "plain")
    kind_ = Kind::kPlain;
  why_none_ = fmt::format("the model has {} chat template{}; start the server with --chat-template chatml, mistral or plain to choose one",
                          text.empty() ? "no" : "a", text.empty() ? "" : " that this server does not know");
}

std::string ChatTemplate::prompt(const std::vector<ChatMessage>& messages) const {
  if (!kind_) throw HttpError(400, why_none_, "messages", "no_chat_template");
  if (kind_ == Kind::kMistral) return mistral(messages);
  std::string text;
  for (const ChatMessage& m : messages)
    text += kind_ == Kind::kChatml ? fmt::format("<|im_start|>{}\n{}<|im_end|>\n", m.role, m.content)
                                   : fmt::format("{}: {}\n", m.role, m.content);
  return text + (kind_ == Kind::kChatml ? "<|im_start|>assistant\n" : "assistant:");
}

// Turns of user and assistant; what the system says stands before what the user says next.
std::string ChatTemplate::mistral(const std::vector<ChatMessage>& messages) const {
  std::string text = bos_, system;
  bool user_is_next = true;
  for (const ChatMessage& m : messages) {
    if (m.role == "system") {
      system += m.content + "\n\n";
      continue;
    }
    if ((m.role == "user") != user_is_next)
      throw HttpError(400, "this model's chat template wants user and assistant in turn, the user first", "messages");
    text += user_is_next ? fmt::format(" [INST] {}{} [/INST]", system, m.content) : fmt::format(" {}{}", m.content, eos_);
    if (user_is_next) system.clear();
    user_is_next = !user_is_next;
  }
  if (user_is_next) throw HttpError(400, "the last message must be the user's", "messages");
  return text;
}

}  // namespace moebius_examples
