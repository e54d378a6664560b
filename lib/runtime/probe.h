// The start-up probe: every rank runs a small fixed product through its kernels, and the digests must be equal, for the name of
// an instruction set promises no bits.
#pragma once

#include <cstdint>
#include <span>

#include "lib/device/device.h"

namespace moebius {

uint64_t probe_digest(Device& device, int rank);
// digests: [ranks]. Throws kUnsupported naming the first rank that differs from rank 0.
void compare_probes(std::span<const uint64_t> digests);

}  // namespace moebius
