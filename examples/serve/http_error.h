// What a client did wrong, or what failed, as an HTTP answer of OpenAI's shape.
#pragma once

#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

#include "moebius/moebius.hpp"

namespace moebius_examples {

struct HttpError : std::runtime_error {
  HttpError(int status, const std::string& message, std::string param = "", std::string code = "");

  nlohmann::json body() const;

  int status;
  std::string param, code;  // empty: null
};

// A status of the library's; `param` is the key of the request that it is about.
HttpError http_error(const moebius_cpp::Error& error, const std::string& param = "");

}  // namespace moebius_examples
