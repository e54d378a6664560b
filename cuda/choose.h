// The next token of rows whose requests ask for nothing but temperature, min_p, top_k and top_p.
#pragma once

#include "lib/device/ops.h"

namespace moebius::cuda {

void choose_tokens(const ChooseArgs& args, const Lane& lane);

}  // namespace moebius::cuda
