#include "lib/runtime/step_costs.h"

#include <algorithm>
#include <cmath>

namespace moebius {
namespace {

// Widths of the linear terms: their coefficients are of the order of a step then.
constexpr double kPromptRows = 256, kKvTokens = 16384, kAttended = 131072;

// A curve's error grows by 1 % a minute that it is not seen, to 30 %: beyond it a machine is another machine, which exploration finds.
constexpr double kDriftPerSecond = 0.01 / 60, kMostDrift = 0.3;
// Process noise of one sample. The scale's, 0.5 %, remembers some 20 samples of 10 % noise; each other term's, 0.05 % of a step, lets shapes change.
constexpr double kScaleNoise = 0.005, kTermNoise = 5e-4;
// A step that is off by more than two standard deviations is taken to be so noisy that it is off by two: the further off, the less it
// teaches. Clipping there leaves 1/1.3 of a normal variance.
constexpr double kClip = 2, kClippedVariance = 1.3, kNoiseRate = 0.05, kFirstNoise = 0.1 * 0.1, kLeastNoise = 0.01 * 0.01;
// The mean of some twenty innovations is off by 0.8 standard deviations, five of its own: the machine has changed. Its scale is open
// again, as far as the last innovation goes.
constexpr double kBiasRate = 0.05, kChange = 0.8, kReopened = 0.5, kMostReopened = 20;
constexpr double kLeastSeconds = 1e-7;  // of a step: a scale of nothing could not grow
constexpr double kRestored = 0.1;  // what a machine may have changed by since the curve was kept

constexpr double knot(int i) { return i == 0 ? 0 : static_cast<double>(int64_t{1} << (i - 1)); }

// Until a switch was seen: 5 GB/s, and a millisecond for planning and fences.
constexpr double kNominalRate = 5e9, kNominalPlanning = 1e-3;
double nominal(int64_t bytes) { return kNominalPlanning + static_cast<double>(bytes) / kNominalRate; }

}  // namespace

StepLoad& StepLoad::operator+=(const StepLoad& o) {
  rows += o.rows;
  prompt_rows += o.prompt_rows;
  kv_tokens += o.kv_tokens;
  attended += o.attended;
  return *this;
}

StepLoads StepLoads::of(std::span<const StepLoad> homes) {
  StepLoads out;
  for (const StepLoad& home : homes) {
    out.tp += home;
    out.ep.prompt_rows = std::max(out.ep.prompt_rows, home.prompt_rows);
    out.ep.kv_tokens = std::max(out.ep.kv_tokens, home.kv_tokens);
    out.ep.attended = std::max(out.ep.attended, home.attended);
  }
  out.ep.rows = out.tp.rows;
  return out;
}

StepLoads StepLoads::decode(double rows, double kv_tokens, int homes) {
  const double fullest = rows > 0 ? kv_tokens * std::ceil(rows / homes) / rows : 0;
  return {StepLoad::decode(rows, kv_tokens), StepLoad::decode(rows, fullest)};
}

StepCurve::Terms StepCurve::terms_of(const StepLoad& load) {
  Terms x{};
  x[0] = 1;
  for (int i = 0; i + 1 < kKnots; ++i) {
    const double into = std::max(0.0, (load.rows - knot(i)) / (knot(i + 1) - knot(i)));
    x[1 + i] = i + 2 == kKnots ? into : std::min(1.0, into);
  }
  x[kKnots] = load.prompt_rows / kPromptRows;
  x[kKnots + 1] = load.kv_tokens / kKvTokens;
  x[kKnots + 2] = load.attended / kAttended;
  return x;
}

// Each term alone could be what the first step's time comes from.
void StepCurve::start(const StepLoad& load, double seconds) {
  unit_ = seconds;
  noise_ = kFirstNoise;
  mean_ = {};
  mean_[0] = seconds;
  const auto variance_of = [&](double width, double had) { return std::pow(seconds * std::max(0.5, 0.5 * width / (1 + had)), 2); };
  prior_[0] = seconds * seconds;
  for (int i = 0; i + 1 < kKnots; ++i) prior_[1 + i] = variance_of(knot(i + 1) - knot(i), load.rows);
  prior_[kKnots] = variance_of(kPromptRows, load.rows);
  prior_[kKnots + 1] = variance_of(kKvTokens, load.kv_tokens);
  prior_[kKnots + 2] = variance_of(kAttended, load.attended);
  covariance_ = {};
  for (int i = 0; i < kTerms; ++i) covariance_[i][i] = prior_[i];
}

double StepCurve::variance(const Terms& x) const {
  double sum = 0;
  for (int i = 0; i < kTerms; ++i)
    for (int j = 0; x[i] != 0 && j < kTerms; ++j) sum += x[i] * covariance_[i][j] * x[j];
  return std::max(0.0, sum);
}

void StepCurve::scale_is_open(double relative) {
  for (int i = 0; i < kTerms; ++i)
    for (int j = 0; j < kTerms; ++j) covariance_[i][j] += relative * relative * (mean_[i] * mean_[j]);  // symmetric to the bit
}

namespace {
double drift(double age_s) { return std::clamp(kDriftPerSecond * age_s, 0.0, kMostDrift); }
template <class T>
double dot(const T& a, const T& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
}  // namespace

Estimate StepCurve::predict(const StepLoad& load, double now_s) const {
  if (!seen()) return {};
  const Terms x = terms_of(load);
  const double seconds = std::max(dot(mean_, x), kLeastSeconds);
  return {seconds, std::hypot(std::sqrt(variance(x)) / seconds, drift(now_s - last_s_))};
}

// Terms below their least are put there, and what goes with them after them: the most likely point of the edge.
void StepCurve::raise_to_least() {
  constexpr int kSweeps = 4;
  const auto least = [](int i) { return i == 0 ? kLeastSeconds : 0.0; };
  for (int sweep = 0; sweep < kSweeps; ++sweep)
    for (int i = 0; i < kTerms; ++i) {
      const double short_of = least(i) - mean_[i];
      if (short_of <= 0 || covariance_[i][i] <= 0) continue;
      for (int j = 0; j < kTerms; ++j) mean_[j] += short_of * (covariance_[i][j] / covariance_[i][i]);
    }
  for (int i = 0; i < kTerms; ++i) mean_[i] = std::max(least(i), mean_[i]);
}

void StepCurve::learn(const StepLoad& load, double seconds, double now_s) {
  if (!(seconds > 0)) return;
  if (!seen()) start(load, seconds);
  else scale_is_open(std::hypot(kScaleNoise, drift(now_s - last_s_)));
  last_s_ = now_s;
  const Terms x = terms_of(load);
  const double expected = std::max(dot(mean_, x), kLeastSeconds), opened = std::pow(kTermNoise * expected, 2);
  for (int i = 0; i < kTerms; ++i) covariance_[i][i] = std::max(covariance_[i][i], std::min(prior_[i], covariance_[i][i] + opened));
  const double unknown = variance(x), usual = unknown + noise_ * expected * expected;
  const double innovation = seconds - expected, clipped = std::clamp(innovation, -kClip * std::sqrt(usual), kClip * std::sqrt(usual));
  noise_ += kNoiseRate * (std::max(0.0, kClippedVariance * clipped * clipped - unknown) / (expected * expected) - noise_);
  noise_ = std::max(noise_, kLeastNoise);
  bias_ += kBiasRate * (clipped / std::sqrt(usual) - bias_);
  if (std::fabs(bias_) >= kChange) {
    scale_is_open(std::clamp(std::fabs(innovation) / expected, kReopened, kMostReopened));
    bias_ = 0;
    return;
  }

  // What is far off is noise (kClip), and an estimate halves at most: no step takes no time.
  const double total = std::max({usual, std::pow(innovation / kClip, 2), unknown * -innovation / (0.5 * expected)});
  Terms gain;  // not yet divided by `total`
  for (int i = 0; i < kTerms; ++i) gain[i] = dot(covariance_[i], x);
  for (int i = 0; i < kTerms; ++i) mean_[i] += gain[i] * innovation / total;
  for (int i = 0; i < kTerms; ++i)
    for (int j = 0; j < kTerms; ++j) covariance_[i][j] -= gain[i] * gain[j] / total;
  raise_to_least();
}

std::array<double, StepCurve::kState> StepCurve::state() const {
  std::array<double, kState> out{};
  auto at = out.begin();
  *at++ = unit_;
  *at++ = noise_;
  at = std::copy(mean_.begin(), mean_.end(), at);
  for (const Terms& row : covariance_) at = std::copy(row.begin(), row.end(), at);
  return out;
}

bool StepCurve::restore(const std::array<double, kState>& state, double now_s) {
  for (double v : state)
    if (!std::isfinite(v)) return false;
  if (!(state[0] > 0) || !(state[1] >= kLeastNoise)) return false;
  StepCurve made;
  made.start({}, state[0]);
  made.noise_ = state[1];
  const double* at = state.data() + 2;
  for (double& m : made.mean_) {
    m = *at++;
    if (m < 0) return false;
  }
  for (Terms& row : made.covariance_)
    for (double& v : row) v = *at++;
  for (int i = 0; i < kTerms; ++i) {
    made.prior_[i] = std::max(made.prior_[i], made.covariance_[i][i]);
    for (int j = 0; j < kTerms; ++j)  // as a covariance is, but for rounding
      if (made.covariance_[i][i] < -1e-9 * state[0] * state[0] || made.covariance_[i][j] != made.covariance_[j][i]) return false;
  }
  made.scale_is_open(kRestored);
  made.last_s_ = now_s;
  *this = made;
  return true;
}

void CostModel::on_step_under_way(Layout to, const StepLoads& loads, double seconds, double now_s) {
  const Estimate there = step(to, loads, now_s);
  if (there.known()) delay_s_ += seconds - there.seconds;
}

// The mean of what was believed and what was seen, in logarithms: half of it is forgotten with every switch.
void CostModel::on_switch(Layout to, int64_t bytes, double seconds) {
  constexpr double kLeast = 1e-3, kMost = 1e3;
  const double seen = std::clamp((seconds + std::max(0.0, delay_s_)) / nominal(bytes), kLeast, kMost);
  double& correction = correction_[static_cast<size_t>(to)];
  correction = correction == 0 ? seen : std::sqrt(correction * seen);
  delay_s_ = 0;
}

// A direction that was not seen is taken to be like the other.
double CostModel::price(Layout to, int64_t bytes) const {
  const double own = of(correction_, to), back = of(correction_, other(to));
  return nominal(bytes) * (own > 0 ? own : back > 0 ? back : 1);
}

}  // namespace moebius
