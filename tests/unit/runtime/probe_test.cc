#include "lib/runtime/probe.h"

#include "lib/base/error.h"
#include "lib/cpu/cpu_device.h"
#include "lib/cpu/cpu_ops.h"
#include "tests/catch.h"

namespace moebius {

TEST_CASE("the probe's digest repeats, and the last bit of one product changes it") {
  static const Ops& real = cpu_ops(best_isa());
  Ops other = real;
  other.linear = [](const LinearArgs& args, const Lane& lane) {
    real.linear(args, lane);
    reinterpret_cast<uint32_t&>(args.parts[0].y[77]) ^= 1;
  };
  const auto digest = [](const Ops& ops) {
    CpuDevice device(1, ops);
    return probe_digest(device, 0);
  };
  CHECK(digest(real) == digest(real));
  CHECK(digest(real) != digest(other));
  for (const Isa isa : available_isas()) CHECK(digest(cpu_ops(isa)) == digest(cpu_ops(isa)));
}

TEST_CASE("ranks whose probes differ are named") {
  const uint64_t same[] = {5, 5, 5}, differs[] = {5, 5, 6};
  compare_probes(same);
  CHECK_THROWS_WITH(compare_probes(differs), Catch::Contains("rank 2") && Catch::Contains("0000000000000006"));
}

}  // namespace moebius
