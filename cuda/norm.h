// A row of the residual stream, with the sums that are added to it, and its norm, by one block: of the norm's own kernel, or of one that reads what
// is normed and saves the launch. The order of the row's sum of squares is that of kRowThreads threads, whatever the block has.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/math.h"
#include "lib/device/ops.h"

namespace moebius::cuda {

constexpr int kRowThreads = 256;
constexpr int kAtOnce = 8;                                   // elements that a thread has on their way, kRowThreads apart:
constexpr int64_t kRowPart = int64_t{kAtOnce} * kRowThreads;  // of so many in all

template <int kMost>
struct Partials {
  int num;
  const int64_t* sums[kMost];
  const uint8_t* flags[kMost];

  Partials() = default;
  template <class Args>
  explicit Partials(const Args& args) : num(args.num_partials), sums{}, flags{} {
    for (int p = 0; p < num; ++p) sums[p] = args.partials[p], flags[p] = args.flags[p];
  }
};

// The sums of elements at, at + kRowThreads, … below `end` over partials [first, last): integers wrap freely, only whole contributions were tested.
// Of one partial nothing waits for what is loaded.
template <class T, int kMost>
__device__ __forceinline__ void sums_of(const Partials<kMost>& partials, int first, int last, int64_t at, int64_t end, T (&sums)[kAtOnce]) {
  const auto load = [&](int p, int j) { return at + j * kRowThreads < end ? reinterpret_cast<const T*>(partials.sums[p])[at + j * kRowThreads] : T{0}; };
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) sums[j] = load(first, j);
#pragma unroll 2
  for (int p = first + 1; kMost > 1 && p < last; ++p)
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) sums[j] += load(p, j);
}
// A lane's own part of the row's flags: what any lane has counts.
template <int kMost>
__device__ __forceinline__ uint8_t flags_of(const Partials<kMost>& partials, int first, int last, int64_t row) {
  if (kMost == 1) return partials.flags[0][row];
  uint8_t flags = 0;
  for (int p = first + static_cast<int>(threadIdx.x) % 32; p < last; p += 32) flags |= partials.flags[p][row];
  return flags;
}

// What a row's element is to have added, from its sum.
__device__ __forceinline__ float addend_of(float sum, float factor) { return sum * factor; }
__device__ __forceinline__ float addend_of(uint64_t sum, float factor) {
  return static_cast<float>(static_cast<double>(static_cast<int64_t>(sum)) * static_cast<double>(factor));
}
constexpr unsigned kNoNumber = 0x7fc00000u;

// The sum over kRowThreads threads by a fixed tree: over the lanes of 32, then over these. A thread of kThreads has what several of them have.
template <int kThreads>
__device__ __forceinline__ float block_sum(const float (&v)[kRowThreads / kThreads]) {
  __shared__ float of_warp[kRowThreads / 32];
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int n = 0; n < kRowThreads / kThreads; ++n) {
    const float sum = warp_sum(v[n]);
    if (threadIdx.x % 32 == 0) of_warp[n * (kThreads / 32) + warp] = sum;
  }
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kRowThreads / 32; ++w) sum += of_warp[w];
  return sum;
}

__device__ __forceinline__ float norm_factor(const AddNormArgs& args, float squares) {
  const float mean = __fdiv_rn(squares, static_cast<float>(args.hidden));
  return __fdiv_rn(1.0f, __fsqrt_rn(mean + args.eps));
}

// A row of at most kParts · kRowPart elements, which stay with the block's kThreads threads: each has those of kEach of the kRowThreads.
template <int kThreads, int kParts>
class BlockRow {
 public:
  static constexpr int64_t kLongest = kParts * kRowPart;

  // Constant memory, so before the kernels ahead are awaited.
  __device__ __forceinline__ void load_weight(const AddNormArgs& args) { load(weight_, args.weight, args.hidden); }

  // The row and its sums over partials [first, last).
  template <int kMost>
  __device__ __forceinline__ void load_and_add(const AddNormArgs& args, const Partials<kMost>& partials, int first, int last, int64_t row) {
    load(v_, args.h + row * args.hidden, args.hidden);
    if (partials.num == 0) return;
    if (args.plain) add<float>(args, partials, first, last, row);
    else add<uint64_t>(args, partials, first, last, row);
  }

  // Not before all of the row is loaded, where it may lie in the same place: no load waits for a store.
  __device__ __forceinline__ void store(const AddNormArgs& args, int64_t row) const {
    float* const to = (args.h_out != nullptr ? args.h_out : args.h) + row * args.hidden;
    for_elements(args.hidden, [&](int n, int p, int j, int64_t i) { to[i] = v_[n][p][j]; });
  }

  // f(i, element i of the norm) for the thread's own elements. All threads call it.
  template <class F>
  __device__ __forceinline__ void norm(const AddNormArgs& args, const F& f) const {
    float squares[kEach] = {};
    for_elements(args.hidden, [&](int n, int p, int j, int64_t) { squares[n] = __fmaf_rn(v_[n][p][j], v_[n][p][j], squares[n]); });
    const float factor = norm_factor(args, block_sum<kThreads>(squares));
    for_elements(args.hidden, [&](int n, int p, int j, int64_t i) { f(i, v_[n][p][j] * factor * weight_[n][p][j]); });
  }

 private:
  static constexpr int kEach = kRowThreads / kThreads;

  template <class T, int kMost>
  __device__ __forceinline__ void add(const AddNormArgs& args, const Partials<kMost>& partials, int first, int last, int64_t row) {
    const int64_t begin = row * args.hidden;
    const uint8_t flags = flags_of(partials, first, last, row);
    T sums[kEach][kParts][kAtOnce];  // all of them on their way before any is used
    for_pieces([&](int n, int p, int64_t at) { sums_of(partials, first, last, begin + at, begin + args.hidden, sums[n][p]); });
    const bool bad = __any_sync(kAllLanes, flags != 0);
    for_elements(args.hidden, [&](int n, int p, int j, int64_t) {
      v_[n][p][j] = bad ? __uint_as_float(kNoNumber) : v_[n][p][j] + addend_of(sums[n][p][j], args.factor);
    });
  }

  // f(n, p, first element), in order of p for each n.
  template <class F>
  __device__ __forceinline__ static void for_pieces(const F& f) {
#pragma unroll
    for (int n = 0; n < kEach; ++n)
#pragma unroll
      for (int p = 0; p < kParts; ++p) f(n, p, p * kRowPart + n * kThreads + threadIdx.x);
  }
  template <class F>
  __device__ __forceinline__ static void for_elements(int64_t hidden, const F& f) {
    for_pieces([&](int n, int p, int64_t at) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (const int64_t i = at + j * kRowThreads; i < hidden) f(n, p, j, i);
    });
  }
  __device__ __forceinline__ static void load(float (&to)[kEach][kParts][kAtOnce], const float* from, int64_t hidden) {
    for_elements(hidden, [&](int n, int p, int j, int64_t i) { to[n][p][j] = __ldcg(from + i); });
  }

  float v_[kEach][kParts][kAtOnce] = {}, weight_[kEach][kParts][kAtOnce] = {};
};

// A norm that another kernel does before its own work, of rows whose sums are one at most.
struct NormAhead {
  AddNormArgs args;
  Partials<1> partials{};

  NormAhead() = default;
  explicit NormAhead(const AddNormArgs& norm) : args(norm), partials(norm) {}
};
// How many parts a row has where that may be, else 0.
inline int parts_ahead(const AddNormArgs& args) {
  const int64_t parts = div_up(args.hidden, kRowPart);
  const bool possible = args.num_partials <= 1 && args.whole_rows == 0 && args.hidden % 8 == 0 && parts <= 2 && (args.num_partials == 0 || args.h_out != nullptr);
  return possible ? static_cast<int>(parts) : 0;
}

}  // namespace moebius::cuda
