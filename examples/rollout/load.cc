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

double gap(const LoadOptions& o, double now_s, std::mt19937_64& random) {
  const bool low = o.arrivals == Arrivals::kSteps && std::fmod(now_s, 2 * o.period_s) >= o.period_s;
  const double rate = (low ? o.low_rate : o.rate) / static_cast<double>(o.samples);  // of prompts
  const double variation = o.arrivals == Arrivals::kSteps ? 1 : o.variation;
  const double shape = 1 / (variation * variation);
  return std::gamma_distribution<double>(shape, 1 / (shape * rate))(random);
}

}  // namespace

Load make_load(const LoadOptions& o, int32_t vocab_size) {
  std::mt19937_64 random(o.seed);
  std::uniform_int_distribution<int32_t> token(0, vocab_size - 1);
  Load load;
  load.most_tokens = o.answer.most;
  double now_s = 0;
  for (int64_t p = 0; p < o.prompts; ++p) {
    if (o.arrivals != Arrivals::kOnce) now_s += gap(o, now_s, random);
    load.prompts.emplace_back(static_cast<size_t>(draw(o.prompt, random)));
    for (int32_t& id : load.prompts.back()) id = token(random);
    for (int64_t s = 0; s < o.samples; ++s) load.asked.push_back({now_s, p, draw(o.answer, random)});
  }
  return load;
}

}  // namespace moebius_examples
