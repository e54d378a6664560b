// The wall between C++ and C: every entry runs inside guarded(), which turns exceptions into a status and an error object.
#pragma once

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "lib/base/error.h"
#include "lib/base/fixed_text.h"
#include "moebius/moebius.h"

struct moebius_error {
  moebius_status code;
  std::string message;
};

namespace moebius::capi {

moebius_error* out_of_memory_error() noexcept;  // static: making one would need memory
moebius_status report(moebius_status code, const char* message, moebius_error** err) noexcept;

// Runs body(); 0, or the failure's code with *err set.
template <class Body>
moebius_status guarded(moebius_error** err, Body&& body) noexcept {
  try {
    body();
    return MOEBIUS_OK;
  } catch (const Error& e) {
    return report(static_cast<moebius_status>(e.code()), e.what(), err);
  } catch (const std::bad_alloc&) {
    if (err != nullptr) *err = out_of_memory_error();
    return MOEBIUS_E_OUT_OF_MEMORY;
  } catch (const std::exception& e) {
    return report(MOEBIUS_E_INTERNAL, e.what(), err);
  } catch (...) {
    return report(MOEBIUS_E_INTERNAL, "unknown error", err);
  }
}

template <class T>
T& not_null(T* pointer, const char* name) {
  if (pointer == nullptr) fail(Code::kInvalidArgument, "{} is NULL", name);
  return *pointer;
}

// A length that is no mistake: a negative one of another language is above it.
inline void check_length(const char* name, size_t length) {
  if (length > size_t{1} << 32) fail(Code::kInvalidArgument, "{} is {}, at most {} are taken", name, length, size_t{1} << 32);
}

// Bytes from one struct of a caller's array to the next.
inline void check_stride(size_t stride, size_t first_size) {
  constexpr size_t kMost = 1 << 16;
  if (stride < first_size || stride > kMost) fail(Code::kInvalidArgument, "stride is {}, must be from {} (version 0.1) to {}", stride, first_size, kMost);
}

// A caller's struct of caller_size bytes (its struct_size) may be an older, smaller version: at least first_size, what 0.1 had;
// or a newer one, if what this library does not know is 0.
template <class T>
void check_struct(const T* out, uint32_t caller_size, size_t first_size) {
  if (caller_size < first_size) fail(Code::kInvalidArgument, "struct_size is {}, version 0.1 has {}", caller_size, first_size);
  if (caller_size > sizeof(T)) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(out);
    for (size_t i = sizeof(T); i < caller_size; ++i)
      if (bytes[i] != 0) fail(Code::kUnsupported, "byte {} of the struct is set, this library knows {} bytes", i, sizeof(T));
  }
}

// Copies what the library fills in into such a struct.
template <class T>
void fill_struct(T* out, uint32_t caller_size, size_t first_size, T value) {
  check_struct(out, caller_size, first_size);
  value.struct_size = caller_size;
  std::memcpy(static_cast<void*>(out), &value, std::min<size_t>(caller_size, sizeof(T)));
}

// A fixed field of text, shortened between UTF-8 characters if need be.
template <size_t N>
void copy_text(char (&out)[N], std::string_view text) {
  const size_t n = moebius::utf8_prefix(text, N - 1);
  std::memcpy(out, text.data(), n);
  std::memset(out + n, 0, N - n);
}

// "; did you mean 'x'?" with the known name nearest to `name` by edit distance; empty where none is near.
std::string did_you_mean(std::string_view name, const std::vector<const char*>& known);

}  // namespace moebius::capi
