// A model as a plan sees it: its slices and their bytes, and what a row costs in each layer. Those that the engine serves are read by the
// engine's own reader and cut by its own geometry; GPT-OSS and DeepSeek-V3 are described here, as their checkpoints keep them.
#pragma once

#include <string>
#include <vector>

#include "lib/layout/slices.h"
#include "lib/model/config.h"

namespace moebius::plan {

// Weights of a layer's part: bytes as stored, multiply-adds of a row (which are not the same where weights are quantised).
struct Part {
  double bytes = 0, products = 0;
};

struct Model {
  std::string name;
  bool served = false;  // the engine runs it
  ModelConfig config;   // of a described one: what planning needs (shape, top_k, vocabulary, context)
  std::string note;     // how a described one is seen
  // Of one layer, whole.
  Part heads, keys;  // Q and O (and what else is divided by head groups); what goes with the KV heads
  Part expert;       // one
  Part dense;        // the MLP of a layer without experts
  Part shared;       // the expert that every row takes
  Part router;
  Part lm_head;
  double replicated_bytes = 0;  // embedding, LM head, norms, routers, all layers
  double kv_token_bytes = 0;    // K and V of a token for one KV head
  double pair_products = 0;     // of a row and a token that it attends to, all heads
  std::vector<int> windows;     // [layers] tokens that a row sees at most; 0: all

  const ModelShape& shape() const { return config.shape; }
  int num_layers() const { return shape().num_layers(); }
  SliceTable slices(int slices_per_expert) const;
  int64_t kv_slice_bytes(int page_tokens) const;

 private:
  friend Model parse_model(const std::string& text, const std::string& name);
  int quantised_block_ = 0;      // scales of `down` stand for so many neurons; a cut that begins inside a block has its scale too
  double down_scale_bytes_ = 0;  // of one such block, an expert's
};

// The name of a shipped one, a config.json, or a folder with one. Throws kNotFound, kUnsupported, kCorruptModel.
Model read_model(const std::string& name_or_path);
Model parse_model(const std::string& text, const std::string& name);

}  // namespace moebius::plan
