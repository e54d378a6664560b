// The engine's clock, and milliseconds that a host names.
#pragma once

#include <algorithm>
#include <chrono>

namespace moebius {

using Clock = std::chrono::steady_clock;

inline double seconds_between(Clock::time_point a, Clock::time_point b) { return std::chrono::duration<double>(b - a).count(); }
inline double seconds_since(Clock::time_point t) { return seconds_between(t, Clock::now()); }
inline double clock_seconds() { return seconds_since({}); }

// As a duration that can be added to any clock.
// NaN and negative values wait for nothing; what is longer than ten years (infinity too) is ten years: a conversion beyond the
// range of nanoseconds in 64 bits is undefined.
inline std::chrono::nanoseconds clamped_ms(double ms) {
  constexpr double kTenYears = 10 * 365.25 * 24 * 3600 * 1e3;
  return std::chrono::nanoseconds(ms > 0 ? static_cast<int64_t>(std::min(ms, kTenYears) * 1e6) : 0);
}

}  // namespace moebius
