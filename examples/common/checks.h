// Checks of numbers that users give. CLI11 takes for a number what is none, and the nearest 64-bit integer of a larger one.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <string>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

namespace moebius_examples {

inline CLI::Validator within(double least, double most) {
  return {[least, most](std::string& text) {
            double value = 0;
            const bool right = CLI::detail::lexical_cast(text, value) && value >= least && value <= most;
            return right ? std::string() : fmt::format("{} is not in {} - {}", text, least, most);
          },
          fmt::format("in [{} - {}]", least, most), "within"};
}

// And at most 2^60: a few of them add up in 64 bits.
inline CLI::Validator at_least(int64_t least) {
  return {[least](std::string& text) {
            double value = 0;
            const bool right = CLI::detail::lexical_cast(text, value) && value >= static_cast<double>(least);
            return right && value <= 0x1p60 ? std::string()
                                            : fmt::format("{} is not at least {}{}", text, least, right ? " and at most 2^60" : "");
          },
          fmt::format("≥ {}", least), "at least"};
}

inline CLI::Validator fits_int64() {
  return {[](std::string& text) {
            errno = 0;
            std::strtoll(text.c_str(), nullptr, 0);
            return errno == 0 ? std::string() : text + " does not fit in 64 bits";
          },
          "", "fits"};
}

}  // namespace moebius_examples
