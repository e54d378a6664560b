// The power of two by which a layer's contributions are multiplied before they become integers (docs/numerics.md).
#pragma once

#include "lib/model/config.h"
#include "lib/model/weights.h"

namespace moebius {

// maxima: over all slices of the layer. Usually 28. See scale.cc for the rule.
int mlp_exponent(const SliceMaxima& maxima, const ModelConfig& model, int layer);
int attention_exponent(const SliceMaxima& maxima, const ModelConfig& model, int layer);

}  // namespace moebius
