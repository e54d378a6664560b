#include "lib/runtime/probe.h"

#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "lib/base/error.h"
#include "lib/tensor/packed.h"

namespace moebius {
namespace {

// Odd enough to reach every tail: three rows, two tiles and a half, k no multiple of 32.
constexpr int64_t kRows = 3, kOutputs = 40, kInputs = 70;

// bf16 numbers of some magnitudes from 2^-8 to 2^8, so that the order of a sum shows in its last bits.
std::vector<bf16> numbers(int64_t n, uint32_t seed) {
  std::vector<bf16> out;
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const auto mantissa = static_cast<float>(static_cast<int32_t>(seed >> 8 & 0xffff) - 0x8000);
    out.push_back(to_bf16(mantissa * static_cast<float>(1 << (seed >> 28)) * 0x1p-23f));
  }
  return out;
}

}  // namespace

uint64_t probe_digest(Device& device, int rank) {
  const Ops& ops = device.ops();
  const std::vector<bf16> x = numbers(kRows * kInputs, 1), w = numbers(PackedMatrix{kOutputs, kInputs}.elements(), 2);
  std::vector<float> y(kRows * kOutputs), weights(y.size());
  const auto bytes_of = [](const auto& v) { return static_cast<int64_t>(v.size() * sizeof(v[0])); };
  const DeviceBuffer scratch(device, rank, static_cast<int64_t>(ops.scratch_bytes({kRows, kInputs, 16, 1, 1})));
  const DeviceBuffer x_there(device, rank, bytes_of(x)), w_there(device, rank, bytes_of(w)), y_there(device, rank, bytes_of(y));
  device.write(rank, x_there.data(), x.data(), x_there.bytes());
  device.write(rank, w_there.data(), w.data(), w_there.bytes());
  const LinearPart part{reinterpret_cast<const bf16*>(w_there.data()), kOutputs, reinterpret_cast<float*>(y_there.data()), kOutputs};
  LinearArgs args;
  args.rows = {0, kRows};
  args.x = reinterpret_cast<const bf16*>(x_there.data());
  args.ldx = args.k = kInputs;
  args.num_parts = 1;
  args.parts = &part;
  ops.linear(args, {0, 1, scratch.data(), device.queue(rank)});
  device.read(rank, y.data(), bytes_of(y), y_there.data(), bytes_of(y), bytes_of(y), 1);
  while (!device.idle(rank)) {
  }
  uint64_t digest = XXH3_64bits(y.data(), y.size() * sizeof(float));
  if (ops.exp_sum != nullptr) {
    const float sum = ops.exp_sum(y.data(), static_cast<int64_t>(y.size()), 1.0f, 0.01f, weights.data());
    digest = XXH3_64bits_withSeed(weights.data(), weights.size() * sizeof(float), digest);
    digest = XXH3_64bits_withSeed(&sum, sizeof sum, digest);
  }
  return digest;
}

void compare_probes(std::span<const uint64_t> digests) {
  for (size_t r = 1; r < digests.size(); ++r)
    if (digests[r] != digests[0])
      fail(Code::kUnsupported, "rank {} computes other bits than rank 0: the probe's digest is {:016x}, not {:016x}", r, digests[r], digests[0]);
}

}  // namespace moebius
