// Milliseconds that a host names, as a duration that can be added to any clock.
#pragma once

#include <algorithm>
#include <chrono>

namespace moebius {

// NaN and negative values wait for nothing; what is longer than ten years (infinity too) is ten years: a conversion beyond the
// range of nanoseconds in 64 bits is undefined.
inline std::chrono::nanoseconds clamped_ms(double ms) {
  constexpr double kTenYears = 10 * 365.25 * 24 * 3600 * 1e3;
  return std::chrono::nanoseconds(ms > 0 ? static_cast<int64_t>(std::min(ms, kTenYears) * 1e6) : 0);
}

}  // namespace moebius
