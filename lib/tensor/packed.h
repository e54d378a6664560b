// Geometry of packed weights: the one description shared by the loader, the layouts and every kernel.
//
// A matrix y[n] = Σ_k w[n][k]·x[k] is stored in tiles of 16 outputs; inside a tile, pairs of k are innermost, as a
// bf16 dot-product instruction takes them:   [n_pad/16][k_pad/2][16 outputs][2 of k]   bf16, zero-padded.
// A tile is read front to back once per block of rows, and a range of tiles is one contiguous range of bytes, so a
// product is divided over threads by tiles. The order along k is the same for every output.
//
// Slices (design: one slice is one contiguous block):
//   MLP cut of c neurons:   [c_pad/16 tiles][hidden/2][gate 16×2 | up 16×2]   then   down: packed matrix n = hidden, k = c_pad
//                           (gate and up of the same 16 neurons lie side by side, so silu(gate)·up needs no second pass)
//   attention group:        Q: packed n = heads·head_dim, k = hidden;   then   O: packed n = hidden, k = heads·head_dim
//   K/V projection:         K: packed n = head_dim, k = hidden;   then   V: the same
// KV slice (page, layer, KV head), page_tokens a multiple of 16:
//   K: [page_tokens/16][head_dim/2][16 tokens][2] bf16 (tokens take the place of outputs)   then   V: [page_tokens][head_dim] f16, times the layer's value_scale
#pragma once

#include <cstddef>
#include <cstdint>

#include "lib/base/numbers.h"
#include "lib/tensor/dtype.h"

namespace moebius {

inline constexpr int kTile = 16;  // outputs in a tile: the float lanes of one AVX-512 register

struct PackedMatrix {
  int64_t n = 0, k = 0;  // outputs, inputs: unpadded

  MOEBIUS_INLINE constexpr int64_t tiles() const { return div_up(n, kTile); }
  MOEBIUS_INLINE constexpr int64_t k_pairs() const { return div_up(k, 2); }
  MOEBIUS_INLINE constexpr int64_t tile_elements() const { return k_pairs() * 2 * kTile; }
  MOEBIUS_INLINE constexpr int64_t elements() const { return tiles() * tile_elements(); }
  MOEBIUS_INLINE constexpr int64_t bytes() const { return elements() * 2; }
  // Index of w[n][k] among the elements.
  MOEBIUS_INLINE constexpr int64_t index(int64_t ni, int64_t ki) const {
    return (ni / kTile) * tile_elements() + (ki / 2) * 2 * kTile + (ni % kTile) * 2 + ki % 2;
  }
};

struct MlpCut {
  int64_t neurons = 0, hidden = 0;

  MOEBIUS_INLINE constexpr int64_t padded() const { return round_up(neurons, kTile); }  // also the k of `down`: padding neurons are exactly 0
  MOEBIUS_INLINE constexpr int64_t tiles() const { return padded() / kTile; }
  MOEBIUS_INLINE constexpr int64_t gate_up_tile_elements() const { return div_up(hidden, 2) * 4 * kTile; }
  MOEBIUS_INLINE constexpr int64_t gate_up_elements() const { return tiles() * gate_up_tile_elements(); }
  MOEBIUS_INLINE constexpr PackedMatrix down() const { return {hidden, padded()}; }
  MOEBIUS_INLINE constexpr int64_t bytes() const { return (gate_up_elements() + down().elements()) * 2; }
  MOEBIUS_INLINE constexpr int64_t gate_index(int64_t neuron, int64_t ki) const {
    return (neuron / kTile) * gate_up_tile_elements() + (ki / 2) * 4 * kTile + (neuron % kTile) * 2 + ki % 2;
  }
  MOEBIUS_INLINE constexpr int64_t up_index(int64_t neuron, int64_t ki) const { return gate_index(neuron, ki) + 2 * kTile; }
};

struct AttentionGroup {
  int64_t heads = 0, head_dim = 0, hidden = 0;

  MOEBIUS_INLINE constexpr PackedMatrix q() const { return {heads * head_dim, hidden}; }
  MOEBIUS_INLINE constexpr PackedMatrix o() const { return {hidden, heads * head_dim}; }
  MOEBIUS_INLINE constexpr int64_t bytes() const { return q().bytes() + o().bytes(); }
};

struct KvProjection {
  int64_t head_dim = 0, hidden = 0;

  MOEBIUS_INLINE constexpr PackedMatrix k() const { return {head_dim, hidden}; }
  MOEBIUS_INLINE constexpr PackedMatrix v() const { return {head_dim, hidden}; }
  MOEBIUS_INLINE constexpr int64_t bytes() const { return k().bytes() + v().bytes(); }
};

struct KvSlice {
  int64_t page_tokens = 0, head_dim = 0;

  MOEBIUS_INLINE constexpr int64_t k_elements() const { return page_tokens * round_up(head_dim, 2); }
  MOEBIUS_INLINE constexpr int64_t bytes() const { return (k_elements() + page_tokens * head_dim) * 2; }
  MOEBIUS_INLINE constexpr int64_t k_index(int64_t slot, int64_t d) const {
    return (slot / kTile) * kTile * round_up(head_dim, 2) + (d / 2) * 2 * kTile + (slot % kTile) * 2 + d % 2;
  }
  MOEBIUS_INLINE constexpr int64_t v_index(int64_t slot, int64_t d) const { return k_elements() + slot * head_dim + d; }
};

}  // namespace moebius
