// Text in place, cut to what it can hold: for messages made where nothing may be allocated.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>

namespace moebius {

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
    t.set_size(fmt::format_to_n(t.text_, N, format, std::forward<Args>(args)...).size);
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
    std::copy_n(text.data(), std::min(text.size(), N), text_);
    set_size(text.size());
  }
  // A cut leaves whole UTF-8 characters.
  void set_size(size_t wanted) {
    size_ = std::min(wanted, N);
    if (wanted <= N) return;
    while (size_ > 0 && (text_[size_ - 1] & 0xC0) == 0x80) --size_;
    if (size_ > 0 && (text_[size_ - 1] & 0x80) != 0) --size_;
  }

  size_t size_ = 0;
  char text_[N];
};

}  // namespace moebius
