// From a conversation to a prompt. No Jinja: the simple families of chat templates are recognised by their telltale pieces and written
// out here; any other has to be chosen by hand.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace moebius_examples {

struct ChatMessage {
  std::string role, content;  // role: system, user, assistant
};

// Throws HttpError(400) that names the message which is wrong.
std::vector<ChatMessage> read_messages(const nlohmann::json& messages);

class ChatTemplate {
 public:
  enum class Kind { kChatml, kMistral, kPlain };

  // What the model folder's chat_template.jinja or tokenizer_config.json has, or `forced` (chatml, mistral, plain; empty: none). Throws
  // BadInput for files that are no JSON.
  ChatTemplate(const std::string& model_dir, const std::string& forced);

  // The text of the prompt, special tokens written out. Throws HttpError(400): there is no template that is known, or the roles do not
  // fit it.
  std::string prompt(const std::vector<ChatMessage>& messages) const;
  // Whether the tokenizer puts its special tokens around the prompt: not where the template writes them itself.
  bool wants_special_tokens() const { return kind_ == Kind::kPlain; }

 private:
  std::string mistral(const std::vector<ChatMessage>& messages) const;

  std::optional<Kind> kind_;
  std::string bos_, eos_;
  std::string why_none_;
};

}  // namespace moebius_examples
