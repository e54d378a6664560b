#include "lib/cpu/cpu_ops.h"

#include <array>

#include "lib/base/error.h"

namespace moebius {

namespace avx512bf16 { const Ops& ops(); }
namespace avx512 { const Ops& ops(); }
namespace avx2 { const Ops& ops(); }
namespace portable { const Ops& ops(); }

namespace {

constexpr std::array<Isa, 4> kAll = {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
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
    case Isa::kAvx512Bf16: return avx512() && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512: return avx512();
    case Isa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    default: return true;
  }
}

Isa best_isa() {
  for (Isa isa : kAll)
    if (isa_available(isa)) return isa;
  return Isa::kPortable;
}

const Ops& cpu_ops(Isa isa) {
  MOEBIUS_ASSERT(isa_available(isa));
  switch (isa) {
#if MOEBIUS_AVX512
    case Isa::kAvx512Bf16: return avx512bf16::ops();
    case Isa::kAvx512: return avx512::ops();
#endif
    case Isa::kAvx2: return avx2::ops();
    default: return portable::ops();
  }
}

const Ops& cpu_ops(std::string_view name) {
  if (name.empty()) return cpu_ops(best_isa());
  const std::optional<Isa> isa = parse_isa(name);
  if (!isa) fail(Code::kInvalidArgument, "isa '{}' is not known; known are avx512bf16, avx512, avx2, portable", name);
  if (!isa_available(*isa)) fail(Code::kUnsupported, "isa '{}' is not here: the machine lacks what it needs, or this build leaves it out", name);
  return cpu_ops(*isa);
}

}  // namespace moebius
