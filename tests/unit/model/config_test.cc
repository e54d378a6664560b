#include "lib/model/config.h"

#include <sys/stat.h>

#include <nlohmann/json.hpp>

#include "lib/base/error.h"
#include "tests/catch.h"
#include "tests/unit/model/files.h"

namespace moebius::test {
namespace {

using Catch::Contains;
using nlohmann::json;

json config_json(const std::string& model) { return json::parse(std::ifstream(kData + "/" + model + "/config.json")); }

std::string refusal(json config, const json& changes) {
  for (const auto& [key, value] : changes.items()) config[key] = value;
  try {
    parse_config(config.dump(), "config.json");
    return "";
  } catch (const Error& e) {
    CHECK_THAT(e.what(), Contains("config.json"));
    return e.what();
  }
}

}  // namespace

TEST_CASE("all families and both spellings are read") {
  const ModelConfig qwen = read_config(kData + "/tiny-qwen3-moe");
  CHECK(qwen.family == "qwen3_moe");
  CHECK(qwen.shape.num_layers() == 4);
  CHECK(qwen.shape.mlps[0].num_experts == 16);
  CHECK(qwen.shape.mlps[0].intermediate == 128);
  CHECK(qwen.top_k == 4);
  CHECK(qwen.norm_topk_prob);
  CHECK(qwen.qk_norm);
  CHECK(qwen.rope_theta == 1e6);
  CHECK(qwen.eos_token_ids == std::vector<int32_t>{2});

  const ModelConfig dense = read_config(kData + "/tiny-qwen3-moe-dense");  // transformers 5: rope_parameters, num_local_experts, dtype
  std::vector<int> experts;
  for (const MlpShape& m : dense.shape.mlps) experts.push_back(m.num_experts);
  CHECK(experts == std::vector<int>{0, 8, 0, 0, 0, 8});
  CHECK(dense.shape.mlps[0].intermediate == 256);
  CHECK(dense.rope_theta == 1e4);
  CHECK(dense.tie_word_embeddings);
  CHECK_FALSE(dense.norm_topk_prob);

  const ModelConfig mixtral = read_config(kData + "/tiny-mixtral");
  CHECK(mixtral.family == "mixtral");
  CHECK(mixtral.shape.head_dim == 16);  // null: hidden ÷ heads
  CHECK(mixtral.norm_topk_prob);
  CHECK_FALSE(mixtral.qk_norm);
  CHECK(mixtral.softmax_scale == 0.25f);
  CHECK(mixtral.embedding_multiplier * mixtral.residual_multiplier * mixtral.logits_scaling == 1);

  const ModelConfig qwen2 = read_config(kData + "/tiny-qwen2-moe");
  CHECK(qwen2.shape.mlps[0].num_shared == 2);  // 128 neurons of 64 each
  CHECK(qwen2.shape.mlps[2].num_shared + qwen2.shape.mlps[2].num_experts == 0);
  CHECK(qwen2.num_shared == 2);
  CHECK(qwen2.qkv_bias);
  CHECK_FALSE(qwen2.qk_norm);
  CHECK(qwen2.rotary_dim == 16);

  const ModelConfig glm = read_config(kData + "/tiny-glm4-moe");
  CHECK(glm.shape.mlps[0].num_experts == 0);
  CHECK(glm.shape.mlps[0].intermediate == 192);
  CHECK(glm.shape.mlps[1].num_experts == 8);
  CHECK(glm.shape.mlps[1].num_shared == 1);
  CHECK(glm.routed_scaling_factor == 1.5f);
  CHECK(glm.qkv_bias);
  CHECK(glm.qk_norm);
  CHECK(glm.rotary_dim == 16);  // of 32
  CHECK(glm.num_prediction_layers == 1);

  const ModelConfig granite = read_config(kData + "/tiny-granite-moe");
  CHECK(granite.norm_topk_prob);
  CHECK(granite.softmax_scale == 0.125f);  // not 1/√16
  CHECK(granite.embedding_multiplier == 3);
  CHECK(granite.residual_multiplier == 0.9f);
  CHECK(granite.logits_scaling == 3);
}

TEST_CASE("a value that changes the arithmetic and is not implemented is refused by key and value") {
  const json qwen = config_json("tiny-qwen3-moe"), v5 = config_json("tiny-qwen3-moe-dense"), mixtral = config_json("tiny-mixtral");
  CHECK(refusal(qwen, json::object()) == "");
  const auto is_refused = [](const json& config, const std::string& key, const json& value) {
    CHECK_THAT(refusal(config, {{key, value}}), Contains(" " + key + " = " + value.dump() + " is not implemented"));
  };
  const std::pair<const char*, json> others[] = {
      {"hidden_act", "gelu"}, {"hidden_activation", "gelu_pytorch_tanh"}, {"swiglu_limit", 7.0}, {"attention_bias", true}, {"mlp_bias", true},
      {"qkv_bias", true}, {"use_bias", true}, {"quantization_config", {{"quant_method", "fp8"}}}, {"text_config", {{"hidden_size", 8}}},
      {"partial_rotary_factor", 0.5}, {"rotary_pct", 0.25}, {"rope_interleave", true}, {"rope_type", "yarn"}, {"no_rope_layers", {1, 1, 1, 0}},
      {"attn_logit_softcapping", 30.0}, {"final_logit_softcapping", 30.0}, {"attention_multiplier", 0.01}, {"query_pre_attn_scalar", 256},
      {"attention_chunk_size", 8192}, {"clip_qkv", 8.0}, {"embedding_multiplier", 12.0}, {"residual_multiplier", 0.22}, {"logits_scaling", 6.0},
      {"logit_scale", 0.0625}, {"n_shared_experts", 1}, {"shared_expert_intermediate_size", 64}, {"num_nextn_predict_layers", 1},
      {"first_k_dense_replace", 3}, {"moe_layer_freq", 2}, {"n_group", 8}, {"topk_group", 4}, {"n_routed_experts", 64}, {"routed_scaling_factor", 2.5},
      {"scoring_func", "sigmoid"}, {"topk_method", "noaux_tc"}, {"kv_lora_rank", 512}, {"layer_norm_eps", 1e-5}, {"pretraining_tp", 2},
      {"is_encoder_decoder", true}, {"layer_types", {"full_attention", "sliding_attention"}}, {"torch_dtype", "float8"}, {"dtype", "float64"}};
  for (const json& config : {qwen, v5, mixtral})
    for (const auto& [key, value] : others) is_refused(config, key, value);
  is_refused(qwen, "use_sliding_window", true);
  is_refused(qwen, "use_qk_norm", false);
  is_refused(mixtral, "use_qk_norm", true);
  is_refused(mixtral, "norm_topk_prob", false);
  json granite = config_json("tiny-granite-moe");
  CHECK_THAT(refusal(granite, {{"logits_scaling", 0}}), Contains("logits_scaling is 0") && Contains("positive"));
  granite.erase("residual_multiplier");
  CHECK_THAT(refusal(granite, json::object()), Contains("residual_multiplier is missing"));
  CHECK_THAT(refusal(qwen, {{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}}}), Contains("rope_scaling.") && Contains("4.0"));
  CHECK_THAT(refusal(v5, {{"rope_theta", 1e6}}), Contains("rope_theta") && Contains("1000000") && Contains("10000 "));
  CHECK(refusal(v5, {{"rope_theta", 1e4}}) == "");
  CHECK_THAT(refusal(qwen, {{"rope_scaling", {{"rope_type", "default"}, {"rope_theta", 5e5}}}}),
             Contains("rope_theta") && Contains("500000"));
  CHECK_THAT(refusal(qwen, {{"num_local_experts", 8}}), Contains("num_experts is 16") && Contains("num_local_experts is 8"));
  CHECK(refusal(qwen, {{"num_local_experts", 16}}) == "");
  CHECK_THAT(refusal(qwen, {{"rope_scaling", {{"type", "linear"}}}}), Contains("rope_scaling.type = \"linear\""));
  CHECK_THAT(refusal(v5, {{"rope_parameters", {{"rope_theta", 1e4}, {"rope_type", "llama3"}, {"factor", 8.0}}}}), Contains("rope_parameters"));
  CHECK_THAT(refusal(mixtral, {{"sliding_window", 4096}}), Contains("sliding_window") && Contains("4096"));
  CHECK_THAT(refusal(qwen, {{"sliding_window", 4096}, {"use_sliding_window", false}}), Catch::Equals(""));
  CHECK_THAT(refusal(qwen, {{"model_type", "gpt_oss"}}), Contains("gpt_oss") && Contains("qwen3_moe") && Contains("mixtral"));
  CHECK_THAT(refusal(qwen, {{"architectures", {"OtherModel"}}}), Contains("OtherModel"));
}

TEST_CASE("what shared experts, partial rotary embeddings and biases call for is read, and what is not implemented of it refused") {
  json qwen2 = config_json("tiny-qwen2-moe"), glm = config_json("tiny-glm4-moe");
  CHECK(refusal(qwen2, json::object()) == "");
  CHECK(refusal(glm, json::object()) == "");
  CHECK_THAT(refusal(qwen2, {{"shared_expert_intermediate_size", 100}}), Contains("shared_expert_intermediate_size 100") && Contains("64"));
  CHECK_THAT(refusal(qwen2, {{"shared_expert_intermediate_size", nullptr}}), Contains("shared_expert_intermediate_size is missing"));
  CHECK_THAT(refusal(glm, {{"n_group", 4}}), Contains("n_group = 4"));
  CHECK_THAT(refusal(glm, {{"n_shared_experts", 0}}), Contains("n_shared_experts is 0"));
  CHECK_THAT(refusal(glm, {{"n_routed_experts", 0}}), Contains("n_routed_experts is 0"));
  CHECK_THAT(refusal(glm, {{"partial_rotary_factor", 0.1}}), Contains("partial_rotary_factor 0.1") && Contains("even"));
  CHECK_THAT(refusal(glm, {{"partial_rotary_factor", 1.5}}), Contains("partial_rotary_factor 1.5"));
  CHECK_THAT(refusal(glm, {{"routed_scaling_factor", nullptr}}), Contains("routed_scaling_factor is missing"));
  const auto parsed = [](const json& config) { return parse_config(config.dump(), "c"); };
  qwen2.erase("qkv_bias");  // in files from before the key they are there
  CHECK(parsed(qwen2).qkv_bias);
  glm["rope_parameters"] = {{"rope_theta", glm["rope_theta"]}, {"rope_type", "default"}, {"partial_rotary_factor", 0.25}};  // transformers 5
  glm.erase("partial_rotary_factor");
  CHECK(parsed(glm).rotary_dim == 8);
  glm["partial_rotary_factor"] = 0.5;
  CHECK_THAT(refusal(glm, json::object()), Contains("partial_rotary_factor is 0.5 in one place and 0.25 in another"));
}

TEST_CASE("a text that goes on behind a NUL is no JSON, and a value's text is cut between two characters") {
  CHECK_THROWS_WITH(parse_config(config_json("tiny-qwen3-moe").dump() + std::string("\0}", 2), "c"), Contains("NUL"));
  std::string accents = "a";
  for (int i = 0; i < 60; ++i) accents += "\u00e9";
  CHECK_THAT(refusal(config_json("tiny-qwen3-moe"), {{"hidden_act", accents}}), Contains("\u00e9..."));
}

TEST_CASE("values that change nothing are taken, and keys that nobody knows are told") {
  for (const char* model : {"tiny-qwen3-moe", "tiny-qwen3-moe-dense", "tiny-mixtral", "tiny-qwen2-moe", "tiny-glm4-moe", "tiny-granite-moe"}) CHECK(read_config(kData + "/" + model).unknown_keys.empty());
  json config = config_json("tiny-qwen3-moe");
  config.update({{"attention_bias", false}, {"routed_scaling_factor", 1.0}, {"n_group", 1}, {"topk_group", 1}, {"use_qk_norm", true},
                 {"rope_interleave", false}, {"partial_rotary_factor", 1}, {"scoring_func", "softmax"}, {"clip_qkv", nullptr}, {"max_window_layers", 28}});
  CHECK(parse_config(config.dump(), "c").unknown_keys.empty());
  config["flux_capacitor"] = 1.21;
  CHECK(parse_config(config.dump(), "c").unknown_keys == std::vector<std::string>{"flux_capacitor = 1.21"});
}

TEST_CASE("12: a config that lies about sizes is refused with the numbers") {
  const json qwen = config_json("tiny-qwen3-moe");
  for (const char* key : {"num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"})
    for (const json& value : {json(0), json(-1), json(1.5), json("7"), json(uint64_t{1} << 60), json(json::array())})
      CHECK_THAT(refusal(qwen, {{key, value}}), Contains(key));
  CHECK_THAT(refusal(qwen, {{"num_attention_heads", 7}}), Contains("7"));
  CHECK_THAT(refusal(qwen, {{"num_experts_per_tok", 17}}), Contains("17"));
  CHECK_THAT(refusal(qwen, {{"num_experts", 100}, {"num_experts_per_tok", 65}}), Contains("65"));
  CHECK_THAT(refusal(qwen, {{"head_dim", 31}}), Contains("31"));
  CHECK_THAT(refusal(qwen, {{"mlp_only_layers", {4}}}), Contains("4 layers"));
  CHECK_THAT(refusal(qwen, {{"eos_token_id", {2, 512}}}), Contains("512"));
  CHECK_THAT(refusal(qwen, {{"rms_norm_eps", "nan"}}), Contains("rms_norm_eps"));
  json absent = qwen;
  absent.erase("norm_topk_prob");
  CHECK_THAT(refusal(absent, json::object()), Contains("norm_topk_prob"));
}

TEST_CASE("broken JSON and missing folders are named") {
  CHECK_THROWS_WITH(parse_config("{", "config.json"), Contains("config.json") && Contains("JSON"));
  CHECK_THROWS_WITH(parse_config("[]", "config.json"), Contains("config.json"));
  CHECK_THROWS_WITH(parse_config(std::string(100000, '['), "config.json"), Contains("nested"));
  CHECK_THROWS_WITH(read_config("/nowhere/at/all"), Contains("/nowhere/at/all"));
  const TempFolder empty;
  CHECK_THROWS_WITH(read_config(empty.path()), Contains("config.json"));
}

TEST_CASE("generation_config.json widens the end-of-text tokens and nothing else") {
  const TempFolder folder;
  write_file(folder / "config.json", config_json("tiny-qwen3-moe").dump());
  write_file(folder / "generation_config.json", R"({"eos_token_id":[2,5,7],"temperature":0.1})");
  CHECK(read_config(folder.path()).eos_token_ids == std::vector<int32_t>{2, 5, 7});
}

TEST_CASE("a key given twice is refused, wherever it stands") {
  std::string text = config_json("tiny-qwen3-moe").dump();
  CHECK_THROWS_WITH(parse_config("{\"num_experts\":8," + text.substr(1), "config.json"), Contains("'num_experts' is given twice"));
  CHECK_THROWS_WITH(parse_config("{\"other\":[{\"a\":{\"b\":1},\"c\":{\"b\":2,\"b\":3}}]," + text.substr(1), "config.json"), Contains("'b' is given twice"));
  CHECK_NOTHROW(parse_config("{\"other\":[{\"a\":1},{\"a\":1,\"b\":{\"a\":1}}]," + text.substr(1), "config.json"));
  const TempFolder folder;
  write_file(folder / "config.json", text);
  write_file(folder / "generation_config.json", R"({"eos_token_id":2,"eos_token_id":5})");
  CHECK_THROWS_WITH(read_config(folder.path()), Contains("generation_config.json") && Contains("'eos_token_id' is given twice"));
}

TEST_CASE("14: a config that is no regular file is refused and not waited for") {
  for (const char* name : {"config.json", "generation_config.json"}) {
    const TempFolder folder;
    write_file(folder / "config.json", config_json("tiny-qwen3-moe").dump());
    std::filesystem::remove(folder / name);
    mkfifo((folder / name).c_str(), 0600);
    CHECK_THROWS_WITH(read_config(folder.path()), Contains(name) && Contains("not a regular file"));
  }
}

}  // namespace moebius::test
