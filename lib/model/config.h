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
  int rotary_dim = 0;                     // dimensions of a head that are turned, from the first on; even
  bool tie_word_embeddings = false;
  bool qkv_bias = false;                  // q, k and v have one
  bool qk_norm = false;                   // per-head RMS norm of q and k
  int32_t top_k = 0;                      // experts per token,
  int32_t num_shared = 0;                 // and shared ones, in every layer with experts
  bool norm_topk_prob = false;            // the chosen experts' weights are made to sum to 1,
  float routed_scaling_factor = 1;        // and then multiplied by this
  int num_prediction_layers = 0;          // of a checkpoint, behind the model's own layers; not read
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
  enum class Dense { kNone, kByStep, kFirst } dense = Dense::kNone;  // by mlp_only_layers and decoder_sparse_step, or first_k_dense_replace;
                                           // their width is intermediate_size
  enum class Shared { kNone, kWidth, kCount } shared = Shared::kNone;  // shared_expert_intermediate_size in all, or n_shared_experts
  enum class QkNorm { kNever, kAlways, kSwitch } qk_norm = QkNorm::kNever;  // kSwitch: use_qk_norm says
  const char* qkv_bias_key = nullptr;      // null: there are none
  bool qkv_bias_absent = false;            // what an absent key means
  bool always_renormalise = false;         // else norm_topk_prob says
  bool sliding_window_has_switch = false;  // use_sliding_window must be true for sliding_window to be active
  bool has_multipliers = false;            // of embeddings, scores, residual stream and logits
  bool has_partial_rotary = false;         // partial_rotary_factor, one half where it is absent
  bool has_prediction_layers = false;      // num_nextn_predict_layers behind the model's own, which are left out
  const char* router[2];
  const char* router_bias = nullptr;       // [E], for choosing: such a router's scores are sigmoids, times routed_scaling_factor
  const char* experts[3] = {};             // gate, up, down of one expert; null: never one by one
  const char* fused_gate_up[2];            // of all experts: gate and up [E, 2I, H],
  const char* fused_down[2];               // down [E, H, I]
  const char* shared_mlp[3] = {};          // gate, up, down of the shared experts together
  const char* shared_gate = nullptr;       // [1, H]
};

// Reads config.json and, for eos_token_id only, generation_config.json. Throws kNotFound, kUnsupported (a value that changes
// the arithmetic and is not implemented, by key and value) or kCorruptModel.
ModelConfig read_config(const ModelFiles& files);
inline ModelConfig read_config(const std::filesystem::path& model_dir) { return read_config(FolderFiles(model_dir)); }
// Refuses (kInvalidArgument) a config that computes anything else than `served`; end tokens are not compared. `name` is for messages.
void require_same_model(const ModelConfig& served, const ModelConfig& other, const std::string& name);
ModelConfig parse_config(std::string_view json_text, const std::string& file_name);

}  // namespace moebius
