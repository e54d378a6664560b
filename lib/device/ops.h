// The border to hardware: the table of kernels that a backend supplies, and their arguments as plain data.
//
// Every computing thread of a rank calls the same op with its own Lane; the op does that lane's share and returns. An op
// never waits: the caller puts a barrier where one op reads what another lane wrote. No share of work ever splits the sum
// of one output element, so results depend on neither the number of lanes nor the rows that happen to be in the batch.
// Pointers mean memory of the rank (Device), which on a GPU the host cannot read; arrays that an op takes from the host, and has
// read when it returns, are called so. On a GPU an op only queues its work (Lane::queue), with one lane a rank.
// Rows are rows of the whole step: buffers are indexed by the step's row number even where a rank works on a range of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lib/base/numbers.h"
#include "lib/layout/pages.h"
#include "lib/tensor/dtype.h"

namespace moebius {

// One thread's share of an op: thread `thread` of `num_threads`, with scratch memory of its own (64-byte aligned, on a GPU 256,
// at least Ops::scratch_bytes of the engine's limits, zeros before the first op).
struct Lane {
  int thread = 0;
  int num_threads = 1;
  std::byte* scratch = nullptr;
  void* queue = nullptr;  // Device::queue of the rank; null where ops run at once
};

// Upper bounds that size scratch memory.
struct OpLimits {
  int64_t max_rows = 0;        // rows of a step
  int64_t hidden = 0;
  int64_t head_dim = 0;
  int64_t num_heads = 0;       // query heads
  int64_t num_experts = 0;     // of a layer, shared ones among them
  int64_t choices = 1;         // experts of a row
  bool row_major = false;      // LinearArgs::row_major will be asked for
};

// The one accumulator of sums that cross slices (design: exact sums). A contribution c (float) is added as the integer
// nearest c·scale. Each is tested by itself: finite and |c·scale| < limit; a failure sets the row's flag, and whoever
// converts the sum back makes that row NaN. Flags are only ever set here (relaxed atomic stores of 1), never cleared.
struct ExactSum {
  int64_t* sum = nullptr;    // [rows, hidden]; holds floats (unscaled) instead where `plain`
  uint8_t* flags = nullptr;  // [rows]
  float scale = 1;           // a power of two
  float limit = 0;           // a power of two ≤ 2^63 ÷ number of addends
  bool plain = false;        // mode fast: ordinary float sums, in any order
};

// h[row] = multiplier · embedding of tokens[row], 0 for a row that only fills a step up (token −1). Shares: rows.
struct EmbedArgs {
  Range rows;
  const int32_t* tokens = nullptr;  // [rows]
  int64_t hidden = 0;
  const bf16* table = nullptr;      // [vocab, hidden], or null when tied:
  const bf16* packed = nullptr;     // packed matrix n = vocab, k = hidden
  float* h = nullptr;               // [rows, hidden]
  float multiplier = 1;
};

// h[row] += (Σ_p partials[p][row])·factor (NaN where any flag is set), then x = bf16(rms_norm(h)·weight). Shares: rows.
struct AddNormArgs {
  Range rows;
  int64_t hidden = 0;
  float* h = nullptr;                          // [rows, hidden] in, out
  int num_partials = 0;                        // 0: norm only
  const int64_t* const* partials = nullptr;    // host [num_partials] each [rows, hidden]
  const uint8_t* const* flags = nullptr;       // host [num_partials] each [rows]
  float factor = 1;                            // residual multiplier ÷ the sums' scale (1 of plain ones)
  bool plain = false;
  int64_t whole_rows = 0;                      // above 0: each row is whole in one partial, row r of so many in that whose share_of has it
  const float* weight = nullptr;               // [hidden]; null: add only
  float eps = 0;
  bf16* x = nullptr;                           // [rows, hidden]
  float* x_float = nullptr;                    // [rows, hidden] the norm before rounding, or null
  float* h_out = nullptr;                      // on a GPU: where h goes if there are partials; null: it stays
};

// y = x·Wᵀ in float, for several packed matrices over the same x. Shares: tiles of all parts, laid end to end.
struct LinearPart {
  const bf16* w = nullptr;  // packed matrix n, k
  int64_t n = 0;
  float* y = nullptr;       // row r at y + r·ldy
  int64_t ldy = 0;
};
inline constexpr int kMaxLinearParts = 512;  // of a projection: Q groups, and K and V of each KV head of a layer
struct LinearArgs {
  Range rows;
  const bf16* x = nullptr;  // row r at x + r·ldx
  int64_t ldx = 0;
  int64_t k = 0;
  int num_parts = 0;
  const LinearPart* parts = nullptr;  // host
  bool row_major = false;             // w is no packed matrix but [n, k]: on a GPU in mode fast
  bool plain = false;                 // mode fast: in any order along k
};

// add_norm, then linear of its x, which may stay unwritten.
struct NormLinearArgs {
  AddNormArgs norm;  // with an h_out that is not h
  LinearArgs linear;
};

// Where a row's KV lives: page `position / page_tokens` of its sequence's page table.
struct RowPlace {
  int32_t position = 0;
  const int32_t* pages = nullptr;  // page table of the row's sequence in the layout at hand
};

// One layer's KV of one rank in one layout: page p of local KV head j at base + (p·num_kv_heads + j)·slice bytes (KvSlice).
struct KvView {
  std::byte* base = nullptr;
  int32_t num_kv_heads = 0;  // local ones
  int32_t page_tokens = 0;
  int32_t head_dim = 0;
};

// Biases (if any), per-head RMS norm (if any) and rotary embedding (halves rotated, as Hugging Face's rotate_half) of q and k;
// q is rounded to bf16; k as bf16 and v·value_scale as f16 are stored in their pages. Shares: (row, head) units.
// (On a GPU a row without pages, which fills a step up, stores nothing.)
struct RopeStoreArgs {
  Range rows;
  const RowPlace* places = nullptr;  // [rows]
  int32_t num_heads = 0;             // local query heads
  const float* q = nullptr;          // [rows, num_heads·head_dim]
  const float* k = nullptr;          // [rows, num_kv_heads·head_dim]
  const float* v = nullptr;          // [rows, num_kv_heads·head_dim]
  const float* q_norm = nullptr;     // [head_dim] or null
  const float* k_norm = nullptr;     // [head_dim] or null
  float eps = 0;
  const float* rope = nullptr;       // [max_position][cos, sin][head_dim/2]
  bf16* q_out = nullptr;             // [rows, num_heads·head_dim]
  float value_scale = 1;             // a power of two that keeps every value inside f16's range
  KvView kv;
  const float* q_bias = nullptr;     // [num_heads·head_dim], k_bias and v_bias [num_kv_heads·head_dim]: all of them or null
  const float* k_bias = nullptr;
  const float* v_bias = nullptr;
};

// Causal attention over paged KV, prefill and decode alike: row r of a chunk sees positions 0 … first_position + r.
// The order of operations is a function of the position alone: splits of kAttentionSplit tokens at absolute positions, each
// with its own (max, sum, output), merged in order; slots past a row's position are not read into any sum.
// Shares: (chunk rows, KV head) units.
inline constexpr int kAttentionSplit = 256;  // tokens, on the CPU; a multiple of every page size we accept up to 256, and of the tile

struct SequenceChunk {
  int32_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t first_position = 0;
  const int32_t* pages = nullptr;
};
struct AttentionArgs {
  int num_chunks = 0;
  const SequenceChunk* chunks = nullptr;
  int64_t num_rows = 0;                    // of all chunks together, and
  int64_t max_tokens = 0;                  // the largest first_position + num_rows: both at least that
  int32_t num_heads = 0;                   // local query heads
  const Range* heads_of_kv = nullptr;      // host [kv.num_kv_heads] the local query heads that read each local KV head
  float softmax_scale = 0;
  float value_scale = 1;                   // as the values were stored
  const bf16* q = nullptr;                 // [rows, num_heads·head_dim]
  bf16* out = nullptr;                     // [rows, num_heads·head_dim]
  KvView kv;
};

// rope_store, then attention of the same rows. Where chunks are at least as many as rows, each is of one row at most, and q_out may stay unwritten.
struct RopeAttentionArgs {
  RopeStoreArgs rope;
  AttentionArgs attention;  // its q is where rope puts it
};

// acc = Σ_groups fixed(O[group]·a[:, group]): overwrites the rows' sums. Shares: tiles of hidden.
struct ExactLinearPart {
  const bf16* w = nullptr;  // packed matrix n = hidden, k
  int64_t column = 0;       // where the group's inputs start in a row of x; even
};
struct ExactLinearArgs {
  Range rows;
  const bf16* x = nullptr;  // row r at x + r·ldx
  int64_t ldx = 0;          // even
  int64_t hidden = 0;
  int64_t k = 0;            // inputs of each group; even
  int num_parts = 0;
  const ExactLinearPart* parts = nullptr;  // host
  ExactSum out;
};

// How a row's experts are chosen, from logits in float: the top_k of the largest score + bias (ties and NaN: the lower index) and, behind them,
// the shared experts, which are numbered from num_experts on.
struct RouteRule {
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int32_t num_shared = 0;
  bool gates_shared = false;  // a shared expert's weight is the sigmoid of one more logit, else 1
  bool sigmoid = false;       // scores are the logits' sigmoids, else their softmax over all experts
  bool renormalise = false;   // weights, which are the scores of the chosen, are made to sum to 1,
  float scale = 1;            // and then multiplied by this

  constexpr int32_t choices() const { return top_k + num_shared; }
};
inline constexpr float kLeastScores = 1e-20f;  // what the sum of chosen sigmoids begins with: all of them may be 0

// Router: experts and their weights of each row, the chosen ones descending by score + bias. Shares: rows.
struct RouteArgs {
  Range rows;
  const float* x = nullptr;     // [rows, hidden]
  const bf16* w = nullptr;      // packed matrix n = num_experts, k = hidden; where the rule gates_shared another follows, n = 1
  int64_t hidden = 0;
  RouteRule rule;
  const float* bias = nullptr;  // [num_experts] or null
  int32_t* ids = nullptr;       // [rows, choices]
  float* weights = nullptr;     // [rows, choices]
};

// Token permutation: the choices of `rows` grouped by the local expert they name; pairs of one expert keep the order of rows. Of the shared
// experts, which every rank may have, only for shared_rows.
struct GroupArgs {
  Range rows;
  int32_t choices = 0;                       // of a row
  int32_t num_routed = 0;                    // experts from this on are shared
  Range shared_rows;
  const int32_t* tokens = nullptr;           // [rows] null, or rows whose token is −1 choose nobody
  const int32_t* ids = nullptr;              // [rows, choices]
  const float* weights = nullptr;            // [rows, choices]
  int32_t num_experts = 0;                   // local ones
  const int32_t* local_of_expert = nullptr;  // [experts] local number or −1 (left out); null: one dense MLP, every row once, weight 1
  int32_t* begins = nullptr;                 // out [num_experts + 1] pairs [begins[e], begins[e + 1]) are those of expert e
  int32_t* pair_rows = nullptr;              // out [rows·choices] the step's row of each pair
  float* pair_weights = nullptr;             // out [rows·choices]
  int32_t* experts_reached = nullptr;        // += local experts that have pairs
};

// add_norm, then route of its x_float, which may stay unwritten, then group_experts of the same rows where `group` has begins.
struct NormRouteArgs {
  AddNormArgs norm;  // with an h_out that is not h
  RouteArgs route;
  GroupArgs group;
};

// Experts (or one dense MLP) over the pairs that chose them.
struct ExpertsArgs {
  int64_t hidden = 0;
  int64_t neurons_per_cut = 0;
  int32_t num_cuts = 0;                   // of each expert, on this rank
  int32_t num_experts = 0;                // local ones
  const int32_t* begins = nullptr;        // [num_experts + 1] as GroupArgs made them
  const bf16* const* cuts = nullptr;      // [num_experts · num_cuts] this rank's cuts (MlpCut)
  int64_t max_pairs = 0;                  // at most so many pairs
  const int32_t* pair_rows = nullptr;     // [pairs]
  const float* pair_weights = nullptr;    // [pairs] router weights
  const bf16* x = nullptr;                // row r at x + r·hidden
  void* act = nullptr;                    // [pairs, num_cuts·padded neurons], laid out as the path likes: Ops::act_bytes of them
  Range rows;                             // of the step, which an expert has once at most; the sums of all of them are written
  ExactSum out;
};

// out[i] = x[rows[i]]. Shares: rows.
struct PickArgs {
  int64_t num_rows = 0;
  const int32_t* rows = nullptr;  // [num_rows]
  int64_t hidden = 0;
  const bf16* x = nullptr;
  bf16* out = nullptr;            // [num_rows, hidden]
};

// partials[own][row] = Σ_p partials[p][row], flags likewise, for rows that nobody else adds up. Shares: rows.
struct AddPartialsArgs {
  Range rows;
  int64_t hidden = 0;
  int num_partials = 0, own = 0;
  const int64_t* const* partials = nullptr;    // host [num_partials] each [rows, hidden]; the own one is written
  const uint8_t* const* flags = nullptr;       // host [num_partials] each [rows]
  bool plain = false;
};

// Rows of all homes but the own, from where their ranks have them: x[own][row] = x[home][row], and the same of the choices where there are any.
struct FetchRowsArgs {
  int num_homes = 0, own = 0;
  const Range* homes = nullptr;              // host [num_homes] rows of each, end to end
  int64_t hidden = 0, choices = 0;
  bf16* const* x = nullptr;                  // host [num_homes] each [rows, hidden]
  int32_t* const* ids = nullptr;             // host [num_homes] each [rows, choices], or null
  float* const* weights = nullptr;           // likewise
};

// One layer's KV of pages that the rank takes over from other ranks (or from another place of its own) when the layer's layout changes: the
// copies that for_each_kv_block lists. Sizes are multiples of 16 bytes.
struct CopyPagesArgs {
  int64_t num = 0;
  const PagePair* pairs = nullptr;          // [num]; to EP: of this home only
  bool to_tp = false;
  int32_t rank = 0, num_ranks = 0, num_kv_heads = 0;
  int64_t slice_bytes = 0;
  const std::byte* const* from = nullptr;   // host [num_ranks] the layer's KV in the old layout
  std::byte* to = nullptr;                  // the rank's in the new one
  // Of TP:
  const uint64_t* owners = nullptr;         // [num_kv_heads] ranks, as bits
  const int32_t* places = nullptr;          // [num_ranks, num_kv_heads] a head's number on a rank; −1: not there
  const int32_t* counts = nullptr;          // [num_ranks] heads on a rank
};

// How a row's token is chosen where nothing but temperature, min_p, top_k and top_p is asked for.
struct TokenChoice {
  float factor = 0;    // 1 ÷ temperature; 0: the largest, of equal ones the first
  float floor = 0;     // min_p: less likely ones than this, relative to the likeliest, are left out
  double uniform = 0;  // [0, 1): where in the cumulative distribution; tokens in order, or with top_k or top_p by falling weight
  int32_t top_k = 0;   // so many of the largest; 0: all
  float top_p = 1;     // of these, the fewest of the largest whose share of the total is at least that
};
// tokens[row] of rows whose logits lie with several ranks, by shares of the vocabulary; −1 where they are not all numbers. Shares: rows.
struct ChooseArgs {
  Range rows;
  int num_shares = 0;
  const float* const* shares = nullptr;  // host [num_shares] column c of row r at shares[s][r·stride + c − columns[s].begin]
  const Range* columns = nullptr;        // host [num_shares] end to end: the vocabulary
  int64_t stride = 0;
  const TokenChoice* choices = nullptr;  // [rows]
  int32_t* tokens = nullptr;             // [rows]
};

// What the kernels of a GPU are made for; models (and max_context) beyond are refused when the device is opened.
inline constexpr int kGpuMaxHeadDim = 256, kGpuHeadDimUnit = 8, kGpuMaxKvHeads = 256, kGpuMaxExperts = 1024, kGpuMaxVocab = 2 << 20,
                     kGpuMaxContext = 1 << 25;

// The kernels of one backend. One world uses one table: equality of bits holds among runs on the same table.
struct Ops {
  const char* name;
  size_t (*scratch_bytes)(const OpLimits&);  // per lane
  int64_t (*act_bytes)(int64_t pairs, int64_t width);  // of ExpertsArgs::act for up to so many pairs, width = num_cuts · padded neurons

  void (*embed)(const EmbedArgs&, const Lane&);
  void (*add_norm)(const AddNormArgs&, const Lane&);
  void (*linear)(const LinearArgs&, const Lane&);
  void (*rope_store)(const RopeStoreArgs&, const Lane&);
  void (*attention)(const AttentionArgs&, const Lane&);
  void (*exact_linear)(const ExactLinearArgs&, const Lane&);
  void (*route)(const RouteArgs&, const Lane&);
  void (*group_experts)(const GroupArgs&, const Lane&);  // by the first lane alone
  // act = bf16(silu(gate·x) · (up·x)) for every pair; on a GPU also out.sum = 0. Shares: (expert, cut, tile) units of equal cost.
  void (*experts_gate_up)(const ExpertsArgs&, const Lane&);
  // out.sum[row] = Σ fixed(weight · down·act), one contribution per (pair, cut). Shares: tiles of hidden.
  void (*experts_down)(const ExpertsArgs&, const Lane&);
  void (*pick_rows)(const PickArgs&, const Lane&);
  void (*clear)(void* to, size_t bytes, const Lane&);  // sets to 0; by the first lane alone

  // Null on the CPU, where the sampler does all, ranks read all partial sums, each copies its rows and blocks itself, and threads meet between
  // two ops.
  void (*choose_tokens)(const ChooseArgs&, const Lane&);
  void (*add_partials)(const AddPartialsArgs&, const Lane&);
  void (*fetch_rows)(const FetchRowsArgs&, const Lane&);
  void (*copy_pages)(const CopyPagesArgs&, const Lane&);
  void (*norm_linear)(const NormLinearArgs&, const Lane&);
  void (*rope_attention)(const RopeAttentionArgs&, const Lane&);
  void (*norm_route)(const NormRouteArgs&, const Lane&);

  // Null on a GPU: what follows works on the host. Sampling helpers over one row of float logits; called by one thread, order fixed.
  int64_t (*arg_max)(const float* x, int64_t n);                                        // lowest index wins; -1 when no element is a number
  float (*exp_sum)(const float* x, int64_t n, float shift, float factor, float* out);   // out[i] = exp((x[i] − shift)·factor) (out may be null), returns the sum

  // Benchmarks' floors: reads `bytes` once (returns a checksum), and runs `iterations` × a fixed block of bf16 dot products
  // from registers; returns the operations done (a multiply-add counts as two).
  uint64_t (*probe_read)(const void* data, size_t bytes);
  double (*probe_dot)(int64_t iterations);
};

}  // namespace moebius
