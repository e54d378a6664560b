#include "examples/plan/model.h"

#include <algorithm>

#include "examples/plan/facts.h"
#include "examples/plan/shipped.h"
#include "lib/base/json_tree.h"
#include "lib/base/numbers.h"
#include "lib/tensor/packed.h"

namespace moebius::plan {
namespace {

Part bf16_matrix(double outputs, double inputs) { return {2 * outputs * inputs, outputs * inputs}; }

Part operator+(const Part& a, const Part& b) { return {a.bytes + b.bytes, a.products + b.products}; }
Part operator*(double n, const Part& p) { return {n * p.bytes, n * p.products}; }

// ---- served

Model served(ModelConfig config) {
  Model m;
  const ModelShape& s = config.shape;
  const double hidden = s.hidden, q = static_cast<double>(s.num_heads) * s.head_dim, kv = static_cast<double>(s.num_kv_heads) * s.head_dim;
  m.served = true;
  m.heads = 2 * bf16_matrix(q, hidden);
  m.keys = 2 * bf16_matrix(kv, hidden);
  for (const MlpShape& mlp : s.mlps) {
    (mlp.num_experts > 0 ? m.expert : m.dense) = 3 * bf16_matrix(mlp.intermediate, hidden);
    if (mlp.num_experts > 0) m.router = bf16_matrix(mlp.num_experts, hidden);
    m.replicated_bytes += 2.0 * mlp.num_experts * hidden + 4 * hidden;
  }
  m.shared = static_cast<double>(config.num_shared) * m.expert;
  m.lm_head = bf16_matrix(config.vocab_size, hidden);
  m.replicated_bytes += (config.tie_word_embeddings ? 1 : 2) * m.lm_head.bytes;
  m.kv_token_bytes = static_cast<double>(KvSlice{kTile, s.head_dim}.bytes()) / kTile;
  m.pair_products = 2 * q;
  m.windows.assign(s.mlps.size(), 0);
  m.config = std::move(config);
  return m;
}

// ---- described

// What planning reads of a config that the engine does not take.
ModelConfig plan_config(const Facts& f, int kv_heads, int head_dim, std::vector<MlpShape> mlps) {
  ModelConfig c;
  c.family = f.text("model_type");
  c.shape = {static_cast<int>(f.integer("hidden_size", 2, 1 << 20)), static_cast<int>(f.integer("num_attention_heads", 1, 8192)), kv_heads, head_dim,
             std::move(mlps)};
  if (c.shape.num_heads % kv_heads != 0)
    fail(Code::kCorruptModel, "{}: num_attention_heads {} is no multiple of num_key_value_heads {}", f.where(), c.shape.num_heads, kv_heads);
  c.vocab_size = static_cast<int32_t>(f.integer("vocab_size", 1, 1 << 24));
  c.max_position_embeddings = f.integer("max_position_embeddings", 1, int64_t{1} << 31);
  c.top_k = static_cast<int32_t>(f.integer("num_experts_per_tok", 1, 64));
  c.tie_word_embeddings = f.has("tie_word_embeddings") && f.at("tie_word_embeddings") == true;
  return c;
}

void add_replicated(Model& m) {
  const double hidden = m.shape().hidden;
  m.lm_head = bf16_matrix(m.config.vocab_size, hidden);
  m.replicated_bytes = (m.config.tie_word_embeddings ? 1 : 2) * m.lm_head.bytes;
  for (const MlpShape& mlp : m.shape().mlps) m.replicated_bytes += (mlp.num_experts > 0 ? m.router.bytes : 0) + 4 * hidden;
}

// Experts in MXFP4: 32 numbers along the inputs are 16 bytes and a scale of one. Everything else, biases too, in bf16.
constexpr int kMxBlock = 32;
Part mxfp4_matrix(double outputs, double inputs) { return {outputs * inputs * (0.5 + 1.0 / kMxBlock), outputs * inputs}; }

Model gpt_oss(const Facts& f) {
  const auto layers = static_cast<size_t>(f.integer("num_hidden_layers", 1, 4096));
  const auto experts = static_cast<int>(f.integer("num_local_experts", 1, 65536)),
             neurons = static_cast<int>(f.integer("intermediate_size", 1, 1 << 20));
  Model m;
  m.config = plan_config(f, static_cast<int>(f.integer("num_key_value_heads", 1, 8192)), static_cast<int>(f.integer("head_dim", 2, 4096)),
                         std::vector<MlpShape>(layers, MlpShape{experts, neurons}));
  const ModelShape& s = m.shape();
  const double hidden = s.hidden, q = static_cast<double>(s.num_heads) * s.head_dim, kv = static_cast<double>(s.num_kv_heads) * s.head_dim;
  m.heads = 2 * bf16_matrix(q, hidden);
  m.heads.bytes += 2 * (q + hidden + s.num_heads);  // biases, sinks
  m.keys = 2 * bf16_matrix(kv, hidden);
  m.keys.bytes += 2 * 2 * kv;
  const std::string quantised = f.has("quantization_config") ? f.facts("quantization_config").text("quant_method") : "";
  if (!quantised.empty() && quantised != "mxfp4")
    fail(Code::kUnsupported, "{}: quantization_config.quant_method = {} is not described", f.where(), quantised);
  m.expert = 3 * (quantised.empty() ? bf16_matrix(neurons, hidden) : mxfp4_matrix(neurons, hidden));
  m.expert.bytes += 2 * (2.0 * neurons + hidden);  // biases
  m.router = bf16_matrix(experts, hidden);
  m.kv_token_bytes = 2 * 2 * s.head_dim;
  m.pair_products = 2 * q;
  const auto window = static_cast<int>(f.integer_or("sliding_window", 0, 0, 1 << 30));
  for (size_t l = 0; l < layers; ++l) {
    const bool slides = f.has("layer_types")
                            ? f.at("layer_types").is_array() && l < f.at("layer_types").size() && f.at("layer_types")[l] == "sliding_attention"
                            : l % 2 == 0;
    m.windows.push_back(slides ? window : 0);
  }
  m.note = fmt::format(
      "described, not served: experts {}, attention bf16; steps read KV of a window in sliding layers, capacity keeps all of it in every layer",
      quantised.empty() ? "in bf16" : "in MXFP4 with their scales");
  add_replicated(m);
  return m;
}

// FP8 with a float for each block of 128 × 128.
Part fp8_matrix(double outputs, double inputs) {
  return {outputs * inputs + 4.0 * static_cast<double>(div_up(static_cast<int64_t>(outputs), 128) * div_up(static_cast<int64_t>(inputs), 128)),
          outputs * inputs};
}

// Latent attention, absorbed: a token's KV is one latent vector for all heads, which every rank has in TP; what makes and reads it (q_a, kv_a)
// goes with that one KV head, what is a head's (q_b, kv_b, o) with the head groups.
Model deepseek_v3(const Facts& f) {
  const auto layers = f.integer("num_hidden_layers", 1, 4096), first = f.integer("first_k_dense_replace", 0, layers);
  const auto experts = static_cast<int>(f.integer("n_routed_experts", 1, 65536));
  std::vector<MlpShape> mlps;
  for (int64_t l = 0; l < layers; ++l)
    mlps.push_back(l < first ? MlpShape{0, static_cast<int>(f.integer("intermediate_size", 1, 1 << 20))}
                             : MlpShape{experts, static_cast<int>(f.integer("moe_intermediate_size", 1, 1 << 20))});
  const auto dim = [&](const char* key) { return static_cast<double>(f.integer(key, 1, 1 << 16)); };
  const double q_rank = dim("q_lora_rank"), latent = dim("kv_lora_rank"), rope = dim("qk_rope_head_dim"), nope = dim("qk_nope_head_dim"),
               v = dim("v_head_dim");
  Model m;
  m.config = plan_config(f, 1, static_cast<int>(nope + rope), std::move(mlps));
  const double hidden = m.shape().hidden, heads = m.shape().num_heads;
  bool fp8 = false;
  if (f.has("quantization_config")) {
    const std::string method = f.facts("quantization_config").text("quant_method");
    if (method != "fp8") fail(Code::kUnsupported, "{}: quantization_config.quant_method = {} is not described", f.where(), method);
    fp8 = true;
  }
  const auto matrix = [&](double outputs, double inputs) { return fp8 ? fp8_matrix(outputs, inputs) : bf16_matrix(outputs, inputs); };
  m.heads = matrix(heads * (nope + rope), q_rank) + matrix(heads * (nope + v), latent) + matrix(hidden, heads * v);
  m.keys = matrix(q_rank, hidden) + matrix(latent + rope, hidden);
  m.expert = 3 * matrix(static_cast<double>(f.integer("moe_intermediate_size", 1, 1 << 20)), hidden);
  if (first > 0) m.dense = 3 * matrix(static_cast<double>(f.integer("intermediate_size", 1, 1 << 20)), hidden);
  m.shared = static_cast<double>(f.integer_or("n_shared_experts", 0, 0, 64)) * m.expert;
  m.router = bf16_matrix(experts, hidden);
  m.kv_token_bytes = 2 * (latent + rope);
  m.pair_products = heads * (2 * latent + rope);
  m.windows.assign(static_cast<size_t>(layers), 0);
  m.note = fmt::format(
      "described, not served: weights {}, one latent KV vector a token in bf16 that every rank has in TP; without its layer of multi-token "
      "prediction",
      fp8 ? "in FP8 with their scales" : "in bf16");
  add_replicated(m);
  return m;
}

double of_slice(double bytes, double count) { return static_cast<double>(round_up(static_cast<int64_t>(bytes / count + 0.999), 64)); }

}  // namespace

// The shared expert is cut as a dense MLP is, and owned like a head group in both layouts, so it lies with the head groups; of a layer's
// dense MLP it is taken off again.
SliceTable Model::slices(int slices_per_expert) const {
  const SliceCounts counts = slice_counts(shape(), slices_per_expert);
  if (served) return SliceTable(shape(), counts);
  SliceBytes bytes;
  const double cuts = counts.cuts;
  bytes.attention_group = static_cast<int64_t>(of_slice(heads.bytes + shared.bytes, counts.head_groups));
  bytes.kv_projection = static_cast<int64_t>(of_slice(keys.bytes, shape().num_kv_heads));
  double cut = expert.bytes / cuts;
  if (quantised_block_ > 0) {
    const int neurons = shape().mlps.back().intermediate, per_cut = neurons / counts.cuts;
    int64_t most = 0;
    for (int s = 0; s < counts.cuts; ++s)
      most = std::max(most, div_up(int64_t{s + 1} * per_cut, quantised_block_) - int64_t{s} * per_cut / quantised_block_);
    cut += (static_cast<double>(most) - static_cast<double>(per_cut) / quantised_block_) * down_scale_bytes_;
  }
  bytes.expert_cut = static_cast<int64_t>(of_slice(cut, 1));
  bytes.dense_cut = static_cast<int64_t>(of_slice(std::max(0.0, dense.bytes - shared.bytes), cuts));
  return SliceTable(shape(), counts, bytes);
}

int64_t Model::kv_slice_bytes(int page_tokens) const { return round_up(static_cast<int64_t>(kv_token_bytes) * page_tokens, 64); }

Model parse_model(const std::string& text, const std::string& name) {
  const JsonTree tree = parse_json(text, name);
  const Facts f(tree.root(), name);
  const std::string type = f.text("model_type");
  Model m;
  if (type == "gpt_oss") {
    m = gpt_oss(f);
    if (f.has("quantization_config")) m.quantised_block_ = kMxBlock, m.down_scale_bytes_ = m.shape().hidden;
  } else if (type == "deepseek_v3") {
    m = deepseek_v3(f);
  } else {
    m = served(parse_config(text, name));
  }
  if (m.config.top_k < 1) fail(Code::kUnsupported, "{}: has no experts, so there is nothing to switch", name);
  m.name = name;
  return m;
}

Model read_model(const std::string& name) { return parse_model(read_shipped(kModels, name, "model"), name); }

}  // namespace moebius::plan
