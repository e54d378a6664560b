// Floors: bytes ÷ memory bandwidth, in all of them. A decode step's rows are few, so what counts is one launch each.
#include "cuda/rows.h"

#include "cuda/launch.h"
#include "cuda/math.h"
#include "lib/layout/owners.h"
#include "lib/tensor/packed.h"

namespace moebius::cuda {
namespace {

constexpr int kRowThreads = 256;  // of a row's block: fixed, since it sets the order of the row's sum of squares

__global__ void __launch_bounds__(kRowThreads) embed_kernel(EmbedArgs args) {
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

// The sum of element `at` over partials [first, last): integers wrap freely, only whole contributions were tested.
template <class T>
__device__ __forceinline__ T sum_of(const Partials& partials, int first, int last, int64_t at) {
  T sum = 0;
  for (int p = first; p < last; ++p) sum += reinterpret_cast<const T*>(partials.sums[p])[at];
  return sum;
}
__device__ __forceinline__ bool any_flag(const Partials& partials, int first, int last, int64_t row) {
  bool any = false;
  for (int p = first; p < last; ++p) any = any || partials.flags[p][row] != 0;
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

__global__ void __launch_bounds__(kRowThreads) add_norm_kernel(AddNormArgs args, const __grid_constant__ Partials partials) {
  const int64_t row = args.rows.begin + blockIdx.x, at = row * args.hidden;
  float* h = args.h + at;
  int first = 0, last = partials.num;
  if (args.whole_rows > 0) first = static_cast<int>(div_up((row + 1) * partials.num, args.whole_rows)) - 1, last = first + 1;  // who share_of says
  const bool bad = any_flag(partials, first, last, row);
  const double inv_scale = args.inv_scale;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < args.hidden; i += kRowThreads) {
    float v = h[i];
    if (partials.num > 0) {
      float sum;
      if (args.plain) sum = sum_of<float>(partials, first, last, at + i);
      else sum = static_cast<float>(static_cast<double>(static_cast<int64_t>(sum_of<uint64_t>(partials, first, last, at + i))) * inv_scale);
      v = bad ? __uint_as_float(0x7fc00000u) : v + sum;
      h[i] = v;
    }
    squares = __fmaf_rn(v, v, squares);
  }
  if (args.weight == nullptr) return;
  const float mean = __fdiv_rn(block_sum(squares), static_cast<float>(args.hidden));
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + args.eps));
  for (int64_t i = threadIdx.x; i < args.hidden; i += kRowThreads) {  // each thread's own elements again
    const float v = h[i] * factor * args.weight[i];
    args.x[at + i] = to_bf16(v);
    if (args.x_float != nullptr) args.x_float[at + i] = v;
  }
}

__global__ void __launch_bounds__(kRowThreads) add_partials_kernel(AddPartialsArgs args, const __grid_constant__ Partials partials) {
  const int64_t row = args.rows.begin + blockIdx.x, at = row * args.hidden;
  auto* const sums = const_cast<int64_t*>(partials.sums[args.own]);
  for (int64_t i = at + threadIdx.x; i < at + args.hidden; i += kRowThreads)
    if (args.plain) reinterpret_cast<float*>(sums)[i] = sum_of<float>(partials, 0, partials.num, i);
    else sums[i] = static_cast<int64_t>(sum_of<uint64_t>(partials, 0, partials.num, i));
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

// A warp a (row, head): lane l has the pairs (i, i + half) with i = l, l + 32, ….
__global__ void __launch_bounds__(kRopeWarps * 32) rope_store_kernel(RopeStoreArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t heads = args.num_heads + args.kv.num_kv_heads;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kRopeWarps + threadIdx.x / 32;
  if (unit >= args.rows.size() * heads) return;
  const int64_t row = args.rows.begin + unit / heads, head = unit % heads;
  const int64_t kv_heads = args.kv.num_kv_heads, j = head - args.num_heads;
  const int dim = args.kv.head_dim, half = dim / 2;
  const bool is_key = j >= 0;
  const RowPlace place = args.places[row];
  if (is_key && place.pages == nullptr) return;  // a row that only fills a step up
  const float* in = is_key ? args.k + (row * kv_heads + j) * dim : args.q + (row * args.num_heads + head) * dim;
  const float* norm = is_key ? args.k_norm : args.q_norm;
  const float* rope = args.rope + static_cast<int64_t>(place.position) * dim;

  float a[kMaxHalf], b[kMaxHalf], squares = 0;
#pragma unroll
  for (int n = 0; n < kMaxHalf; ++n) {
    const int i = n * 32 + lane;
    a[n] = i < half ? in[i] : 0;
    b[n] = i < half ? in[i + half] : 0;
    squares = __fmaf_rn(b[n], b[n], __fmaf_rn(a[n], a[n], squares));
  }
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
    if (norm != nullptr) a[n] = a[n] * factor * norm[i], b[n] = b[n] * factor * norm[i + half];
    const float c = rope[i], s = rope[half + i];
    const bf16 first = to_bf16(a[n] * c - b[n] * s), second = to_bf16(b[n] * c + a[n] * s);
    if (is_key) {
      kv[slice.k_index(slot, i)] = first;
      kv[slice.k_index(slot, i + half)] = second;
      const float* v = args.v + (row * kv_heads + j) * dim;
      kv[slice.v_index(slot, i)] = value_half(v[i] * args.value_scale);
      kv[slice.v_index(slot, i + half)] = value_half(v[i + half] * args.value_scale);
    } else {
      q[i] = first;
      q[i + half] = second;
    }
  }
}

__global__ void __launch_bounds__(kRowThreads) pick_rows_kernel(PickArgs args) {
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

void clear(void* to, size_t bytes, const Lane& lane) { (void)cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(lane.queue)); }

}  // namespace moebius::cuda
