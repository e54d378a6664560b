// What the programs say of repeated measurements.
#pragma once

#include <algorithm>
#include <vector>

namespace moebius_examples {

// p from 0 to 1; 0 of nothing.
inline double percentile(std::vector<double> x, double p) {
  if (x.empty()) return 0;
  std::sort(x.begin(), x.end());
  return x[std::min(x.size() - 1, static_cast<size_t>(p * static_cast<double>(x.size())))];
}

// The mean of the two in the middle of an even number; 0 of nothing.
inline double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  const size_t n = x.size();
  return n == 0 ? 0 : n % 2 == 1 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

}  // namespace moebius_examples
