// What every kernel path includes first. A path is a translation unit that defines MOEBIUS_ISA (its namespace), includes one
// isa_*.h and then kernels.h, and is compiled with the flags of its instruction set. Nothing with vague linkage from the
// standard library is used inside, so that the linker cannot pick another path's copy.
#pragma once

#ifndef MOEBIUS_ISA
#error "define MOEBIUS_ISA, the namespace of this kernel path"
#endif

#include <cstdint>
#include <initializer_list>

#include "lib/base/numbers.h"
#include "lib/device/ops.h"
#include "lib/tensor/dtype.h"
#include "lib/tensor/packed.h"
#include "lib/tensor/transpose.h"

// Kernels' lambdas see registers: one that is left out of line sends them through memory.
#define MOEBIUS_INLINE_LAMBDA __attribute__((always_inline))
