#include "cuda/reshard.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/ptx.h"
#include "lib/base/numbers.h"
#include "lib/layout/owners.h"

namespace moebius::cuda {
namespace {

// A warp copies a piece at a time, 16 bytes a lane, all its loads before its stores. 4 KiB keep 8 loads in flight a lane; 16 warps of
// two blocks on each of 132 multiprocessors then have some 17 MiB in flight, far above what bandwidth times latency asks for (2–3 MiB).
constexpr int kLoads = 8;
constexpr int64_t kPieceBytes = kLoads * 32 * 16;
constexpr int kWarps = 8, kBlocksPerMultiprocessor = 4;
// Neighbouring warps work on pieces this many parts of the table apart: its blocks come rank by rank, and all peers are to send at once.
constexpr int64_t kParts = 8;

// At most kPieceBytes, a multiple of 16.
__device__ __forceinline__ void warp_copy(void* to_bytes, const void* from_bytes, int64_t bytes) {
  const int lane = static_cast<int>(threadIdx.x) % 32, words = static_cast<int>(bytes / 16);
  const uint4* from = static_cast<const uint4*>(from_bytes);
  uint4* to = static_cast<uint4*>(to_bytes);
  uint4 v[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j)
    if (const int w = j * 32 + lane; w < words) v[j] = load_streaming(from + w);
#pragma unroll
  for (int j = 0; j < kLoads; ++j)
    if (const int w = j * 32 + lane; w < words) store_streaming(to + w, v[j]);
}

__global__ void __launch_bounds__(kWarps * 32) copy_blocks_kernel(const CopyEntry* table, int64_t num, int64_t begin, int64_t end) {
  follow_previous();
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
      warp_copy(static_cast<char*>(entry.to) + (at - entry.begin), static_cast<const char*>(entry.from) + (at - entry.begin), here - at);
      at = here;
    }
  }
}

unsigned grid_of(int64_t pieces) { return static_cast<unsigned>(std::min<int64_t>(div_up(pieces, kWarps), resident_blocks(kBlocksPerMultiprocessor))); }

struct Pools {
  const std::byte* of[kMaxRanks];
};

// A warp copies a head's part of a page at a time, as for_each_kv_block lists them. Neighbouring warps have the heads of a page and then
// other pages, whose sources are different ranks.
__global__ void __launch_bounds__(kWarps * 32) copy_pages_kernel(CopyPagesArgs args, const __grid_constant__ Pools pools) {
  follow_previous();
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps, heads = args.num_kv_heads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < args.num * heads; i += warps) {
    const PagePair pair = args.pairs[i / heads];
    const int64_t h = i % heads;
    const auto in_tp = [&](int rank) { return (int64_t{pair.tp_page} * args.counts[rank] + args.places[rank * heads + h]) * args.slice_bytes; };
    const int64_t in_ep = (pair.ep_page * heads + h) * args.slice_bytes;
    const std::byte* from;
    std::byte* to;
    if (args.to_tp) {
      if (args.places[args.rank * heads + h] < 0) continue;
      from = pools.of[pair.home] + in_ep;
      to = args.to + in_tp(args.rank);
    } else {
      const int source = kv_source(args.owners[h], args.rank, pair.tp_page);
      from = pools.of[source] + in_tp(source);
      to = args.to + in_ep;
    }
    for (int64_t at = 0; at < args.slice_bytes; at += kPieceBytes) warp_copy(to + at, from + at, min(kPieceBytes, args.slice_bytes - at));
  }
}

}  // namespace

BlockCopies::~BlockCopies() {
  for (Table& t : tables_) release(t);
}

void BlockCopies::release(Table& t) {
  if (t.host != nullptr) (void)cudaFreeHost(t.host);
  if (t.device != nullptr) (void)cudaFree(t.device);
  if (t.read != nullptr) (void)cudaEventDestroy(t.read);
  t = {};
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

namespace {

void copy_on(cudaStream_t stream, const CopyEntry* table, int64_t num, int64_t begin, int64_t end) {
  launch(copy_blocks_kernel, grid_of(div_up(end - begin, kPieceBytes)), kWarps * 32, 0, stream, table, num, begin, end);
  starts_late = true;  // an early start reads weights before what is ahead of it has ended, and these may be some
}

}  // namespace

cudaError_t BlockCopies::flush(cudaStream_t stream) {
  if (num_ == 0) return cudaSuccess;
  Table& t = tables_[now_];
  t.host[num_] = {nullptr, nullptr, bytes_};
  const int64_t num = std::exchange(num_, 0), bytes = std::exchange(bytes_, 0);
  now_ = 1 - now_;
  if (t.read == nullptr)
    if (const cudaError_t e = cudaEventCreateWithFlags(&t.read, cudaEventDisableTiming); e != cudaSuccess) return e;
  starts_late = true;
  if (const cudaError_t e = cudaMemcpyAsync(t.device, t.host, static_cast<size_t>(num + 1) * sizeof(CopyEntry), cudaMemcpyHostToDevice, stream);
      e != cudaSuccess)
    return e;
  copy_on(stream, t.device, num, 0, bytes);
  return cudaEventRecord(t.read, stream);
}

cudaError_t BlockCopies::keep(cudaStream_t stream, KeptBlocks& out) {
  out.num_ = std::exchange(num_, 0);
  const int64_t total = std::exchange(bytes_, 0);
  if (out.num_ == 0) return cudaSuccess;
  Table& t = tables_[now_];
  t.host[out.num_] = {nullptr, nullptr, total};
  const size_t bytes = static_cast<size_t>(out.num_ + 1) * sizeof(CopyEntry);
  if (const cudaError_t e = cudaMalloc(&out.table_, bytes); e != cudaSuccess) return e;
  starts_late = true;
  if (const cudaError_t e = cudaMemcpyAsync(out.table_, t.host, bytes, cudaMemcpyHostToDevice, stream); e != cudaSuccess) return e;
  const cudaError_t done = cudaStreamSynchronize(stream);
  release(t);  // a device that keeps its tables seldom fills others
  return done;
}

KeptBlocks::~KeptBlocks() {
  if (table_ != nullptr) (void)cudaFree(table_);
}

void KeptBlocks::copy(int64_t begin, int64_t end, cudaStream_t stream) const {
  if (end > begin) copy_on(stream, table_, num_, begin, end);
}

void copy_pages(const CopyPagesArgs& args, const Lane& lane) {
  Pools pools{};
  for (int r = 0; r < args.num_ranks; ++r) pools.of[r] = args.from[r];
  launch(copy_pages_kernel, grid_of(args.num * args.num_kv_heads), kWarps * 32, 0, lane.queue, args, pools);
  starts_late = true;
}

}  // namespace moebius::cuda
