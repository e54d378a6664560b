// Floors: bytes ÷ memory bandwidth, in all of them. A decode step's rows are few, so what counts is one launch each.
#include "cuda/rows.h"

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/ptx.h"
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
                                          : args.packed[token / kTile * tile_elements + token % kTile * 2 + i / 2 * 2 * kTile + i % 2]);
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
__device__ __forceinline__ void float_sums_of(const Partials& partials, bool plain, double inv_scale, int first, int last, int64_t at, int64_t end,
                                              float (&sums)[kAtOnce]) {
  if (plain) return sums_of(partials, first, last, at, end, sums);
  uint64_t fixed[kAtOnce];
  sums_of(partials, first, last, at, end, fixed);
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) sums[j] = static_cast<float>(static_cast<double>(static_cast<int64_t>(fixed[j])) * inv_scale);
}

__global__ void __launch_bounds__(kRowThreads) add_norm_kernel(AddNormArgs args, const __grid_constant__ Partials partials) {
  begin_next();
  if (args.weight != nullptr && blockIdx.x == 0 && threadIdx.x == 0) prefetch_bytes(args.weight, args.hidden * static_cast<int64_t>(sizeof(float)));
  await_previous();
  const int64_t row = args.rows.begin + blockIdx.x, begin = row * args.hidden, end = begin + args.hidden;
  int first = 0, last = partials.num;
  if (args.whole_rows > 0) first = static_cast<int>(div_up((row + 1) * partials.num, args.whole_rows)) - 1, last = first + 1;  // who share_of says
  const bool bad = any_flag(partials, first, last, row);
  float squares = 0;
  for (int64_t at = begin + threadIdx.x; at < end; at += kAtOnce * kRowThreads) {
    float v[kAtOnce], sums[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) v[j] = at + j * kRowThreads < end ? args.h[at + j * kRowThreads] : 0;
    if (partials.num > 0) float_sums_of(partials, args.plain, args.inv_scale, first, last, at, end, sums);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = at + j * kRowThreads;
      if (i >= end) break;
      if (partials.num > 0) args.h[i] = v[j] = bad ? __uint_as_float(0x7fc00000u) : v[j] + sums[j];
      squares = __fmaf_rn(v[j], v[j], squares);
    }
  }
  if (args.weight == nullptr) return;
  const float mean = __fdiv_rn(block_sum(squares), static_cast<float>(args.hidden));
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + args.eps));
  for (int64_t at = begin + threadIdx.x; at < end; at += kAtOnce * kRowThreads) {  // each thread's own elements again
    float v[kAtOnce], weight[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (const int64_t i = at + j * kRowThreads; i < end) v[j] = args.h[i], weight[j] = args.weight[i - begin];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = at + j * kRowThreads;
      if (i >= end) break;
      const float x = v[j] * factor * weight[j];
      args.x[i] = to_bf16(x);
      if (args.x_float != nullptr) args.x_float[i] = x;
    }
  }
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
  block_copy_row(homes.ids, homes.own, home, row, args.top_k);
  block_copy_row(homes.weights, homes.own, home, row, args.top_k);
}

// A V that is no number is stored as 0: tensor cores multiply what is masked by 0, and NaN would stay. Rows that see it are NaN all the
// same, by its K, which comes of the same input.
__device__ f16 value_half(float v) { return fabsf(v) < __uint_as_float(0x7f800000u) ? to_half(v) : f16{0}; }

constexpr int kRopeWarps = 4;
constexpr int kMaxHalf = kGpuMaxHeadDim / 2 / 32;  // pairs of a lane

// A warp a (row, head): lane l has the pairs (i, i + half) with i = l, l + 32, …. All that is read is read before anything is written, since a
// load would wait for the stores ahead of it; tables and weights before the projections are awaited.
__global__ void __launch_bounds__(kRopeWarps * 32) rope_store_kernel(RopeStoreArgs args) {
  begin_next();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t kv_heads = args.kv.num_kv_heads, heads = args.num_heads + kv_heads;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kRopeWarps + threadIdx.x / 32;
  const bool exists = unit < args.rows.size() * heads;
  const int64_t row = args.rows.begin + (exists ? unit / heads : 0), head = unit % heads, j = head - args.num_heads;
  const int dim = args.kv.head_dim, half = dim / 2;
  const bool is_key = j >= 0;
  const RowPlace place = load_early(args.places + row);
  const float* norm = is_key ? args.k_norm : args.q_norm;
  const float* rope = args.rope + static_cast<int64_t>(place.position) * dim;
  float cosine[kMaxHalf], sine[kMaxHalf], weight_a[kMaxHalf], weight_b[kMaxHalf];
#pragma unroll
  for (int n = 0; n < kMaxHalf; ++n) {
    const int i = n * 32 + lane;
    if (i >= half) continue;
    cosine[n] = rope[i], sine[n] = rope[half + i];
    if (norm != nullptr) weight_a[n] = norm[i], weight_b[n] = norm[i + half];
  }
  await_previous();
  if (!exists || (is_key && place.pages == nullptr)) return;  // without pages: a row that only fills a step up

  const float* in = is_key ? args.k + (row * kv_heads + j) * dim : args.q + (row * args.num_heads + head) * dim;
  const float* v = args.v + (row * kv_heads + (is_key ? j : 0)) * dim;
  float a[kMaxHalf], b[kMaxHalf], value_a[kMaxHalf], value_b[kMaxHalf], squares = 0;
#pragma unroll
  for (int n = 0; n < kMaxHalf; ++n) {
    const int i = n * 32 + lane;
    a[n] = i < half ? in[i] : 0;
    b[n] = i < half ? in[i + half] : 0;
    if (is_key && i < half) value_a[n] = v[i], value_b[n] = v[i + half];
  }
#pragma unroll
  for (int n = 0; n < kMaxHalf; ++n) squares = __fmaf_rn(b[n], b[n], __fmaf_rn(a[n], a[n], squares));
  float factor = 1;
  if (norm != nullptr) factor = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(warp_sum(squares), static_cast<float>(dim)) + args.eps));

  const KvSlice slice{args.kv.page_tokens, dim};
  const int64_t slot = place.position % args.kv.page_tokens;
  bf16* kv = nullptr;
  if (is_key) kv = reinterpret_cast<bf16*>(args.kv.base + (place.pages[place.position / args.kv.page_tokens] * kv_heads + j) * slice.bytes());
  bf16* q = args.q_out + (row * args.num_heads + head) * dim;
#pragma unroll
  for (int n = 0; n < kMaxHalf; ++n) {
    const int i = n * 32 + lane;
    if (i >= half) continue;
    if (norm != nullptr) a[n] = a[n] * factor * weight_a[n], b[n] = b[n] * factor * weight_b[n];
    const float c = cosine[n], s = sine[n];
    const bf16 first = to_bf16(a[n] * c - b[n] * s), second = to_bf16(b[n] * c + a[n] * s);
    if (is_key) {
      kv[slice.k_index(slot, i)] = first;
      kv[slice.k_index(slot, i + half)] = second;
      kv[slice.v_index(slot, i)] = value_half(value_a[n] * args.value_scale);
      kv[slice.v_index(slot, i + half)] = value_half(value_b[n] * args.value_scale);
    } else {
      q[i] = first;
      q[i + half] = second;
    }
  }
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
  launch(add_norm_kernel, static_cast<unsigned>(args.rows.size()), kRowThreads, 0, lane.queue, args, Partials(args));
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
  launch(rope_store_kernel, static_cast<unsigned>(div_up(units, kRopeWarps)), kRopeWarps * 32, 0, lane.queue, args);
}

void pick_rows(const PickArgs& args, const Lane& lane) {
  launch(pick_rows_kernel, static_cast<unsigned>(args.num_rows), kRowThreads, 0, lane.queue, args);
}

void clear(void* to, size_t bytes, const Lane& lane) {
  (void)cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(lane.queue));
  starts_late = true;
}

}  // namespace moebius::cuda
