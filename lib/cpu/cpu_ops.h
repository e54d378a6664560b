// The CPU backend's kernel tables, one for each instruction-set path, and which of them this machine can run.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "lib/device/ops.h"

namespace moebius {

// From fastest to slowest.
enum class Isa { kAmx, kAvx512Bf16, kAvx512, kAvx2, kPortable };

const char* isa_name(Isa isa);  // amx, avx512bf16, avx512, avx2, portable
std::optional<Isa> parse_isa(std::string_view name);
// The processor and the operating system have it, and this build has its kernels. Whoever asks for amx, as the two below do, makes the process
// one that uses matrix registers: its signal frames grow by 8 KiB, which the system refuses where a thread's alternate stack has no room for them.
bool isa_available(Isa isa);
std::vector<Isa> available_isas();  // from fastest to slowest; never empty
Isa best_isa();
const Ops& cpu_ops(Isa isa);  // isa must be available
// By name, the best there is for an empty one: without `products` the best that needs no matrix registers, for sampling alone. Throws Error when
// the name is not known or the machine or the build lacks what it needs.
const Ops& cpu_ops(std::string_view isa, bool products = true);

}  // namespace moebius
