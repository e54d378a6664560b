// Work on single rows: embedding, norms with the residual sum, rotary embedding and KV store, router, sampling helpers.
#pragma once

#include "lib/cpu/math.h"

namespace MOEBIUS_ISA {

void embed(const EmbedArgs& args, const Lane& lane) {
  const Range share = share_of(args.rows.size(), lane.thread, lane.num_threads);
  const int64_t tile_elements = PackedMatrix{kTile, args.hidden}.tile_elements();
  for (int64_t row = args.rows.begin + share.begin; row < args.rows.begin + share.end; ++row) {
    const int64_t token = args.tokens[row];
    float* h = args.h + row * args.hidden;
    if (token < 0) {
      for (int64_t i = 0; i < args.hidden; ++i) h[i] = 0;
    } else if (args.table != nullptr) {
      const bf16* e = args.table + token * args.hidden;
      for (int64_t i = 0; i < args.hidden; ++i) h[i] = to_float(e[i]) * args.multiplier;
    } else {
      const bf16* e = args.packed + token / kTile * tile_elements + token % kTile * 2;
      for (int64_t i = 0; i < args.hidden; ++i) h[i] = to_float(e[i / 2 * 2 * kTile + i % 2]) * args.multiplier;
    }
  }
}

// The sums of all partials as floats: one rounding from integer to double, the factor, one rounding to float.
MOEBIUS_INLINE void add_partials(const AddNormArgs& args, int64_t row, float* h) {
  bool bad = false;
  for (int p = 0; p < args.num_partials; ++p) bad |= __atomic_load_n(args.flags[p] + row, __ATOMIC_RELAXED) != 0;
  const double factor = args.factor;
  const int64_t at = row * args.hidden;
  if (bad) {
    for (int64_t i = 0; i < args.hidden; ++i) h[i] = __builtin_nanf("");
  } else if (args.plain) {
    for (int p = 0; p < args.num_partials; ++p) {
      const float* sum = reinterpret_cast<const float*>(args.partials[p]) + at;
      for (int64_t i = 0; i < args.hidden; ++i) h[i] += sum[i] * args.factor;
    }
  } else if (args.num_partials == 1) {
    const int64_t* sum = args.partials[0] + at;
    for (int64_t i = 0; i < args.hidden; ++i) h[i] += static_cast<float>(static_cast<double>(sum[i]) * factor);
  } else {
    constexpr int64_t kBlock = 64;
    for (int64_t b = 0; b < args.hidden; b += kBlock) {
      const int64_t n = args.hidden - b < kBlock ? args.hidden - b : kBlock;
      uint64_t sum[kBlock] = {};  // wraps freely: only whole contributions are tested
      for (int p = 0; p < args.num_partials; ++p)
        for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<uint64_t>(args.partials[p][at + b + i]);
      for (int64_t i = 0; i < n; ++i) h[b + i] += static_cast<float>(static_cast<double>(static_cast<int64_t>(sum[i])) * factor);
    }
  }
}

void add_norm(const AddNormArgs& args, const Lane& lane) {
  const Range share = share_of(args.rows.size(), lane.thread, lane.num_threads);
  for (int64_t row = args.rows.begin + share.begin; row < args.rows.begin + share.end; ++row) {
    float* h = args.h + row * args.hidden;
    if (args.num_partials > 0) add_partials(args, row, h);
    if (args.weight == nullptr) continue;
    const float mean = sum_of_squares(h, args.hidden) / static_cast<float>(args.hidden);
    const float factor = 1.0f / __builtin_sqrtf(mean + args.eps);
    bf16* x = args.x + row * args.hidden;
    float* x_float = args.x_float != nullptr ? args.x_float + row * args.hidden : nullptr;
    for (int64_t i = 0; i < args.hidden; ++i) {
      const float v = h[i] * factor * args.weight[i];
      x[i] = to_bf16(v);
      if (x_float != nullptr) x_float[i] = v;
    }
  }
}

// One head: RMS norm (if any), then halves rotated: (a, b) → (a·cos − b·sin, b·cos + a·sin).
MOEBIUS_INLINE void norm_and_rotate(const float* in, int64_t dim, const float* norm, float eps, const float* rope, float* out) {
  float factor = 1;
  if (norm != nullptr) factor = 1.0f / __builtin_sqrtf(sum_of_squares(in, dim) / static_cast<float>(dim) + eps);
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    float a = in[i], b = in[i + half];
    if (norm != nullptr) a = a * factor * norm[i], b = b * factor * norm[i + half];
    const float c = rope[i], s = rope[half + i];
    out[i] = a * c - b * s;
    out[i + half] = b * c + a * s;
  }
}

MOEBIUS_INLINE void round_row(const float* in, int64_t n, bf16* out) {
  int64_t i = 0;
  for (; i + kTile <= n; i += kTile) Vec::store_bf16(out + i, Vec::load(in + i));
  for (; i < n; ++i) out[i] = to_bf16(in[i]);
}

// in + bias, in `room`; where there is none, as it lies.
MOEBIUS_INLINE const float* with_bias(const float* in, const float* bias, int64_t n, float* room) {
  if (bias == nullptr) return in;
  for (int64_t i = 0; i < n; ++i) room[i] = in[i] + bias[i];
  return room;
}

void rope_store(const RopeStoreArgs& args, const Lane& lane) {
  const int64_t dim = args.kv.head_dim, kv_heads = args.kv.num_kv_heads, heads = args.num_heads + kv_heads;
  const KvSlice slice{args.kv.page_tokens, dim};
  const Range units = share_of(args.rows.size() * heads, lane.thread, lane.num_threads);
  float* const rotated = reinterpret_cast<float*>(lane.scratch);
  bf16* const keys = reinterpret_cast<bf16*>(rotated + dim);
  float* const room = rotated + 2 * dim;
  for (int64_t u = units.begin; u < units.end; ++u) {
    const int64_t row = args.rows.begin + u / heads, head = u % heads;
    const RowPlace& place = args.places[row];
    const float* rope = args.rope + static_cast<int64_t>(place.position) * dim;
    if (head < args.num_heads) {
      const float* const in = with_bias(args.q + (row * args.num_heads + head) * dim, args.q_bias == nullptr ? nullptr : args.q_bias + head * dim, dim, room);
      norm_and_rotate(in, dim, args.q_norm, args.eps, rope, rotated);
      bf16* q = args.q_out + (row * args.num_heads + head) * dim;
      round_row(rotated, dim, q);
      continue;
    }
    const int64_t j = head - args.num_heads, slot = place.position % args.kv.page_tokens;
    const int64_t page = place.pages[place.position / args.kv.page_tokens];
    bf16* kv = reinterpret_cast<bf16*>(args.kv.base + (page * kv_heads + j) * slice.bytes());
    const float* const k = with_bias(args.k + (row * kv_heads + j) * dim, args.k_bias == nullptr ? nullptr : args.k_bias + j * dim, dim, room);
    norm_and_rotate(k, dim, args.k_norm, args.eps, rope, rotated);
    round_row(rotated, dim, keys);
    Pair* column = reinterpret_cast<Pair*>(kv + slice.k_index(slot, 0));
    for (int64_t p = 0; p < dim / 2; ++p) column[p * kTile] = reinterpret_cast<const Pair*>(keys)[p];
    const float* const v = with_bias(args.v + (row * kv_heads + j) * dim, args.v_bias == nullptr ? nullptr : args.v_bias + j * dim, dim, room);
    f16* values = kv + slice.v_index(slot, 0);
    int64_t i = 0;
    for (; i + kTile <= dim; i += kTile) Vec::store_half(values + i, Vec::mul(Vec::load(v + i), Vec::set1(args.value_scale)));
    for (; i < dim; ++i) values[i] = to_half(v[i] * args.value_scale);
  }
}

// ---- router

constexpr int kRouterTiles = 4, kRouterRows = Vec::kRows >= 12 ? 4 : 1;  // chains side by side: one alone waits for each fma

// logits[r][tile c] of R rows: all in float, chains along k in order.
template <int R, int C>
MOEBIUS_INLINE void router_tiles(const float* x, const bf16* w, int64_t tile_elements, int64_t hidden, float* logits, int64_t stride) {
  F acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = Vec::zero();
  for (int64_t p = 0; p < hidden / 2; ++p) {
    F even[C], odd[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) Vec::widen(w + c * tile_elements + p * 2 * kTile, even[c], odd[c]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F a = Vec::set1(x[r * hidden + 2 * p]), b = Vec::set1(x[r * hidden + 2 * p + 1]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = Vec::fma(odd[c], b, Vec::fma(even[c], a, acc[r][c]));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) Vec::store(logits + r * stride + c * kTile, acc[r][c]);
}

// A row's experts from its logits p, padded to whole tiles, those of experts and then those of what gates_shared; p is used up. room: of as many
// tiles.
MOEBIUS_INLINE void choose_experts(const RouteArgs& args, float* p, float* room, int32_t* ids, float* weights) {
  const RouteRule& rule = args.rule;
  const int tiles = static_cast<int>(div_up(rule.num_experts, kTile)), last = rule.num_experts - (tiles - 1) * kTile;
  for (int i = 0; i < rule.num_shared; ++i) {
    Vec::store(room, rule.gates_shared ? sigmoid(Vec::load(p + tiles * kTile)) : Vec::set1(1.0f));
    ids[rule.top_k + i] = rule.num_experts + i;
    weights[rule.top_k + i] = room[0];
  }
  const auto size_of = [&](int t) MOEBIUS_INLINE_LAMBDA { return t + 1 < tiles ? kTile : last; };
  const auto load = [&](int t) MOEBIUS_INLINE_LAMBDA { return Vec::load_n(p + t * kTile, size_of(t), -kInfinity); };
  // p becomes what is compared, −∞ where nothing is or is left; scores are p where nothing else is asked for.
  float* const scores = rule.sigmoid || args.bias != nullptr ? room : p;
  float sum = 1;
  if (rule.sigmoid) {
    for (int t = 0; t < tiles; ++t) Vec::store(scores + t * kTile, sigmoid(load(t)));
  } else {
    F most = Vec::set1(-kInfinity);
    for (int t = 0; t < tiles; ++t) most = Vec::max(load(t), most);  // NaN never wins
    const F shift = Vec::set1(Vec::max_of(most));
    F sums = Vec::zero();
    for (int t = 0; t < tiles; ++t) {
      const F v = exp_of(Vec::sub(load(t), shift));
      Vec::store(scores + t * kTile, v);
      sums = Vec::add(sums, Vec::select_first(size_of(t), v, Vec::zero()));
    }
    sum = Vec::sum(sums);
  }
  F compared = Vec::zero();
  for (int t = 0; t < tiles; ++t) {
    F v = Vec::load(scores + t * kTile);
    if (args.bias != nullptr) v = Vec::add(v, Vec::load_n(args.bias + t * kTile, size_of(t), 0));
    Vec::store(p + t * kTile, Vec::select_first(size_of(t), v, Vec::set1(-kInfinity)));
    compared = Vec::add(compared, Vec::select_first(size_of(t), v, Vec::zero()));
  }
  if (const float all = Vec::sum(compared); all != all) sum = all;  // NaN of one expert is the row's, though nobody chooses it
  float chosen = rule.sigmoid ? kLeastScores : 0;
  for (int i = 0; i < rule.top_k; ++i) {
    F best = Vec::set1(-kInfinity);
    for (int t = 0; t < tiles; ++t) best = Vec::max(Vec::load(p + t * kTile), best);
    const float value = Vec::max_of(best);
    int id = 0;
    if (value > -kInfinity) {  // the lower index wins a tie; NaN and −∞ are not greater
      for (int t = 0;; ++t)
        if (const uint32_t hit = Vec::equal(Vec::load(p + t * kTile), Vec::set1(value)); hit != 0) {
          id = t * kTile + __builtin_ctz(hit);
          break;
        }
    } else {  // only NaN is left: the lowest that has not been taken
      for (int j = 0; j < i; ++j)
        if (ids[j] == id) ++id, j = -1;
    }
    const float score = scores[id];
    ids[i] = id;
    weights[i] = score / sum;
    chosen += score;
    p[id] = -kInfinity;
  }
  for (int i = 0; i < rule.top_k; ++i) weights[i] = (rule.renormalise ? weights[i] * sum / chosen : weights[i]) * rule.scale;
}

void route(const RouteArgs& args, const Lane& lane) {
  const PackedMatrix m{args.rule.num_experts, args.hidden};
  const Range share = share_of(args.rows.size(), lane.thread, lane.num_threads);
  const int64_t tiles = m.tiles() + args.rule.gates_shared, stride = tiles * kTile, choices = args.rule.choices();
  float* const p = reinterpret_cast<float*>(lane.scratch);  // [kRouterRows + 1, stride]
  for (int64_t row = args.rows.begin + share.begin, n; row < args.rows.begin + share.end; row += n) {
    const int64_t left = args.rows.begin + share.end - row;
    n = left < kRouterRows ? left : kRouterRows;
    with_rows<kRouterRows>(n, [&]<int R>() MOEBIUS_INLINE_LAMBDA {
      const float* x = args.x + row * args.hidden;
      int64_t t = 0;
      for (; t + kRouterTiles <= tiles; t += kRouterTiles)
        router_tiles<R, kRouterTiles>(x, args.w + t * m.tile_elements(), m.tile_elements(), args.hidden, p + t * kTile, stride);
      for (; t < tiles; ++t) router_tiles<R, 1>(x, args.w + t * m.tile_elements(), m.tile_elements(), args.hidden, p + t * kTile, stride);
    });
    for (int64_t r = 0; r < n; ++r)
      choose_experts(args, p + r * stride, p + n * stride, args.ids + (row + r) * choices, args.weights + (row + r) * choices);
  }
}

// A counting sort.
void group_experts(const GroupArgs& args, const Lane& lane) {
  if (lane.thread != 0) return;
  const int32_t rows = static_cast<int32_t>(args.rows.size());
  if (args.local_of_expert == nullptr) {
    args.begins[0] = 0;
    args.begins[1] = rows;
    for (int32_t i = 0; i < rows; ++i) args.pair_rows[i] = static_cast<int32_t>(args.rows.begin) + i, args.pair_weights[i] = 1.0f;
    *args.experts_reached += rows > 0;
    return;
  }
  // begins[e + 1] counts the pairs of e, then holds where its next pair goes, and so ends where those of e do.
  for (int32_t e = 0; e <= args.num_experts; ++e) args.begins[e] = 0;
  const int64_t first = args.rows.begin * args.choices, last = args.rows.end * args.choices;
  const auto local_of = [&](int64_t i) MOEBIUS_INLINE_LAMBDA {
    const int32_t id = args.ids[i];
    const bool counts = (args.tokens == nullptr || args.tokens[i / args.choices] >= 0) && (id < args.num_routed || args.shared_rows.contains(i / args.choices));
    return counts ? args.local_of_expert[id] : -1;
  };
  for (int64_t i = first; i < last; ++i)
    if (const int32_t local = local_of(i); local >= 0) ++args.begins[local + 1];
  int32_t at = 0;
  for (int32_t e = 0; e < args.num_experts; ++e) {
    const int32_t count = args.begins[e + 1];
    args.begins[e + 1] = at;
    at += count;
    *args.experts_reached += count > 0;
  }
  for (int64_t i = first; i < last; ++i)
    if (const int32_t local = local_of(i); local >= 0) {
      const int32_t to = args.begins[local + 1]++;
      args.pair_rows[to] = static_cast<int32_t>(i / args.choices);
      args.pair_weights[to] = args.weights[i];
    }
}

void pick_rows(const PickArgs& args, const Lane& lane) {
  const Range share = share_of(args.num_rows, lane.thread, lane.num_threads);
  for (int64_t i = share.begin; i < share.end; ++i)
    __builtin_memcpy(args.out + i * args.hidden, args.x + args.rows[i] * args.hidden, static_cast<size_t>(args.hidden) * sizeof(bf16));
}

void clear(void* to, size_t bytes, const Lane& lane) {
  if (lane.thread == 0) __builtin_memset(to, 0, bytes);
}

// ---- sampling helpers

int64_t arg_max(const float* x, int64_t n) {
  F best = Vec::set1(-kInfinity);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) best = Vec::max(Vec::load(x + i), best);  // `best` wins where the new one is NaN
  if (i < n) best = Vec::max(Vec::load_n(x + i, static_cast<int>(n - i), -kInfinity), best);
  const F most = Vec::set1(Vec::max_of(best));
  for (i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? static_cast<int>(n - i) : 16;
    uint32_t hit = Vec::equal(count == 16 ? Vec::load(x + i) : Vec::load_n(x + i, count, -kInfinity), most);
    if (count < 16) hit &= (1u << count) - 1;
    if (hit != 0) return i + __builtin_ctz(hit);
  }
  return -1;
}

float exp_sum(const float* x, int64_t n, float shift, float factor, float* out) {
  F sums = Vec::zero();
  for (int64_t i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? static_cast<int>(n - i) : 16;
    const F v = count == 16 ? Vec::load(x + i) : Vec::load_n(x + i, count, -kInfinity);
    F e = exp_of(Vec::mul(Vec::sub(v, Vec::set1(shift)), Vec::set1(factor)));
    if (count < 16) e = Vec::select_first(count, e, Vec::zero());
    if (out != nullptr) Vec::store_n(out + i, e, count);
    sums = Vec::add(sums, e);
  }
  return Vec::sum(sums);
}

}  // namespace MOEBIUS_ISA
