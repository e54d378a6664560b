// The power of two by which a layer's contributions are multiplied before they become integers (docs/numerics.md).
#pragma once

#include "lib/model/config.h"
#include "lib/model/weights.h"

namespace moebius {

// maxima: over all slices of the layer. Usually 28. See scale.cc for the rule.
int mlp_exponent(const SliceMaxima& maxima, const ModelConfig& model, int layer);
// Of the power of two that V is multiplied by before it becomes f16: the largest for which no value can leave its range.
// largest_norm: of the layer's input norm weights; largest_bias: of V's.
int value_exponent(const SliceMaxima& maxima, const ModelConfig& model, float largest_norm, float largest_bias);
int attention_exponent(const SliceMaxima& maxima, const ModelConfig& model, float largest_bias);

}  // namespace moebius
