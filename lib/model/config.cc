#include "lib/model/config.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <unordered_set>

#include "lib/base/error.h"
#include "lib/base/fixed_text.h"
#include "lib/base/json_tree.h"
#include "lib/model/config_keys.h"

namespace moebius {
namespace {

using nlohmann::json;

constexpr FamilyDescriptor kFamilies[] = {
    {.model_type = "qwen3_moe",
     .architecture = "Qwen3MoeForCausalLM",
     .expert_count_keys = {"num_experts", "num_local_experts"},
     .expert_width_key = "moe_intermediate_size",
     .dense = FamilyDescriptor::Dense::kByStep,
     .qk_norm = FamilyDescriptor::QkNorm::kAlways,
     .sliding_window_has_switch = true,
     .router = {"mlp.gate.weight"},
     .experts = {"mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight"},
     .fused_gate_up = {"mlp.experts.gate_up_proj"},
     .fused_down = {"mlp.experts.down_proj"}},
    {.model_type = "qwen2_moe",
     .architecture = "Qwen2MoeForCausalLM",
     .expert_count_keys = {"num_experts", "num_local_experts"},
     .expert_width_key = "moe_intermediate_size",
     .dense = FamilyDescriptor::Dense::kByStep,
     .shared = FamilyDescriptor::Shared::kWidth,
     .qkv_bias_key = "qkv_bias",
     .qkv_bias_absent = true,
     .sliding_window_has_switch = true,
     .router = {"mlp.gate.weight"},
     .experts = {"mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight"},
     .fused_gate_up = {"mlp.experts.gate_up_proj"},
     .fused_down = {"mlp.experts.down_proj"},
     .shared_mlp = {"mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight", "mlp.shared_expert.down_proj.weight"},
     .shared_gate = "mlp.shared_expert_gate.weight"},
    {.model_type = "mixtral",
     .architecture = "MixtralForCausalLM",
     .expert_count_keys = {"num_local_experts", "num_experts"},
     .expert_width_key = "intermediate_size",
     .always_renormalise = true,
     .router = {"block_sparse_moe.gate.weight", "mlp.gate.weight"},
     .experts = {"block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight", "block_sparse_moe.experts.{e}.w2.weight"},
     .fused_gate_up = {"mlp.experts.gate_up_proj"},
     .fused_down = {"mlp.experts.down_proj"}},
    {.model_type = "glm4_moe",
     .architecture = "Glm4MoeForCausalLM",
     .expert_count_keys = {"n_routed_experts", "num_local_experts"},
     .expert_width_key = "moe_intermediate_size",
     .dense = FamilyDescriptor::Dense::kFirst,
     .shared = FamilyDescriptor::Shared::kCount,
     .qk_norm = FamilyDescriptor::QkNorm::kSwitch,
     .qkv_bias_key = "attention_bias",
     .has_partial_rotary = true,
     .has_prediction_layers = true,
     .router = {"mlp.gate.weight"},
     .router_bias = "mlp.gate.e_score_correction_bias",
     .experts = {"mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight"},
     .fused_gate_up = {"mlp.experts.gate_up_proj"},
     .fused_down = {"mlp.experts.down_proj"},
     .shared_mlp = {"mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.down_proj.weight"}},
    {.model_type = "granitemoe",
     .architecture = "GraniteMoeForCausalLM",
     .expert_count_keys = {"num_local_experts", "num_experts"},
     .expert_width_key = "intermediate_size",
     .always_renormalise = true,
     .has_multipliers = true,
     .router = {"block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"},
     .fused_gate_up = {"block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"},
     .fused_down = {"block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"}},
};

// What FamilyDescriptor::has_multipliers asks for.
struct Multiplier {
  const char* key;
  float ModelConfig::*value;
};
constexpr Multiplier kMultipliers[] = {{"embedding_multiplier", &ModelConfig::embedding_multiplier},
                                       {"attention_multiplier", &ModelConfig::softmax_scale},
                                       {"residual_multiplier", &ModelConfig::residual_multiplier},
                                       {"logits_scaling", &ModelConfig::logits_scaling}};

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, utf8_prefix(text, 77)) + "...";
}

// One config object with its file's name for messages. Null counts as absent.
class Reader {
 public:
  Reader(const json& object, const std::string& file) : object_(object), file_(file) {
    if (!object.is_object()) fail(Code::kCorruptModel, "{}: the top level is not an object", file);
  }
  bool has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }
  const json& at(const char* key) const {
    if (!has(key)) fail(Code::kCorruptModel, "{}: {} is missing", file_, key);
    return object_[key];
  }
  int64_t integer(const char* key, int64_t least, int64_t most) const {
    const json& v = at(key);
    if (!v.is_number_integer() || (v.is_number_unsigned() && v.get<uint64_t>() > static_cast<uint64_t>(most)) ||
        v.get<int64_t>() < least || v.get<int64_t>() > most)
      fail(Code::kCorruptModel, "{}: {} is {}, must be an integer from {} to {}", file_, key, shown(v), least, most);
    return v.get<int64_t>();
  }
  int64_t integer_or(const char* key, int64_t absent, int64_t least, int64_t most) const {
    return has(key) ? integer(key, least, most) : absent;
  }
  double positive(const char* key) const { return positive(at(key), key); }
  double positive(const json& v, const char* key) const {
    if (!v.is_number() || !(v.get<double>() > 0) || !(v.get<double>() < 1e30))
      fail(Code::kCorruptModel, "{}: {} is {}, must be a positive number", file_, key, shown(v));
    return v.get<double>();
  }
  bool flag_or(const char* key, bool absent) const {
    if (!has(key)) return absent;
    if (!object_[key].is_boolean()) fail(Code::kCorruptModel, "{}: {} is {}, must be true or false", file_, key, shown(object_[key]));
    return object_[key].get<bool>();
  }
  std::string text_or(const char* key, const std::string& absent) const {
    if (!has(key)) return absent;
    if (!object_[key].is_string()) fail(Code::kCorruptModel, "{}: {} is {}, must be a string", file_, key, shown(object_[key]));
    return object_[key].get<std::string>();
  }
  [[noreturn]] void refuse(const char* key, const json& value) const {
    fail(Code::kUnsupported, "{}: {} = {} is not implemented", file_, key, shown(value));
  }
  void refuse_unless(const char* key, const json& wanted) const {
    if (has(key) && object_[key] != wanted) refuse(key, object_[key]);
  }
  const std::string& file() const { return file_; }
  const json& object() const { return object_; }

 private:
  const json& object_;
  const std::string& file_;
};

std::string known_families() {
  std::string out;
  for (const FamilyDescriptor& f : kFamilies) out += (out.empty() ? "" : ", ") + std::string(f.model_type);
  return out;
}

// (Comparing with a literal would make a JSON string of it, where a failure of memory ends the process.)
bool is_text(const json& value, std::string_view text) { return value.is_string() && value.get_ref<const std::string&>() == text; }

const FamilyDescriptor& family_of(const Reader& c) {
  const std::string type = c.text_or("model_type", "");
  for (const FamilyDescriptor& f : kFamilies) {
    if (type != f.model_type) continue;
    if (c.has("architectures")) {
      const json& a = c.at("architectures");
      if (!a.is_array() || a.size() != 1 || !is_text(a[0], f.architecture)) c.refuse("architectures", a);
    }
    return f;
  }
  fail(Code::kUnsupported, "{}: model_type '{}' is not supported; supported are {}", c.file(), type, known_families());
}

// Of the keys that are refused elsewhere.
bool reads(const FamilyDescriptor& family, std::string_view key) {
  using F = FamilyDescriptor;
  const auto is = [&](const Multiplier& m) { return key == m.key; };
  if (family.has_multipliers && std::any_of(std::begin(kMultipliers), std::end(kMultipliers), is)) return true;
  if (family.qkv_bias_key != nullptr && key == family.qkv_bias_key) return true;
  return key == family.expert_count_keys[0] || (family.dense == F::Dense::kFirst && key == "first_k_dense_replace") ||
         (family.shared == F::Shared::kWidth && key == "shared_expert_intermediate_size") ||
         (family.shared == F::Shared::kCount && key == "n_shared_experts") || (family.has_partial_rotary && key == "partial_rotary_factor") ||
         (family.has_prediction_layers && key == "num_nextn_predict_layers") || (family.router_bias != nullptr && key == "routed_scaling_factor");
}

void refuse_other_arithmetic(const Reader& c, const FamilyDescriptor& family) {
  for (const NeutralKey& k : kNeutralKeys) {
    if (!c.has(k.key) || reads(family, k.key)) continue;
    const JsonTree neutral(json::parse(k.neutral));
    if (std::find(neutral.root().begin(), neutral.root().end(), c.at(k.key)) == neutral.root().end()) c.refuse(k.key, c.at(k.key));
  }
  if (family.qk_norm != FamilyDescriptor::QkNorm::kSwitch)
    for (const char* key : {"use_qk_norm", "qk_layernorm"}) c.refuse_unless(key, family.qk_norm == FamilyDescriptor::QkNorm::kAlways);
  if (c.has("layer_types"))
    for (const json& t : c.at("layer_types"))
      if (!is_text(t, "full_attention")) c.refuse("layer_types", c.at("layer_types"));
  const bool active = c.has("sliding_window") && (!family.sliding_window_has_switch || c.flag_or("use_sliding_window", false));
  if (active) c.refuse("sliding_window", c.at("sliding_window"));
  if (family.sliding_window_has_switch && c.flag_or("use_sliding_window", false)) c.refuse("use_sliding_window", true);
  for (const char* key : {"dtype", "torch_dtype"})
    if (const std::string type = c.text_or(key, "bfloat16"); type != "bfloat16" && type != "float16" && type != "float32")
      c.refuse(key, type);
}

std::vector<std::string> unknown_keys(const Reader& c) {
  std::vector<std::string> out;
  for (const auto& [key, value] : c.object().items()) {
    const auto is = [&k = key](const char* known) { return k == known; };
    if (std::any_of(std::begin(kKnownKeys), std::end(kKnownKeys), is) ||
        std::any_of(std::begin(kNeutralKeys), std::end(kNeutralKeys), [&](const NeutralKey& n) { return is(n.key); }))
      continue;
    out.push_back(fmt::format("{} = {}", key, shown(value)));
  }
  return out;
}

// Either spelling may hold it, or both the same one; 0: neither does.
double rope_value(const Reader& c, const char* key) {
  std::vector<double> found;
  if (c.has(key)) found.push_back(c.positive(key));
  for (const char* place : {"rope_parameters", "rope_scaling"})
    if (c.has(place) && c.at(place).contains(key)) found.push_back(c.positive(c.at(place)[key], key));
  for (double value : found)
    if (value != found[0]) fail(Code::kCorruptModel, "{}: {} is {} in one place and {} in another", c.file(), key, found[0], value);
  return found.empty() ? 0 : found[0];
}

void read_rope(const Reader& c, const FamilyDescriptor& family, ModelConfig& m) {
  const auto refuse_scaling = [&](const char* key) {
    if (!c.has(key)) return;
    const json& r = c.at(key);
    if (!r.is_object()) fail(Code::kCorruptModel, "{}: {} is {}, must be an object", c.file(), key, shown(r));
    for (const auto& [name, value] : r.items()) {
      const bool type = name == "rope_type" || name == "type";
      if (type && is_text(value, "default")) continue;
      if (name == "rope_theta" || value.is_null() || (name == "factor" && value == 1.0)) continue;
      if (name == "partial_rotary_factor" && (family.has_partial_rotary || value == 1.0)) continue;
      fail(Code::kUnsupported, "{}: {}.{} = {} is not implemented", c.file(), key, name, shown(value));
    }
  };
  refuse_scaling("rope_scaling");
  refuse_scaling("rope_parameters");
  m.rope_theta = rope_value(c, "rope_theta");
  if (m.rope_theta == 0) fail(Code::kCorruptModel, "{}: rope_theta is missing", c.file());
  double factor = 1;
  if (family.has_partial_rotary)
    if (factor = rope_value(c, "partial_rotary_factor"); factor == 0) factor = 0.5;
  m.rotary_dim = static_cast<int>(m.shape.head_dim * std::min(factor, 2.0));
  if (factor > 1 || m.rotary_dim < 2 || m.rotary_dim % 2 != 0)
    fail(Code::kUnsupported, "{}: partial_rotary_factor {} turns {} of a head's {} dimensions, which must be an even number of them", c.file(), factor,
         m.rotary_dim, m.shape.head_dim);
}

void read_eos(const Reader& c, int32_t vocab, std::vector<int32_t>& out) {
  if (!c.has("eos_token_id")) return;
  std::unordered_set<int32_t> known(out.begin(), out.end());
  const auto add = [&](const json& id) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab)
      fail(Code::kCorruptModel, "{}: eos_token_id {} is outside the vocabulary of {}", c.file(), shown(id), vocab);
    const auto token = id.get<int32_t>();
    if (known.insert(token).second) out.push_back(token);
  };
  const json& v = c.at("eos_token_id");
  if (v.is_array()) std::for_each(v.begin(), v.end(), add);
  else add(v);
}

// Generous bounds: beyond them a config is damaged or hostile, and sizes computed from it would not be safe.
constexpr int64_t kMaxLayers = 4096, kMaxExperts = 65536, kMaxWidth = 1 << 20, kMaxHeads = 8192, kMaxVocab = 1 << 24,
                  kMaxContext = int64_t{1} << 31, kMaxTopK = 64;

// Shared experts of a layer, each as wide as its others.
int num_shared_of(const Reader& c, const FamilyDescriptor& family) {
  constexpr int64_t kMaxShared = 64;
  if (family.shared == FamilyDescriptor::Shared::kNone) return 0;
  if (family.shared == FamilyDescriptor::Shared::kCount) return static_cast<int>(c.integer("n_shared_experts", 1, kMaxShared));
  const int64_t each = c.integer(family.expert_width_key, 1, kMaxWidth), all = c.integer("shared_expert_intermediate_size", 1, kMaxWidth);
  if (all % each != 0 || all / each > kMaxShared)
    fail(Code::kUnsupported, "{}: shared_expert_intermediate_size {} is not 1 to {} times {} {}", c.file(), all, kMaxShared, family.expert_width_key, each);
  return static_cast<int>(all / each);
}

std::vector<MlpShape> mlps_of(const Reader& c, const FamilyDescriptor& family, int64_t layers, int experts) {
  const auto width = static_cast<int>(c.integer(family.expert_width_key, 1, kMaxWidth));
  std::vector<MlpShape> out(static_cast<size_t>(layers), MlpShape{experts, width, num_shared_of(c, family)});
  const auto dense_width = [&] { return static_cast<int>(c.integer("intermediate_size", 1, kMaxWidth)); };
  if (family.dense == FamilyDescriptor::Dense::kFirst) {
    const int64_t first = c.integer("first_k_dense_replace", 0, kMaxLayers);
    for (int64_t l = 0; l < std::min(first, layers); ++l) out[static_cast<size_t>(l)] = {0, dense_width()};
  }
  if (family.dense != FamilyDescriptor::Dense::kByStep) {
    if (family.shared != FamilyDescriptor::Shared::kNone && out.back().num_shared > 0 && experts == 0)
      fail(Code::kCorruptModel, "{}: {} is 0, but layer {} is none of the dense ones", c.file(), family.expert_count_keys[0], layers - 1);
    return out;
  }
  const int64_t step = c.integer_or("decoder_sparse_step", 1, 1, kMaxLayers);
  std::vector<bool> dense(static_cast<size_t>(layers), false);
  if (c.has("mlp_only_layers")) {
    const json& list = c.at("mlp_only_layers");
    if (!list.is_array()) fail(Code::kCorruptModel, "{}: mlp_only_layers is {}, must be a list", c.file(), shown(list));
    for (const json& l : list) {
      if (!l.is_number_integer() || l.get<int64_t>() < 0 || l.get<int64_t>() >= layers)
        fail(Code::kCorruptModel, "{}: mlp_only_layers holds {}, the model has {} layers", c.file(), shown(l), layers);
      dense[l.get<size_t>()] = true;
    }
  }
  for (int64_t l = 0; l < layers; ++l)
    if (dense[static_cast<size_t>(l)] || (l + 1) % step != 0 || experts == 0)
      out[static_cast<size_t>(l)] = {0, dense_width()};
  return out;
}

}  // namespace

ModelConfig parse_config(std::string_view json_text, const std::string& file_name) {
  const JsonTree tree = parse_json(json_text, file_name);
  const json& object = tree.root();
  const Reader c(object, file_name);
  const FamilyDescriptor& family = family_of(c);
  refuse_other_arithmetic(c, family);

  ModelConfig m;
  m.family = family.model_type;
  m.names = &family;
  m.shape.hidden = static_cast<int>(c.integer("hidden_size", 2, kMaxWidth));
  m.shape.num_heads = static_cast<int>(c.integer("num_attention_heads", 1, kMaxHeads));
  m.shape.num_kv_heads = static_cast<int>(c.integer_or("num_key_value_heads", m.shape.num_heads, 1, m.shape.num_heads));
  m.shape.head_dim = static_cast<int>(c.has("head_dim") ? c.integer("head_dim", 2, 4096) : m.shape.hidden / m.shape.num_heads);
  if (m.shape.num_heads % m.shape.num_kv_heads != 0)
    fail(Code::kCorruptModel, "{}: num_attention_heads {} is no multiple of num_key_value_heads {}", file_name, m.shape.num_heads,
         m.shape.num_kv_heads);
  if (m.shape.head_dim < 2 || m.shape.head_dim % 2 != 0 || m.shape.hidden % 2 != 0)
    fail(Code::kUnsupported, "{}: head_dim {} and hidden_size {} must be even", file_name, m.shape.head_dim, m.shape.hidden);
  const int64_t layers = c.integer("num_hidden_layers", 1, kMaxLayers);
  const char* const* keys = family.expert_count_keys;
  const auto experts = static_cast<int>(c.integer(c.has(keys[0]) || !c.has(keys[1]) ? keys[0] : keys[1], 0, kMaxExperts));
  if (c.integer_or(keys[1], experts, 0, kMaxExperts) != experts)
    fail(Code::kCorruptModel, "{}: {} is {} and {} is {}", file_name, keys[0], experts, keys[1], shown(c.at(keys[1])));
  m.shape.mlps = mlps_of(c, family, layers, experts);
  m.vocab_size = static_cast<int32_t>(c.integer("vocab_size", 1, kMaxVocab));
  m.max_position_embeddings = c.integer("max_position_embeddings", 1, kMaxContext);
  m.rms_norm_eps = c.positive("rms_norm_eps");
  read_rope(c, family, m);
  m.tie_word_embeddings = c.flag_or("tie_word_embeddings", false);
  m.qk_norm = family.qk_norm == FamilyDescriptor::QkNorm::kSwitch ? c.flag_or("use_qk_norm", false) : family.qk_norm == FamilyDescriptor::QkNorm::kAlways;
  if (family.has_prediction_layers) m.num_prediction_layers = static_cast<int>(c.integer_or("num_nextn_predict_layers", 0, 0, kMaxLayers));
  if (family.qkv_bias_key != nullptr) m.qkv_bias = c.flag_or(family.qkv_bias_key, family.qkv_bias_absent);
  for (const MlpShape& mlp : m.shape.mlps) m.num_shared = std::max(m.num_shared, mlp.num_shared);
  if (family.router_bias != nullptr) m.routed_scaling_factor = static_cast<float>(c.positive("routed_scaling_factor"));
  if (experts > 0) m.top_k = static_cast<int32_t>(c.integer("num_experts_per_tok", 1, std::min<int64_t>(experts, kMaxTopK)));
  if (family.always_renormalise) {
    c.refuse_unless("norm_topk_prob", true);
    m.norm_topk_prob = true;
  } else {
    if (!c.has("norm_topk_prob")) fail(Code::kCorruptModel, "{}: norm_topk_prob is missing; its default differs between versions", file_name);
    m.norm_topk_prob = c.flag_or("norm_topk_prob", false);
  }
  m.softmax_scale = 1.0f / std::sqrt(static_cast<float>(m.shape.head_dim));
  if (family.has_multipliers)
    for (const Multiplier& x : kMultipliers) m.*x.value = static_cast<float>(c.positive(x.key));
  read_eos(c, m.vocab_size, m.eos_token_ids);
  m.unknown_keys = unknown_keys(c);
  return m;
}

ModelConfig read_config(const ModelFiles& files) {
  constexpr uint64_t kMaxBytes = 64 << 20;
  ModelConfig m = parse_config(read_text(files, "config.json", kMaxBytes), files.name_of("config.json"));
  const char* const generation = "generation_config.json";
  if (!files.has(generation)) return m;
  const std::string name = files.name_of(generation);
  const JsonTree tree = parse_json(read_text(files, generation, kMaxBytes), name);
  read_eos(Reader(tree.root(), name), m.vocab_size, m.eos_token_ids);
  return m;
}

void require_same_model(const ModelConfig& served, const ModelConfig& other, const std::string& name) {
  const auto same = [&](std::string_view key, const auto& mine, const auto& its) {
    if (mine != its) fail(Code::kInvalidArgument, "{}: {} is {}, of the model that is served {}", name, key, its, mine);
  };
  same("model_type", served.family, other.family);
  same("hidden_size", served.shape.hidden, other.shape.hidden);
  same("num_attention_heads", served.shape.num_heads, other.shape.num_heads);
  same("num_key_value_heads", served.shape.num_kv_heads, other.shape.num_kv_heads);
  same("head_dim", served.shape.head_dim, other.shape.head_dim);
  same("num_hidden_layers", served.shape.num_layers(), other.shape.num_layers());
  for (size_t l = 0; l < served.shape.mlps.size(); ++l) {
    same(fmt::format("the number of layer {}'s experts", l), served.shape.mlps[l].num_experts, other.shape.mlps[l].num_experts);
    same(fmt::format("layer {}'s intermediate size", l), served.shape.mlps[l].intermediate, other.shape.mlps[l].intermediate);
    same(fmt::format("the number of layer {}'s shared experts", l), served.shape.mlps[l].num_shared, other.shape.mlps[l].num_shared);
  }
  same("vocab_size", served.vocab_size, other.vocab_size);
  same("max_position_embeddings", served.max_position_embeddings, other.max_position_embeddings);
  same("rms_norm_eps", served.rms_norm_eps, other.rms_norm_eps);
  same("rope_theta", served.rope_theta, other.rope_theta);
  same("the number of dimensions that are turned", served.rotary_dim, other.rotary_dim);
  same("whether q, k and v have biases", served.qkv_bias, other.qkv_bias);
  same("whether q and k are normed", served.qk_norm, other.qk_norm);
  same("routed_scaling_factor", served.routed_scaling_factor, other.routed_scaling_factor);
  same("tie_word_embeddings", served.tie_word_embeddings, other.tie_word_embeddings);
  same("num_experts_per_tok", served.top_k, other.top_k);
  same("norm_topk_prob", served.norm_topk_prob, other.norm_topk_prob);
  for (const Multiplier& x : kMultipliers) same(x.key, served.*x.value, other.*x.value);
}

}  // namespace moebius
