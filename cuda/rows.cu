// Floors: bytes ÷ memory bandwidth, in all of them. A decode step's rows are few, so what counts is one launch each.
#include "cuda/rows.h"

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/norm.h"
#include "cuda/ptx.h"
#include "cuda/rope.h"
#include "lib/layout/slices.h"
#include "lib/tensor/packed.h"

namespace moebius::cuda {
namespace {

__global__ void __launch_bounds__(kRowThreads) embed_kernel(EmbedArgs args) {
  follow_previous();
  const int64_t row = args.rows.begin + blockIdx.x, token = args.tokens[row];
  const int64_t tile_elements = PackedMatrix{kTile, args.hidden}.tile_elements();
  float* h = args.h + row * args.hidden;
  for (int64_t i = threadIdx.x; i < args.hidden; i += kRowThreads)
    h[i] = token < 0 ? 0 : to_float(args.table != nullptr ? args.table[token * args.hidden + i]
                                          : args.packed[token / kTile * tile_elements + token % kTile * 2 + i / 2 * 2 * kTile + i % 2]) * args.multiplier;
}

// Who share_of says has row r whole, or all partials.
struct WhichPartials {
  int first, last;
};
__device__ __forceinline__ WhichPartials partials_of(const AddNormArgs& args, int num, int64_t row) {
  if (args.whole_rows == 0) return {0, num};
  const int first = static_cast<int>(div_up((row + 1) * num, args.whole_rows)) - 1;
  return {first, first + 1};
}

template <int kParts>
__global__ void __launch_bounds__(kRowThreads, 2) add_norm_kernel(AddNormArgs args, const __grid_constant__ Partials<kMaxRanks> partials) {
  begin_next();
  const int64_t row = args.rows.begin + blockIdx.x, begin = row * args.hidden;
  BlockRow<kRowThreads, kParts> mine;
  if (args.weight != nullptr) mine.load_weight(args);
  await_previous();
  const auto [first, last] = partials_of(args, partials.num, row);
  mine.load_and_add(args, partials, first, last, row);
  if (partials.num > 0) mine.store(args, row);
  if (args.weight == nullptr) return;
  mine.norm(args, [&](int64_t i, float x) {
    args.x[begin + i] = to_bf16(x);
    if (args.x_float != nullptr) args.x_float[begin + i] = x;
  });
}

// Longer rows are read twice; the order of the sum is the same.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) add_norm_long_kernel(AddNormArgs args, const __grid_constant__ Partials<kMaxRanks> partials) {
  begin_next();
  const int64_t row = args.rows.begin + blockIdx.x, begin = row * args.hidden, end = begin + args.hidden;
  if (args.weight != nullptr && blockIdx.x == 0 && threadIdx.x == 0) prefetch_bytes(args.weight, args.hidden * static_cast<int64_t>(sizeof(float)));
  await_previous();
  const auto [first, last] = partials_of(args, partials.num, row);
  const bool bad = partials.num > 0 && __any_sync(kAllLanes, flags_of(partials, first, last, row) != 0);
  float* const out = args.h_out != nullptr ? args.h_out : args.h;
  float squares[1] = {};
  for (int64_t at = begin + threadIdx.x; at < end; at += kRowPart) {
    float v[kAtOnce] = {};
    T sums[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (const int64_t i = at + j * kRowThreads; i < end) v[j] = __ldcg(args.h + i);
    if (partials.num > 0) sums_of(partials, first, last, at, end, sums);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = at + j * kRowThreads;
      if (i >= end) break;
      if (partials.num > 0) out[i] = v[j] = bad ? __uint_as_float(kNoNumber) : v[j] + addend_of(sums[j], args.factor);
      squares[0] = __fmaf_rn(v[j], v[j], squares[0]);
    }
  }
  if (args.weight == nullptr) return;
  const float factor = norm_factor(args, block_sum<kRowThreads>(squares));
  const float* const from = partials.num > 0 ? out : args.h;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < args.hidden; i += kRowThreads) {  // each thread's own elements again
    const float x = __ldcg(from + begin + i) * factor * __ldcg(args.weight + i);
    args.x[begin + i] = to_bf16(x);
    if (args.x_float != nullptr) args.x_float[begin + i] = x;
  }
}

__global__ void __launch_bounds__(kRowThreads) add_partials_kernel(AddPartialsArgs args, const __grid_constant__ Partials<kMaxRanks> partials) {
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
  if (threadIdx.x >= 32) return;
  const bool bad = __any_sync(kAllLanes, flags_of(partials, 0, partials.num, row) != 0);
  if (bad && threadIdx.x == 0) const_cast<uint8_t*>(partials.flags[args.own])[row] = 1;
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
  const int64_t parts = div_up(args.hidden, kRowPart);
  const auto kernel = parts == 1 ? add_norm_kernel<1> : parts == 2 ? add_norm_kernel<2> : args.plain ? add_norm_long_kernel<float> : add_norm_long_kernel<uint64_t>;
  launch(kernel, static_cast<unsigned>(args.rows.size()), kRowThreads, 0, lane.queue, args, Partials<kMaxRanks>(args));
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
  launch(add_partials_kernel, static_cast<unsigned>(args.rows.size()), kRowThreads, 0, lane.queue, args, Partials<kMaxRanks>(args));
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
