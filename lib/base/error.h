// How an operation ends when it cannot succeed: one exception type with a code, a message and where it was raised.
// Expected outcomes (full, miss, cancelled) are returned values instead; MOEBIUS_ASSERT is for our own bugs only.
#pragma once

#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "lib/base/code.h"

namespace moebius {

// A file may name things with NUL bytes; the text of an error crosses C, which would end it there.
inline std::string without_nul(std::string text) {
  for (size_t at = 0; (at = text.find('\0', at)) != std::string::npos; at += 2) text.replace(at, 1, "\\0");
  return text;
}

class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message, std::source_location where = std::source_location::current())
      : std::runtime_error(without_nul(message)), code_(code), where_(where) {}
  Code code() const { return code_; }
  const std::source_location& where() const { return where_; }

 private:
  Code code_;
  std::source_location where_;
};

// Raises Error with a formatted message. The message states the fact with its numbers: "expert 71 out of range, model has 64".
template <typename... Args>
[[noreturn]] void fail(Code code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

// Inside a handler: calls f with what the exception says of itself. Allocates nothing.
template <class F>
void with_reason(const F& f) {
  try {
    throw;
  } catch (const std::exception& e) {
    f(std::string_view(e.what()));
  } catch (...) {
    f(std::string_view("an exception of unknown type"));
  }
}

[[noreturn]] inline void assertion_failed(const char* condition, std::source_location where) {
  throw Error(Code::kInternal, fmt::format("internal error: {} does not hold ({}:{})", condition, where.file_name(), where.line()), where);
}

}  // namespace moebius

// An invariant of ours; never reachable from input. Kept in release builds: it sits outside inner loops.
#define MOEBIUS_ASSERT(condition) \
  ((condition) ? (void)0 : ::moebius::assertion_failed(#condition, std::source_location::current()))
