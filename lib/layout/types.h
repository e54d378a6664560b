// The words of the heart: what a model's slices depend on, and which layouts exist. Plain data.
#pragma once

#include <cstdint>
#include <vector>

namespace moebius {

// A layer runs in tensor parallelism or in expert parallelism (with data-parallel attention).
enum class Layout : int32_t { kTp = 0, kEp = 1 };

inline Layout other(Layout layout) { return layout == Layout::kTp ? Layout::kEp : Layout::kTp; }
// The layout that gains layers when the seam goes from `seam` to `target` of num_layers; where it stays, the one at that end.
inline Layout layout_towards(int seam, int target, int num_layers) {
  return target > seam || (target == seam && seam == num_layers) ? Layout::kTp : Layout::kEp;
}
inline const char* name_of(Layout layout) { return layout == Layout::kTp ? "tp" : "ep"; }

// The MLP of one layer: num_experts experts of `intermediate` neurons each, and num_shared more that every row goes through (a shared MLP of
// so many times the width, cut into experts); or one dense MLP (num_experts = 0).
struct MlpShape {
  int num_experts = 0;
  int intermediate = 0;
  int num_shared = 0;

  int all_experts() const { return num_experts + num_shared; }
};

// Everything about a model that fixes its slices and their sizes.
struct ModelShape {
  int hidden = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  std::vector<MlpShape> mlps;  // [num_layers]

  int num_layers() const { return static_cast<int>(mlps.size()); }
};

}  // namespace moebius
