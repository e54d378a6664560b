// The table of this backend's kernels.
#pragma once

#include "lib/device/ops.h"

namespace moebius::cuda {

const Ops& ops();

}  // namespace moebius::cuda
