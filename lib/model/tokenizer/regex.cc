#include "lib/model/tokenizer/regex.h"

#include <cstdint>
#include <new>
#include <string>

#include "lib/base/error.h"
#include "lib/model/tokenizer/regex_dialect.h"

namespace moebius::tokenizer {
namespace {

// A repeated group takes stack per repetition when just-in-time compiled: 16 MiB are some 10⁵ repetitions. Reserved
// address space, committed as it is used. The interpreter's heap gets the same order of magnitude.
constexpr size_t kJitStackBytes = size_t{16} << 20;
constexpr uint32_t kInterpreterHeapKiB = 64 << 10;

template <typename T>
Pcre2Ptr<T> own(T* object) {
  if (!object) throw std::bad_alloc();
  return Pcre2Ptr<T>(object);
}

std::string describe(int error) {
  PCRE2_UCHAR text[256];
  return pcre2_get_error_message(error, text, sizeof text) < 0 ? fmt::format("PCRE2 error {}", error)
                                                               : std::string(reinterpret_cast<const char*>(text));
}

PCRE2_SPTR units(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

}  // namespace

MatchScratch::MatchScratch()
    : data_(own(pcre2_match_data_create(1, nullptr))), context_(own(pcre2_match_context_create(nullptr))) {
  pcre2_set_heap_limit(context_.get(), kInterpreterHeapKiB);
}

void MatchScratch::enlarge_stack() {
  stack_ = own(pcre2_jit_stack_create(64 << 10, kJitStackBytes, nullptr));
  pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
}

Regex::Regex(std::string_view pattern, bool literal) {
  const std::string source = literal ? std::string(pattern) : to_pcre2_dialect(pattern);
  const uint32_t options =
      literal ? PCRE2_UTF | PCRE2_LITERAL : PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
  const auto context = own(pcre2_compile_context_create(nullptr));
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  code_.reset(pcre2_compile(units(source), source.size(), options, &error, &offset, context.get()));
  if (!code_)
    fail(Code::kUnsupported, "pattern '{}' does not compile: {} at byte {} of '{}'", pattern, describe(error), offset,
         source);
  error = pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
  const bool interpret =
      error == PCRE2_ERROR_JIT_BADOPTION || error == PCRE2_ERROR_NOMEMORY;  // no JIT here, or no executable memory
  if (error != 0 && !interpret) fail(Code::kUnsupported, "pattern '{}' does not compile: {}", pattern, describe(error));
}

std::optional<TextRange> Regex::search(std::string_view text, size_t from, MatchScratch& scratch) const {
  const auto match = [&] {
    return pcre2_match(code_.get(), units(text), text.size(), from, PCRE2_NO_UTF_CHECK, scratch.data_.get(),
                       scratch.context_.get());
  };
  int result = match();
  if (result == PCRE2_ERROR_JIT_STACKLIMIT && !scratch.stack_) {
    scratch.enlarge_stack();
    result = match();
  }
  if (result == PCRE2_ERROR_NOMATCH) return std::nullopt;
  if (result < 0) {
    fail(Code::kInvalidArgument, "the tokenizer's pattern cannot be matched from byte {} of {}: {}", from, text.size(),
         describe(result));
  }
  const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(scratch.data_.get());
  return TextRange{ends[0], ends[1]};
}

}  // namespace moebius::tokenizer
