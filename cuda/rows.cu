// Floors: bytes ÷ memory bandwidth, in all of them. A decode step's rows are few, so what counts is one launch each.
#include "cuda/rows.h"

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/ptx.h"
#include "cuda/rope.h"
#include "lib/layout/owners.h"
#include "lib/tensor/packed.h"

namespace moebius::cuda {
namespace {

constexpr int kRowThreads = 256;  // of a row's block: fixed, since it sets the order of the row's sum of squares

__global__ void __launch_bounds__(kRowThreads) embed_kernel(EmbedArgs args) {
  follow_previous();
  const int64_t row = args.rows.begin + blockIdx.x, token = args.tokens[row];
  const int64_t tile_elements = PackedMatrix{kTile, args.hidden}.tile_elements();
  float* h = args.h + row * args.hidden;
  for (int64_t i = threadIdx.x; i < args.hidden; i += kRowThreads)
    h[i] = token < 0 ? 0 : to_float(args.table != nullptr ? args.table[token * args.hidden + i]
                                          : args.packed[token / kTile * tile_elements + token % kTile * 2 + i / 2 * 2 * kTile + i % 2]) * args.multiplier;
}

struct Partials {
  int num;
  const int64_t* sums[kMaxRanks];
  const uint8_t* flags[kMaxRanks];

  template <class Args>
  explicit Partials(const Args& args) : num(args.num_partials), sums{}, flags{} {
    for (int p = 0; p < num; ++p) sums[p] = args.partials[p], flags[p] = args.flags[p];
  }
};

constexpr int kAtOnce = 8;  // elements of a row that a thread has on their way, kRowThreads apart

// The sums of elements at, at + kRowThreads, … below `end` over partials [first, last): integers wrap freely, only whole contributions were tested.
template <class T>
__device__ __forceinline__ void sums_of(const Partials& partials, int first, int last, int64_t at, int64_t end, T (&sums)[kAtOnce]) {
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) sums[j] = 0;
#pragma unroll 2
  for (int p = first; p < last; ++p)
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (const int64_t i = at + j * kRowThreads; i < end) sums[j] += reinterpret_cast<const T*>(partials.sums[p])[i];
}
__device__ __forceinline__ bool any_flag(const Partials& partials, int first, int last, int64_t row) {
  bool any = false;
  for (int p = first; p < last; ++p) any |= partials.flags[p][row] != 0;  // without a branch that waits for each
  return any;
}

// The block's sum by a fixed tree: over lanes, then over warps.
__device__ float block_sum(float v) {
  __shared__ float of_warp[kRowThreads / 32];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kRowThreads / 32; ++w) sum += of_warp[w];
  return sum;
}

// What they are added to, as floats.
__device__ __forceinline__ void float_sums_of(const Partials& partials, bool plain, float factor, int first, int last, int64_t at, int64_t end,
                                              float (&sums)[kAtOnce]) {
  if (plain) {
    sums_of(partials, first, last, at, end, sums);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) sums[j] *= factor;
    return;
  }
  uint64_t fixed[kAtOnce];
  sums_of(partials, first, last, at, end, fixed);
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) sums[j] = static_cast<float>(static_cast<double>(static_cast<int64_t>(fixed[j])) * static_cast<double>(factor));
}

// kKept: parts of kAtOnce · kRowThreads elements that a row has at most, what a thread has of them staying with it, and its weights there before the
// sums are awaited; 0: longer rows, read twice. The order of the sum is the same.
template <int kKept>
__global__ void __launch_bounds__(kRowThreads, 2) add_norm_kernel(AddNormArgs args, const __grid_constant__ Partials partials) {
  begin_next();
  const int64_t row = args.rows.begin + blockIdx.x, begin = row * args.hidden;
  float* const h = args.h + begin;
  float v[kKept > 0 ? kKept : 1][kAtOnce] = {}, weight[kKept > 0 ? kKept : 1][kAtOnce] = {};
  const auto for_parts = [&](const auto& f) {  // f(number of what is kept, the thread's first element)
    constexpr int64_t kPart = kAtOnce * kRowThreads;
    if constexpr (kKept > 0) {
#pragma unroll
      for (int p = 0; p < kKept; ++p) f(p, threadIdx.x + p * kPart);
    } else {
      for (int64_t at = threadIdx.x; at < args.hidden; at += kPart) f(0, at);
    }
  };
  const auto for_elements = [&](int64_t at, const auto& f) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (const int64_t i = at + j * kRowThreads; i < args.hidden) f(j, i);
  };
  const auto load = [&](float (&to)[kAtOnce], const float* from, int64_t at) {
    for_elements(at, [&](int j, int64_t i) { to[j] = __ldcg(from + i); });
  };
  const auto store = [&](int p, int64_t at) {
    if (partials.num > 0) for_elements(at, [&](int j, int64_t i) { h[i] = v[p][j]; });
  };
  if (args.weight != nullptr) {
    if (kKept > 0) for_parts([&](int p, int64_t at) { load(weight[p], args.weight, at); });
    else if (blockIdx.x == 0 && threadIdx.x == 0) prefetch_bytes(args.weight, args.hidden * static_cast<int64_t>(sizeof(float)));
  }
  await_previous();
  int first = 0, last = partials.num;
  if (args.whole_rows > 0) first = static_cast<int>(div_up((row + 1) * partials.num, args.whole_rows)) - 1, last = first + 1;  // who share_of says
  const bool bad = any_flag(partials, first, last, row);
  float squares = 0;
  for_parts([&](int p, int64_t at) {
    float sums[kAtOnce];
    load(v[p], h, at);
    if (partials.num > 0) float_sums_of(partials, args.plain, args.factor, first, last, begin + at, begin + args.hidden, sums);
    for_elements(at, [&](int j, int64_t) {
      if (partials.num > 0) v[p][j] = bad ? __uint_as_float(0x7fc00000u) : v[p][j] + sums[j];
      squares = __fmaf_rn(v[p][j], v[p][j], squares);
    });
    if (kKept == 0) store(p, at);
  });
  if (kKept > 0) for_parts(store);  // not before: no load has waited for a store
  if (args.weight == nullptr) return;
  const float mean = __fdiv_rn(block_sum(squares), static_cast<float>(args.hidden));
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + args.eps));
  for_parts([&](int p, int64_t at) {  // each thread's own elements again
    if (kKept == 0) load(v[p], h, at), load(weight[p], args.weight, at);
    for_elements(at, [&](int j, int64_t i) {
      const float x = v[p][j] * factor * weight[p][j];
      args.x[begin + i] = to_bf16(x);
      if (args.x_float != nullptr) args.x_float[begin + i] = x;
    });
  });
}

__global__ void __launch_bounds__(kRowThreads) add_partials_kernel(AddPartialsArgs args, const __grid_constant__ Partials partials) {
  follow_previous();
  const int64_t row = args.rows.begin + blockIdx.x, begin = row * args.hidden, end = begin + args.hidden;
  const auto add = [&](auto* own) {
    for (int64_t at = begin + threadIdx.x; at < end; at += kAtOnce * kRowThreads) {
      std::remove_pointer_t<decltype(own)> sums[kAtOnce];
      sums_of(partials, 0, partials.num, at, end, sums);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (const int64_t i = at + j * kRowThreads; i < end) own[i] = sums[j];
    }
  };
  auto* const own = const_cast<int64_t*>(partials.sums[args.own]);
  if (args.plain) add(reinterpret_cast<float*>(own));
  else add(reinterpret_cast<uint64_t*>(own));
  if (threadIdx.x == 0 && any_flag(partials, 0, partials.num, row)) const_cast<uint8_t*>(partials.flags[args.own])[row] = 1;
}

struct Homes {
  int num, own;
  int64_t begin[kMaxRanks + 1];
  bf16* x[kMaxRanks];
  int32_t* ids[kMaxRanks];
  float* weights[kMaxRanks];
};

template <class T>
__device__ __forceinline__ void block_copy_row(T* const* of_home, int own, int home, int64_t row, int64_t width) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const T* from = of_home[home] + row * width;
  T* to = of_home[own] + row * width;
  if (width % kVector == 0)
    for (int64_t i = threadIdx.x; i < width / kVector; i += kRowThreads) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  else
    for (int64_t i = threadIdx.x; i < width; i += kRowThreads) to[i] = from[i];
}

__global__ void __launch_bounds__(kRowThreads) fetch_rows_kernel(FetchRowsArgs args, const __grid_constant__ Homes homes) {
  follow_previous();
  const int64_t row = homes.begin[0] + blockIdx.x;
  const int home = static_cast<int>(holder_of(int64_t{homes.num}, [&](int64_t h) { return homes.begin[h]; }, row));
  if (home == homes.own) return;
  block_copy_row(homes.x, homes.own, home, row, args.hidden);
  if (homes.ids[0] == nullptr) return;
  block_copy_row(homes.ids, homes.own, home, row, args.choices);
  block_copy_row(homes.weights, homes.own, home, row, args.choices);
}

constexpr int kRopeThreads = 128;

// Four lanes a (row, head).
template <int kGroups>
__global__ void __launch_bounds__(kRopeThreads) rope_store_kernel(RopeStoreArgs args) {
  follow_previous();
  const int64_t kv_heads = args.kv.num_kv_heads, heads = args.num_heads + kv_heads;
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x) / 4;
  const bool exists = unit < args.rows.size() * heads;
  const int64_t row = args.rows.begin + (exists ? unit / heads : 0), head = unit % heads, j = head - args.num_heads;
  const int dim = args.kv.head_dim, half = dim / 2;
  const bool is_key = j >= 0;
  const RowPlace place = args.places[row];
  RopeHalves<kGroups> x, v;
  x.load(is_key ? args.k + (row * kv_heads + j) * dim : args.q + (row * args.num_heads + head) * dim, half);
  if (is_key) v.load(args.v + (row * kv_heads + j) * dim, half);
  if (args.q_bias != nullptr) {
    x.add(is_key ? args.k_bias + j * dim : args.q_bias + head * dim, half);
    if (is_key) v.add(args.v_bias + j * dim, half);
  }
  x.norm_and_rotate(is_key ? args.k_norm : args.q_norm, args.eps, args.rope + static_cast<int64_t>(place.position) * dim, half);
  if (!exists || (is_key && place.pages == nullptr)) return;  // without pages: a row that only fills a step up
  if (is_key) return store_kv(args.kv, place.pages, place.position, static_cast<int>(j), x, v, args.value_scale, half);
  bf16* const q = args.q_out + (row * args.num_heads + head) * dim;
  for_pieces<kGroups>(half, [&](int n, int s, int i) {
    *reinterpret_cast<uint2*>(q + i) = bf16_piece(x.low[n] + s);
    *reinterpret_cast<uint2*>(q + half + i) = bf16_piece(x.high[n] + s);
  });
}

__global__ void __launch_bounds__(kRowThreads) pick_rows_kernel(PickArgs args) {
  follow_previous();
  const int64_t from = args.rows[blockIdx.x] * args.hidden, to = static_cast<int64_t>(blockIdx.x) * args.hidden;
  for (int64_t i = threadIdx.x; i < args.hidden; i += kRowThreads) args.out[to + i] = args.x[from + i];
}

}  // namespace

void embed(const EmbedArgs& args, const Lane& lane) {
  launch(embed_kernel, static_cast<unsigned>(args.rows.size()), kRowThreads, 0, lane.queue, args);
}

void add_norm(const AddNormArgs& args, const Lane& lane) {
  const int64_t parts = div_up(args.hidden, int64_t{kAtOnce} * kRowThreads);
  const auto kernel = parts == 1 ? add_norm_kernel<1> : parts == 2 ? add_norm_kernel<2> : add_norm_kernel<0>;
  launch(kernel, static_cast<unsigned>(args.rows.size()), kRowThreads, 0, lane.queue, args, Partials(args));
}

void fetch_rows(const FetchRowsArgs& args, const Lane& lane) {
  Homes homes{args.num_homes, args.own, {}, {}, {}, {}};
  for (int h = 0; h < args.num_homes; ++h) {
    homes.begin[h] = args.homes[h].begin;
    homes.x[h] = args.x[h];
    if (args.ids != nullptr) homes.ids[h] = args.ids[h], homes.weights[h] = args.weights[h];
  }
  const int64_t rows = args.homes[args.num_homes - 1].end - homes.begin[0];
  launch(fetch_rows_kernel, static_cast<unsigned>(rows), kRowThreads, 0, lane.queue, args, homes);
}

void add_partials(const AddPartialsArgs& args, const Lane& lane) {
  launch(add_partials_kernel, static_cast<unsigned>(args.rows.size()), kRowThreads, 0, lane.queue, args, Partials(args));
}

void rope_store(const RopeStoreArgs& args, const Lane& lane) {
  const int64_t units = args.rows.size() * (args.num_heads + args.kv.num_kv_heads);
  const int groups = (args.kv.head_dim + 63) / 64;
  const auto kernel = groups == 1   ? rope_store_kernel<1>
                      : groups == 2 ? rope_store_kernel<2>
                      : groups == 3 ? rope_store_kernel<3>
                                    : rope_store_kernel<4>;
  launch(kernel, static_cast<unsigned>(div_up(4 * units, kRopeThreads)), kRopeThreads, 0, lane.queue, args);
}

void pick_rows(const PickArgs& args, const Lane& lane) {
  launch(pick_rows_kernel, static_cast<unsigned>(args.num_rows), kRowThreads, 0, lane.queue, args);
}

void clear(void* to, size_t bytes, const Lane& lane) {
  (void)cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(lane.queue));
  starts_late = true;
}

}  // namespace moebius::cuda
