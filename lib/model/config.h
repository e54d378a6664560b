// config.json of a Hugging Face checkpoint, read into what the engine needs; anything it would have to ignore is refused.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "lib/layout/types.h"
#include "lib/model/files.h"

namespace moebius {

struct FamilyDescriptor;

struct ModelConfig {
  std::string family;                     // model_type, e.g. "qwen3_moe"
  const FamilyDescriptor* names = nullptr;  // static
  ModelShape shape;
  int32_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 0;
  double rope_theta = 0;
  bool tie_word_embeddings = false;
  bool qk_norm = false;                   // per-head RMS norm of q and k
  int32_t top_k = 0;                      // experts per token
  bool norm_topk_prob = false;            // the chosen experts' weights are made to sum to 1
  float softmax_scale = 0;                // of attention's scores: 1/√head_dim, or attention_multiplier
  float embedding_multiplier = 1;         // of embeddings
  float residual_multiplier = 1;          // of what attention and MLP add to the residual stream
  float logits_scaling = 1;               // what logits are divided by
  std::vector<int32_t> eos_token_ids;
  std::vector<std::string> unknown_keys;  // "key = value": neither read nor known to change nothing; worth a warning
};

// A family as data: how its keys and a layer's tensors are called, and its rules. {e}: expert. Of two spellings a model has either: that of
// checkpoints, and the one that transformers 5 has in memory.
struct FamilyDescriptor {
  const char* model_type;
  const char* architecture;
  const char* expert_count_keys[2];
  const char* expert_width_key;
  bool has_dense_layers = false;           // mlp_only_layers, decoder_sparse_step, dense width in intermediate_size
  bool qk_norm = false;
  bool always_renormalise = false;         // else norm_topk_prob says
  bool sliding_window_has_switch = false;  // use_sliding_window must be true for sliding_window to be active
  bool has_multipliers = false;            // of embeddings, scores, residual stream and logits
  const char* router[2];
  const char* experts[3] = {};             // gate, up, down of one expert; null: never one by one
  const char* fused_gate_up[2];            // of all experts: gate and up [E, 2I, H],
  const char* fused_down[2];               // down [E, H, I]
};

// Reads config.json and, for eos_token_id only, generation_config.json. Throws kNotFound, kUnsupported (a value that changes
// the arithmetic and is not implemented, by key and value) or kCorruptModel.
ModelConfig read_config(const ModelFiles& files);
inline ModelConfig read_config(const std::filesystem::path& model_dir) { return read_config(FolderFiles(model_dir)); }
// Refuses (kInvalidArgument) a config that computes anything else than `served`; end tokens are not compared. `name` is for messages.
void require_same_model(const ModelConfig& served, const ModelConfig& other, const std::string& name);
ModelConfig parse_config(std::string_view json_text, const std::string& file_name);

}  // namespace moebius
