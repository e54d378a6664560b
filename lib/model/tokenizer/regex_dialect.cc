#include "lib/model/tokenizer/regex_dialect.h"

#include <array>
#include <cctype>

#include "lib/base/error.h"
#include "lib/model/tokenizer/unicode.h"

namespace moebius::tokenizer {
namespace {

// The property White_Space and its complement, as the inside of a character class.
constexpr std::string_view kSpace =
    R"(\x{9}-\x{D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
constexpr std::string_view kNotSpace =
    R"(\x{0}-\x{8}\x{E}-\x{1F}\x{21}-\x{84}\x{86}-\x{9F}\x{A1}-\x{167F}\x{1681}-\x{1FFF}\x{200B}-\x{2027}\x{202A}-\x{202E})"
    R"(\x{2030}-\x{205E}\x{2060}-\x{2FFF}\x{3001}-\x{10FFFF})";

// What may follow "(?" and means the same to both.
constexpr std::array<std::string_view, 8> kGroups = {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i:", "(?-i:"};

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_alnum(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 && static_cast<unsigned char>(c) < 0x80;
}

class Translator {
 public:
  explicit Translator(std::string_view pattern) : pattern_(pattern) {}

  std::string run() {
    caseless_ = pattern_.find("(?i") != pattern_.npos;
    if (caseless_) check_caseless();
    if (rest().starts_with("(?i)")) copy(4);
    while (at_ < pattern_.size()) {
      if (peek() == '\\') {
        escape();
      } else if (in_class_) {
        inside_class();
      } else {
        outside_class();
      }
    }
    return std::move(out_);
  }

 private:
  std::string_view rest() const { return pattern_.substr(at_); }
  char peek(size_t ahead = 0) const { return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : '\0'; }
  void copy(size_t length) {
    out_.append(rest().substr(0, length));
    at_ += length;
  }
  void replace(size_t length, std::string_view by) {
    out_.append(by);
    at_ += length;
  }
  [[noreturn]] void refuse(std::string_view what) const {
    fail(Code::kUnsupported, "pattern '{}': {} at byte {} is not supported", pattern_, what, at_);
  }

  // Without regard to case, Oniguruma also takes ß for ss, ﬁ for fi and the like; PCRE2 takes single characters only.
  // Looks at the whole pattern, whichever part of it the option governs.
  void check_caseless() {
    for (at_ = 0; at_ < pattern_.size(); at_ += code_point_at(pattern_, at_).length) {
      const char32_t c = code_point_at(pattern_, at_).value;
      const bool may_fold_to_several =
          (c >= 0x80 && c < 0x590) || (c >= 0x1E00 && c < 0x2000) || (c >= 0xFB00 && c < 0xFB18);
      if (may_fold_to_several) refuse("a letter that folds to several, with (?i),");
      for (const std::string_view pair : {"ff", "fi", "fl", "ss", "st"}) {
        const bool equal = (peek() | 0x20) == pair[0] && (peek(1) | 0x20) == pair[1];
        if (equal) refuse("a pair of letters that folds to one, with (?i),");
      }
    }
    at_ = 0;
  }

  void outside_class() {
    if (peek() == '[') {
      open_class();
    } else if (peek() == '(') {
      group();
    } else if (peek() == '{') {
      interval();
    } else {
      copy(1);
    }
  }

  void open_class() {
    const size_t length = peek(1) == '^' ? 2 : 1;
    if (peek(length) == ']') refuse("a class that begins with ]");
    copy(length);
    in_class_ = true;
  }

  void inside_class() {
    if (peek() == '[') refuse("a class inside a class");
    if (rest().starts_with("&&")) refuse("the intersection &&");
    in_class_ = peek() != ']';
    copy(1);
  }

  void group() {
    if (peek(1) == '*') refuse("a verb (*…)");
    if (peek(1) != '?') return copy(1);
    for (const std::string_view group : kGroups) {
      if (rest().starts_with(group)) return copy(group.size());
    }
    refuse("this kind of group");
  }

  // {n}, {n,}, {n,m}; anything else is literal to both, except {,n} which is an interval to Oniguruma only.
  void interval() {
    if (peek(1) == ',') refuse("an interval without lower bound");
    size_t length = 1;
    while (is_digit(peek(length)) || peek(length) == ',') ++length;
    if (peek(length) != '}') return copy(1);
    copy(length + 1);
    if (peek() == '+') refuse("+ after an interval (possessive to one engine, a repetition to the other)");
  }

  void escape() {
    const char c = peek(1);
    if (c == '\0') refuse("a single backslash");
    if (c == 's' || c == 'S') return space(c == 's' ? kSpace : kNotSpace);
    if (c == 'p' || c == 'P') return property();
    if (c == 'x' || c == 'u') return code_point(c);
    const bool same_class_or_control = std::string_view("dDnrtfae").find(c) != std::string_view::npos;
    const bool same_anchor = !in_class_ && (c == 'A' || c == 'z');
    if (is_alnum(c) && !same_class_or_control && !same_anchor) refuse(fmt::format("\\{}", c));
    copy(2);
  }

  void space(std::string_view ranges) {
    if (!in_class_) out_.push_back('[');
    replace(2, ranges);
    if (!in_class_) out_.push_back(']');
  }

  // General categories have names of one or two letters that begin with the class: L, Lu, N, Zs, …
  void property() {
    const size_t close = rest().find('}');
    if (peek(2) != '{' || close == std::string_view::npos) refuse("a property without braces");
    std::string_view name = rest().substr(3, close - 3);
    const bool negated = name.starts_with('^');
    if (negated) name.remove_prefix(1);
    const bool is_category =
        !name.empty() && name.size() <= 2 && std::string_view("LMNPSZClmnpszc").find(name[0]) != name.npos;
    for (const char c : name) {
      if (!is_alnum(c) && c != '_') refuse("this property name");
    }
    replace(close + 1, fmt::format("\\{}{{{}{}{}}}", peek(1), negated ? "^" : "", is_category ? "" : "sc:", name));
  }

  // \x{H…}, \xHH below 0x80 (above, it is a byte to Oniguruma and a character to PCRE2), \uHHHH.
  void code_point(char kind) {
    const bool braces = kind == 'x' && peek(2) == '{';
    const size_t begin = braces ? 3 : 2;
    size_t end = begin;
    const size_t max_digits = braces ? 6 : kind == 'x' ? 2 : 4;
    while (end - begin < max_digits && std::isxdigit(static_cast<unsigned char>(peek(end)))) ++end;
    const std::string digits(rest().substr(begin, end - begin));
    const bool complete = braces ? !digits.empty() && peek(end) == '}' : digits.size() == max_digits;
    const bool is_ascii = digits.size() <= 2 && std::stoul("0" + digits, nullptr, 16) < 0x80;
    if (!complete || (!is_ascii && ((kind == 'x' && !braces) || caseless_))) refuse("this character number");
    replace(end + (braces ? 1 : 0), fmt::format("\\x{{{}}}", digits));
  }

  std::string_view pattern_;
  size_t at_ = 0;
  bool in_class_ = false;
  bool caseless_ = false;  // somewhere in the pattern
  std::string out_;
};

}  // namespace

std::string to_pcre2_dialect(std::string_view pattern) { return Translator(pattern).run(); }

}  // namespace moebius::tokenizer
