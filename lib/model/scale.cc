// How the exponent is chosen. A contribution is down · act, act = silu(gate·x) · (up·x), x normed: |x| about 1 an element.
// From the largest weights of each role a typical size is estimated, up to the spread of the weights (trained ones have a
// largest value some 2^2–2^5 above their deviation):
//     |gate·x| ≈ max|gate|·√H / 8,   |act| ≈ min(1, |gate·x|)·|up·x|,   |c| ≈ max|down|·|act|·√(neurons of a cut) / 8
// With 2^28 the step is 2^−28 ≈ 4·10^−9; a contribution of 2^−8 is still kept to 2^−20, beyond bf16's and near float's
// precision. So 28 serves every layer whose estimate lies in [2^−8, 2^16]; outside, the exponent moves by what is missing.
// Range: |c·scale| < 2^62 ÷ addends, with 28 and 1,024 addends |c| < 2^24.
#include "lib/model/scale.h"

#include <algorithm>
#include <cmath>

namespace moebius {
namespace {

constexpr int kUsual = 28, kLeast = 0, kMost = 60;
constexpr double kSmallest = -8, kLargest = 16;  // log2 of the estimates that the usual scale serves

int exponent_for(double estimate) {
  if (!(estimate > 0) || !std::isfinite(estimate)) return kUsual;  // all zero, or NaN that will surface in the rows
  const double size = std::log2(estimate);
  int exponent = kUsual;
  if (size < kSmallest) exponent += static_cast<int>(std::ceil(kSmallest - size));
  if (size > kLargest) exponent -= static_cast<int>(std::ceil(size - kLargest));
  return std::clamp(exponent, kLeast, kMost);
}

}  // namespace

int mlp_exponent(const SliceMaxima& maxima, const ModelConfig& model, int layer) {
  const double width = std::sqrt(static_cast<double>(model.shape.hidden)) / 8;
  const double gate = maxima.gate * width, up = maxima.up * width;
  const double neurons = model.shape.mlps[static_cast<size_t>(layer)].intermediate / 8.0;
  return exponent_for(maxima.down * std::min(1.0, gate) * up * std::sqrt(neurons) / 8);
}

int attention_exponent(const SliceMaxima& maxima, const ModelConfig& model, float largest_bias) {
  // The attention output is an average of values: v·x and its bias of the same size; O sums a group's heads.
  const double width = std::sqrt(static_cast<double>(model.shape.hidden)) / 8;
  return exponent_for(maxima.down * (maxima.up * width + largest_bias) * std::sqrt(static_cast<double>(model.shape.head_dim)) / 8);
}

// A normed row x̂ has Σ x̂² ≤ H, so Σ|x̂| ≤ H, and |v| ≤ max|w|·max|norm|·H + max|bias|: a bound, not an estimate. Below 2^15 it leaves f16
// (65,504) a factor of two for rounding.
int value_exponent(const SliceMaxima& maxima, const ModelConfig& model, float largest_norm, float largest_bias) {
  const double bound = double{maxima.up} * largest_norm * static_cast<double>(model.shape.hidden) + largest_bias;
  if (!(bound > 0) || !std::isfinite(bound)) return 0;
  return std::clamp(14 - std::ilogb(bound), -126, 126);
}

}  // namespace moebius
