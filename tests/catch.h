// Catch2 2.13 (Debian 12) or 3: tests include this and keep to what both understand.
#pragma once
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <algorithm>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

// Of a long vector that differs from another its beginning and a hash are shown: Catch takes minutes to wrap all of it into lines.
template <class T>
concept Number = std::is_arithmetic_v<T> && !std::is_same_v<T, bool>;
namespace Catch {
template <Number T>
struct is_range<std::vector<T>> : std::false_type {};
template <Number T>
struct StringMaker<std::vector<T>> {
  static std::string convert(const std::vector<T>& v) {
    constexpr size_t kShown = 64;
    const std::string shown = Detail::rangeToString(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(std::min(v.size(), kShown)));
    if (v.size() <= kShown) return shown;
    const std::string_view bytes(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T));
    return shown + " and so on: " + std::to_string(v.size()) + ", hash " + std::to_string(std::hash<std::string_view>{}(bytes));
  }
};
}  // namespace Catch

// Sanitizers make a test 10 to 50 times slower: long sweeps are shorter there.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
