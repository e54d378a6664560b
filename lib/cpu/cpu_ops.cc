#include "lib/cpu/cpu_ops.h"

#include <algorithm>
#include <array>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "lib/base/error.h"

namespace moebius {

namespace amx { const Ops& ops(); }
namespace avx512bf16 { const Ops& ops(); }
namespace avx512 { const Ops& ops(); }
namespace avx2 { const Ops& ops(); }
namespace portable { const Ops& ops(); }

namespace {

constexpr std::array kAll = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

// Matrix registers are state that a process asks its operating system for, once; all of its threads have them then.
bool matrix_registers() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // CPUID 7, EDX
    constexpr long kAskFor = 0x1023, kTileData = 18;         // arch_prctl(ARCH_REQ_XCOMP_PERM, …)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTiles) != 0 && syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx: return "amx";
    case Isa::kAvx512Bf16: return "avx512bf16";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "portable";
  }
}

std::optional<Isa> parse_isa(std::string_view name) {
  for (Isa isa : kAll)
    if (name == isa_name(isa)) return isa;
  return std::nullopt;
}

bool isa_available(Isa isa) {
  const auto avx512 = [] {
    return MOEBIUS_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  };
  switch (isa) {
    case Isa::kAmx: return isa_available(Isa::kAvx512Bf16) && matrix_registers();
    case Isa::kAvx512Bf16: return avx512() && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512: return avx512();
    case Isa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    default: return true;
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> out;
  for (const Isa isa : kAll)
    if (isa_available(isa)) out.push_back(isa);
  return out;
}

Isa best_isa() { return available_isas().front(); }

const Ops& cpu_ops(Isa isa) {
  MOEBIUS_ASSERT(isa_available(isa));
  switch (isa) {
#if MOEBIUS_AVX512
    case Isa::kAmx: return amx::ops();
    case Isa::kAvx512Bf16: return avx512bf16::ops();
    case Isa::kAvx512: return avx512::ops();
#endif
    case Isa::kAvx2: return avx2::ops();
    default: return portable::ops();
  }
}

const Ops& cpu_ops(std::string_view name, bool products) {
  if (name.empty()) return cpu_ops(*std::find_if(kAll.begin(), kAll.end(), [&](Isa isa) { return (products || isa != Isa::kAmx) && isa_available(isa); }));
  const std::optional<Isa> isa = parse_isa(name);
  if (!isa) fail(Code::kInvalidArgument, "isa '{}' is not known; known are amx, avx512bf16, avx512, avx2, portable", name);
  if (!isa_available(*isa)) fail(Code::kUnsupported, "isa '{}' is not here: the machine or its operating system lacks what it needs, or this build leaves it out", name);
  return cpu_ops(*isa);
}

}  // namespace moebius
