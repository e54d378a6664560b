#include "cuda/reshard.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/ptx.h"
#include "lib/base/numbers.h"

namespace moebius::cuda {
namespace {

// A warp copies a piece at a time, 16 bytes a lane, all its loads before its stores. 4 KiB keep 8 loads in flight a lane; 16 warps of
// two blocks on each of 132 multiprocessors then have some 17 MiB in flight, far above what bandwidth times latency asks for (2–3 MiB).
constexpr int kLoads = 8;
constexpr int64_t kPieceBytes = kLoads * 32 * 16;
constexpr int kWarps = 8, kBlocksPerMultiprocessor = 4;
// Neighbouring warps work on pieces this many parts of the table apart: its blocks come rank by rank, and all peers are to send at once.
constexpr int64_t kParts = 8;

__global__ void __launch_bounds__(kWarps * 32) copy_blocks_kernel(const CopyEntry* table, int64_t num, int64_t begin, int64_t end) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t pieces = div_up(end - begin, kPieceBytes), per_part = div_up(pieces, kParts);
  for (int64_t i = warp; i < per_part * kParts; i += warps) {
    const int64_t piece = i % kParts * per_part + i / kParts;
    if (piece >= pieces) continue;
    int64_t at = begin + piece * kPieceBytes;
    const int64_t stop = min(end, at + kPieceBytes);
    for (int64_t e = holder_of(num, [&](int64_t i) { return table[i].begin; }, at); at < stop; ++e) {
      const CopyEntry entry = table[e];
      const int64_t here = min(stop, table[e + 1].begin);
      const uint4* from = reinterpret_cast<const uint4*>(static_cast<const char*>(entry.from) + (at - entry.begin));
      uint4* to = reinterpret_cast<uint4*>(static_cast<char*>(entry.to) + (at - entry.begin));
      const int words = static_cast<int>((here - at) / 16);
      uint4 v[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (const int w = j * 32 + lane; w < words) v[j] = load_streaming(from + w);
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (const int w = j * 32 + lane; w < words) store_streaming(to + w, v[j]);
      at = here;
    }
  }
}

}  // namespace

BlockCopies::~BlockCopies() {
  for (Table& t : tables_) {
    if (t.host != nullptr) (void)cudaFreeHost(t.host);
    if (t.device != nullptr) (void)cudaFree(t.device);
    if (t.read != nullptr) (void)cudaEventDestroy(t.read);
  }
}

cudaError_t BlockCopies::grow(Table& t) {
  Table larger;
  larger.capacity = std::max<int64_t>(4096, 2 * t.capacity);
  const size_t bytes = static_cast<size_t>(larger.capacity) * sizeof(CopyEntry);
  if (const cudaError_t e = cudaHostAlloc(&larger.host, bytes, cudaHostAllocPortable); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaMalloc(&larger.device, bytes); e != cudaSuccess) {
    (void)cudaFreeHost(larger.host);
    return e;
  }
  if (num_ > 0) std::memcpy(larger.host, t.host, static_cast<size_t>(num_) * sizeof(CopyEntry));
  larger.read = t.read;
  if (t.host != nullptr) (void)cudaFreeHost(t.host);
  if (t.device != nullptr) (void)cudaFree(t.device);
  t = larger;
  return cudaSuccess;
}

cudaError_t BlockCopies::add(void* to, const void* from, int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  Table& t = tables_[now_];
  if (num_ == 0 && t.read != nullptr)  // what it held last may still be on its way
    if (const cudaError_t e = cudaEventSynchronize(t.read); e != cudaSuccess) return e;
  if (num_ + 1 >= t.capacity)
    if (const cudaError_t e = grow(t); e != cudaSuccess) return e;
  t.host[num_++] = {to, from, bytes_};
  bytes_ += bytes;
  return cudaSuccess;
}

cudaError_t BlockCopies::flush(cudaStream_t stream) {
  if (num_ == 0) return cudaSuccess;
  Table& t = tables_[now_];
  t.host[num_] = {nullptr, nullptr, bytes_};
  const int64_t num = std::exchange(num_, 0), bytes = std::exchange(bytes_, 0);
  now_ = 1 - now_;
  if (t.read == nullptr)
    if (const cudaError_t e = cudaEventCreateWithFlags(&t.read, cudaEventDisableTiming); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaMemcpyAsync(t.device, t.host, static_cast<size_t>(num + 1) * sizeof(CopyEntry), cudaMemcpyHostToDevice, stream);
      e != cudaSuccess)
    return e;
  const int64_t blocks = div_up(div_up(bytes, kPieceBytes), kWarps);
  launch(copy_blocks_kernel, static_cast<unsigned>(std::min<int64_t>(blocks, resident_blocks(kBlocksPerMultiprocessor))), kWarps * 32, 0, stream,
         t.device, num, int64_t{0}, bytes);
  return cudaEventRecord(t.read, stream);
}

}  // namespace moebius::cuda
