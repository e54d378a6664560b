#include "examples/serve/http_error.h"

namespace moebius_examples {
namespace {

const char* type_of(int status) {
  switch (status) {
    case 401: return "authentication_error";
    case 404: return "not_found_error";
    case 409: return "conflict_error";
    case 429: return "rate_limit_error";
    case 503: return "service_unavailable_error";
    case 504: return "timeout_error";
    default: return status < 500 ? "invalid_request_error" : "server_error";
  }
}

}  // namespace

HttpError::HttpError(int status, const std::string& message, std::string param, std::string code)
    : std::runtime_error(message), status(status), param(std::move(param)), code(std::move(code)) {}

nlohmann::json HttpError::body() const {
  const auto or_null = [](const std::string& s) { return s.empty() ? nlohmann::json() : nlohmann::json(s); };
  return {{"error", {{"message", what()}, {"type", type_of(status)}, {"param", or_null(param)}, {"code", or_null(code)}}}};
}

HttpError http_error(const moebius_cpp::Error& e, const std::string& param) {
  const char* const name = moebius_status_name(e.code());
  switch (e.code()) {
    case MOEBIUS_E_QUEUE_FULL: return {429, e.what(), param, name};
    case MOEBIUS_E_CONTEXT_TOO_LONG: return {400, e.what(), param, "context_length_exceeded"};
    case MOEBIUS_E_INVALID_ARGUMENT:
    case MOEBIUS_E_UNSUPPORTED:
    case MOEBIUS_E_DOES_NOT_FIT: return {400, e.what(), param, name};
    case MOEBIUS_E_INVALID_STATE: return {503, e.what(), param, name};
    default: return {500, e.what(), param, name};
  }
}

}  // namespace moebius_examples
