#include "examples/rollout/load.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace moebius_examples {
namespace {

int64_t draw(const Length& length, std::mt19937_64& random) {
  std::normal_distribution<double> gauss;
  const double tokens = static_cast<double>(length.median) * std::exp(length.sigma * gauss(random));
  return static_cast<int64_t>(std::clamp(std::round(tokens), 1.0, static_cast<double>(length.most)));
}

double gap(const LoadOptions& o, std::mt19937_64& random) {
  const double shape = 1 / (o.variation * o.variation);
  return std::gamma_distribution<double>(shape, static_cast<double>(o.samples) / (shape * o.rate))(random);
}

// After now_s, of prompts: what a process of rate 1 waits is spent at the rates of the periods that it lies across.
double next_in_steps(const LoadOptions& o, double now_s, std::mt19937_64& random) {
  const double high = o.rate / static_cast<double>(o.samples), low = o.low_rate / static_cast<double>(o.samples);
  const double both = (high + low) * o.period_s;
  double wait = std::exponential_distribution<double>(1)(random);
  now_s += std::floor(wait / both) * 2 * o.period_s;
  wait = std::fmod(wait, both);
  for (auto period = static_cast<int64_t>(now_s / o.period_s);; ++period) {
    const double end_s = static_cast<double>(period + 1) * o.period_s, rate = period % 2 == 0 ? high : low;
    const double spent = rate * std::max(0.0, end_s - now_s);
    if (wait <= spent) return now_s + wait / rate;
    wait -= spent;
    now_s = end_s;
  }
}

}  // namespace

Load make_load(const LoadOptions& o, int32_t vocab_size) {
  std::mt19937_64 random(o.seed);
  std::uniform_int_distribution<int32_t> token(0, vocab_size - 1);
  Load load;
  load.most_tokens = o.answer.most;
  double now_s = 0;
  for (int64_t p = 0; p < o.prompts; ++p) {
    if (o.arrivals != Arrivals::kOnce) now_s = o.arrivals == Arrivals::kSteps ? next_in_steps(o, now_s, random) : now_s + gap(o, random);
    load.prompts.emplace_back(static_cast<size_t>(draw(o.prompt, random)));
    for (int32_t& id : load.prompts.back()) id = token(random);
    for (int64_t s = 0; s < o.samples; ++s) load.asked.push_back({now_s, p, draw(o.answer, random)});
  }
  return load;
}

}  // namespace moebius_examples
