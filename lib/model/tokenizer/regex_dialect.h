// Patterns in tokenizer.json are written for Oniguruma (Ruby's dialect); we run PCRE2. The two read most patterns
// alike. What they read differently is rewritten here, or refused: never run with another meaning.
//
// Rewritten: \s and \S to explicit ranges (PCRE2 counts U+180E as white space, Unicode since 6.3 and Oniguruma do not);
// scripts \p{Han} to \p{sc:Han} (PCRE2 would take script extensions); \uHHHH to \x{HHHH}.
// Refused: \w \b \h \v \R \X \K \G, back-references and numeric escapes, nested classes and &&, {,n}, {n,m}+,
// named groups, verbs, inline options other than i in a group or at the very start, and with i what folds to another
// number of letters (ß, ss).
#pragma once

#include <string>
#include <string_view>

namespace moebius::tokenizer {

// `pattern` is well-formed UTF-8. The result is meant for PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE with newline LF.
// Raises Error(kUnsupported) with the offset of what is refused.
std::string to_pcre2_dialect(std::string_view pattern);

}  // namespace moebius::tokenizer
