// Where a step's time goes: the kernel table wrapped so that each op's time, and what it must read and compute, are added up.
#pragma once

#include <vector>

#include "lib/device/ops.h"

namespace moebius::bench {

struct OpProfile {
  const char* name;
  double seconds = 0;  // summed over threads
  double bytes = 0;    // weights and KV that the op reads, once however many rows use them
  double flops = 0;    // a multiply-add counts as two
};

// A table that profiles `base`. One profile a process.
const Ops& profiled(const Ops& base);
void reset_profile();
std::vector<OpProfile> profile();

}  // namespace moebius::bench
