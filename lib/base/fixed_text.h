// Text in place, cut to what it can hold: for messages made where nothing may be allocated.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>

namespace moebius {

// Bytes of the longest beginning of a text that has at most `most` bytes and whole UTF-8 characters.
inline size_t utf8_prefix(std::string_view text, size_t most) {
  size_t n = std::min(text.size(), most);
  while (n > 0 && n < text.size() && (static_cast<unsigned char>(text[n]) & 0xc0) == 0x80) --n;
  return n;
}

template <size_t N>
class FixedText {
 public:
  static constexpr size_t kCapacity = N;
  FixedText() = default;
  FixedText(std::string_view text) { assign(text); }
  FixedText(const char* text) { assign(text); }
  FixedText(const FixedText& other) { assign(other); }
  FixedText& operator=(const FixedText& other) {
    if (this != &other) assign(other);
    return *this;
  }

  template <typename... Args>
  static FixedText of(fmt::format_string<Args...> format, Args&&... args) {
    FixedText t;
    t.set_size(fmt::format_to_n(t.text_, N + 1, format, std::forward<Args>(args)...).size);
    return t;
  }

  bool empty() const { return size_ == 0; }
  void clear() { size_ = 0; }
  std::string_view view() const { return {text_, size_}; }
  std::string str() const { return std::string(view()); }
  operator std::string_view() const { return view(); }
  operator std::string() const { return str(); }
  friend bool operator==(const FixedText& a, std::string_view b) { return a.view() == b; }

 private:
  void assign(std::string_view text) {
    std::copy_n(text.data(), std::min(text.size(), N + 1), text_);
    set_size(text.size());
  }
  void set_size(size_t wanted) { size_ = utf8_prefix({text_, std::min(wanted, N + 1)}, N); }

  size_t size_ = 0;
  char text_[N + 1];  // one byte more than it holds: where a cut falls shows in what follows
};

}  // namespace moebius
