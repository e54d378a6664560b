#include "examples/common/shapes.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>

#include <nlohmann/json.hpp>

namespace moebius_examples {
namespace {

using nlohmann::json;

struct Shape {
  int layers, hidden, experts, top_k, intermediate, heads, kv_heads, head_dim, vocab;
};
const std::map<std::string, Shape>& shapes() {
  static const std::map<std::string, Shape> all = {
      {"s", {8, 512, 64, 8, 256, 16, 4, 64, 32000}},
      {"m", {16, 1024, 64, 8, 512, 16, 4, 64, 32000}},
      {"qwen3-30b-a3b", {48, 2048, 128, 8, 768, 32, 4, 128, 151936}},
      {"qwen3-235b-a22b", {94, 4096, 128, 8, 1536, 64, 4, 128, 151936}},
  };
  return all;
}

}  // namespace

std::vector<std::string> shape_names() {
  std::vector<std::string> names;
  for (const auto& [name, shape] : shapes()) names.push_back(name);
  return names;
}

ShapeFolder::ShapeFolder(const std::string& name_of_shape, int layers) {
  const Shape& shape = shapes().at(name_of_shape);
  std::string name = (std::filesystem::temp_directory_path() / "moebius-shape-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make a temporary folder " + name);
  path_ = name;
  const json config = {{"architectures", {"Qwen3MoeForCausalLM"}},
                       {"model_type", "qwen3_moe"},
                       {"hidden_act", "silu"},
                       {"num_hidden_layers", layers > 0 ? layers : shape.layers},
                       {"hidden_size", shape.hidden},
                       {"num_experts", shape.experts},
                       {"num_experts_per_tok", shape.top_k},
                       {"moe_intermediate_size", shape.intermediate},
                       {"intermediate_size", 2 * shape.intermediate},
                       {"num_attention_heads", shape.heads},
                       {"num_key_value_heads", shape.kv_heads},
                       {"head_dim", shape.head_dim},
                       {"vocab_size", shape.vocab},
                       {"max_position_embeddings", 32768},
                       {"rms_norm_eps", 1e-6},
                       {"rope_theta", 1e6},
                       {"norm_topk_prob", true},
                       {"tie_word_embeddings", false},
                       {"decoder_sparse_step", 1},
                       {"mlp_only_layers", json::array()}};
  std::ofstream(path_ + "/config.json") << config;
}

ShapeFolder::~ShapeFolder() { std::filesystem::remove_all(path_); }

}  // namespace moebius_examples
