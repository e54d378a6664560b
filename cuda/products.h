// Matrix products on tensor cores, straight from the packed weights.
//
// Every product adds along k in one order, whatever the number of rows (fragments.h), so a result's bits depend on its row alone, also where
// slices are added: as integers (ExactSum). In mode fast slices are added as floats, in any order.
#pragma once

#include "lib/device/ops.h"

namespace moebius::cuda {

void linear(const LinearArgs& args, const Lane& lane);
void norm_linear(const NormLinearArgs& args, const Lane& lane);
void exact_linear(const ExactLinearArgs& args, const Lane& lane);
void experts_gate_up(const ExpertsArgs& args, const Lane& lane);
void experts_down(const ExpertsArgs& args, const Lane& lane);

}  // namespace moebius::cuda
