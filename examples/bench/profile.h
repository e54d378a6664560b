// Where a step's time goes: the kernel table wrapped so that each op's time is added up over all threads.
#pragma once

#include <vector>

#include "lib/device/ops.h"

namespace moebius::bench {

struct OpTime {
  const char* name;
  double seconds;  // summed over threads
};

// A table that times `base`. One profile a process.
const Ops& profiled(const Ops& base);
void reset_profile();
std::vector<OpTime> profile();

}  // namespace moebius::bench
