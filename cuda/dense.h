// Products of row-major weights by cuBLASLt, for mode fast: it may add in any order. Loaded when it is asked for: from MOEBIUS_CUBLASLT_LIBRARY,
// else the toolkit's version that the module was built with, as the loader finds it.
#pragma once

#include "lib/device/module.h"

namespace moebius::cuda {

// Makes what dense_linear needs on the calling thread's device; it is kept as long as the process lives.
int32_t open_dense(ModuleStatus& status);
void dense_linear(const LinearArgs& args, const Lane& lane);
inline constexpr size_t kDenseScratch = 32 << 20;  // what NVIDIA recommends for Hopper

}  // namespace moebius::cuda
