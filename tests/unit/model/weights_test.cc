#include "lib/model/weights.h"

#include <cmath>

#include <nlohmann/json.hpp>

#include "lib/base/error.h"
#include "lib/model/scale.h"
#include "lib/tensor/packed.h"
#include "tests/catch.h"
#include "tests/unit/model/files.h"

namespace moebius::test {
namespace {

using Catch::Contains;
using nlohmann::json;

std::vector<bf16> whole(const MatrixReader& m, int64_t rows, int64_t columns) {
  std::vector<bf16> out(static_cast<size_t>(rows * columns));
  m.read({0, rows}, {0, columns}, out.data());
  return out;
}

std::vector<bf16> packed(const WeightSource& source, const ModelConfig& model, const SliceTable& table, const Slice& slice) {
  const auto run = [&](int32_t first_cut) {  // from there to the slice's own cut; the last of them
    std::vector<std::vector<bf16>> parts;
    std::vector<std::byte*> outs;
    for (int32_t cut = first_cut; cut <= slice.cut; ++cut) parts.emplace_back(static_cast<size_t>(slice.bytes / 2), 0xdead);
    for (std::vector<bf16>& part : parts) outs.push_back(reinterpret_cast<std::byte*>(part.data()));
    Slice first = slice;
    first.cut = first_cut;
    pack_slices(source, model, table, first, outs);
    return parts.back();
  };
  const bool alike = run(0) == run(slice.cut);
  CHECK(alike);
  return run(slice.cut);
}

// Every element of every slice lands where packed.h says, and the rest is 0.
void check_slices(const WeightSource& source, const ModelConfig& model, int cuts) {
  const SliceTable table(model.shape, slice_counts(model.shape, cuts));
  const ModelShape& s = model.shape;
  const auto expect_zero_elsewhere = [](const std::vector<bf16>& out, const std::vector<bool>& seen) {
    for (size_t i = 0; i < out.size(); ++i)
      if (!seen[i] && out[i] != 0) FAIL("element " << i << " of the padding is " << out[i]);
  };
  // Rows of q in the order in which they are kept: those that are turned stand half a head apart.
  const auto kept = [&](int64_t n) {
    const int64_t i = n % s.head_dim, half = s.head_dim / 2, turned = model.rotary_dim / 2;
    const int64_t source = i % half < turned ? (i < half ? i : i - half + turned) : (i < half ? i + turned : i);
    return n - i + source;
  };
  for (int l : {0, s.num_layers() - 1}) {
    const std::string prefix = "model.layers." + std::to_string(l) + ".self_attn.";
    const int64_t q_rows = int64_t{s.num_heads} * s.head_dim, width = q_rows / table.counts().head_groups;
    const auto q = whole(*source.matrix(prefix + "q_proj.weight", q_rows, s.hidden), q_rows, s.hidden);
    const auto o = whole(*source.matrix(prefix + "o_proj.weight", s.hidden, q_rows), s.hidden, q_rows);
    for (int a = 0; a < table.counts().head_groups; ++a) {
      const AttentionGroup g{s.num_heads / table.counts().head_groups, s.head_dim, s.hidden};
      const auto out = packed(source, model, table, table.layer(l)[static_cast<size_t>(table.attention(a))]);
      std::vector<bool> seen(out.size());
      for (int64_t n = 0; n < width; ++n)
        for (int64_t k = 0; k < s.hidden; ++k) {
          REQUIRE(out[static_cast<size_t>(g.q().index(n, k))] == q[static_cast<size_t>(kept(a * width + n) * s.hidden + k)]);
          const int64_t at = g.q().elements() + g.o().index(k, n);
          REQUIRE(out[static_cast<size_t>(at)] == o[static_cast<size_t>(k * q_rows + a * width + n)]);
          seen[static_cast<size_t>(g.q().index(n, k))] = seen[static_cast<size_t>(at)] = true;
        }
      expect_zero_elsewhere(out, seen);
    }
    const MlpShape& mlp = s.mlps[static_cast<size_t>(l)];
    const int expert = mlp.num_experts > 0 ? mlp.all_experts() - 1 : -1;
    using Part = WeightSource::ExpertPart;
    const auto gate = whole(*source.expert(l, expert, Part::kGate), mlp.intermediate, s.hidden);
    const auto up = whole(*source.expert(l, expert, Part::kUp), mlp.intermediate, s.hidden);
    const auto down = whole(*source.expert(l, expert, Part::kDown), s.hidden, mlp.intermediate);
    for (int c = 0; c < cuts; ++c) {
      const MlpCut cut{mlp.intermediate / cuts, s.hidden};
      const auto out = packed(source, model, table, table.layer(l)[static_cast<size_t>(table.expert_cut(std::max(0, expert), c))]);
      std::vector<bool> seen(out.size());
      for (int64_t n = 0; n < cut.neurons; ++n)
        for (int64_t k = 0; k < s.hidden; ++k) {
          const int64_t row = c * cut.neurons + n, at = cut.gate_up_elements() + cut.down().index(k, n);
          REQUIRE(out[static_cast<size_t>(cut.gate_index(n, k))] == gate[static_cast<size_t>(row * s.hidden + k)]);
          REQUIRE(out[static_cast<size_t>(cut.up_index(n, k))] == up[static_cast<size_t>(row * s.hidden + k)]);
          REQUIRE(out[static_cast<size_t>(at)] == down[static_cast<size_t>(k * mlp.intermediate + row)]);
          for (int64_t i : {cut.gate_index(n, k), cut.up_index(n, k), at}) seen[static_cast<size_t>(i)] = true;
        }
      expect_zero_elsewhere(out, seen);
    }
  }
}

// A copy of a test model whose config.json or tensors differ.
void copy_model(const std::string& model, const TempFolder& to) {
  for (const auto& file : std::filesystem::directory_iterator(kData + "/" + model)) std::filesystem::copy(file, to.path());
}

}  // namespace

TEST_CASE("checkpoints are packed slice by slice as the geometry says") {
  for (const std::string name : {"tiny-qwen3-moe", "tiny-qwen3-moe-dense", "tiny-mixtral", "tiny-qwen2-moe", "tiny-glm4-moe", "tiny-granite-moe"}) {
    const ModelConfig model = read_config(kData + "/" + name);
    const auto source = open_checkpoint(kData + "/" + name, model, nullptr);
    for (int cuts : {1, 4, 8}) check_slices(*source, model, cuts);  // 8 cuts of 16 neurons in tiny-qwen3-moe, 8 in its dense twin: padded
  }
}

TEST_CASE("dummy weights of an element do not depend on the slice that asks") {
  const ModelConfig model = read_config(kData + "/tiny-qwen3-moe");
  const auto source = make_dummy_source(model, 7);
  check_slices(*source, model, 4);
  const auto m = source->matrix("x", 100, 96);
  const auto all = whole(*m, 100, 96);
  bf16 some[3 * 5];
  m->read({50, 53}, {20, 25}, some);
  for (int r = 0; r < 3; ++r)
    for (int c = 0; c < 5; ++c) CHECK(some[r * 5 + c] == all[static_cast<size_t>((50 + r) * 96 + 20 + c)]);
  double squares = 0;
  for (bf16 x : all) squares += std::pow(to_float(x), 2);
  CHECK(squares / static_cast<double>(all.size()) == Approx(1.0 / 96).epsilon(0.1));
  CHECK(whole(*make_dummy_source(model, 8)->matrix("x", 100, 96), 100, 96) != all);
}

TEST_CASE("f16 and f32 on disk become bf16 by rounding to nearest") {
  CHECK(to_float(to_bf16(1.00390625f)) == 1.0f);           // halfway: to even
  CHECK(to_float(to_bf16(1.01171875f)) == 1.015625f);
  CHECK(half_to_float(0x3c00) == 1.0f);
  CHECK(half_to_float(0xc000) == -2.0f);
  CHECK(half_to_float(0x0001) == 0x1p-24f);
  CHECK(std::isinf(half_to_float(0x7c00)));
  CHECK(std::isnan(to_float(to_bf16(std::nanf("")))));
}

TEST_CASE("a tensor that is missing or of another shape than config.json says is refused before anything is read") {
  const TempFolder folder;
  copy_model("tiny-qwen3-moe", folder);
  json config = json::parse(std::ifstream(folder / "config.json"));
  config["moe_intermediate_size"] = 64;
  CHECK_THROWS_WITH(open_checkpoint(folder.path(), parse_config(config.dump(), "c"), nullptr), Contains("mlp.experts.0.gate_proj") && Contains("128"));
  config["moe_intermediate_size"] = 128;
  config["num_hidden_layers"] = 5;
  CHECK_THROWS_WITH(open_checkpoint(folder.path(), parse_config(config.dump(), "c"), nullptr), Contains("model.layers.4") && Contains("missing"));
  config["num_hidden_layers"] = 4;
  config["vocab_size"] = 16000000;  // would be 4 GB
  CHECK_THROWS_WITH(open_checkpoint(folder.path(), parse_config(config.dump(), "c"), nullptr), Contains("embed_tokens") && Contains("16000000"));
}

TEST_CASE("weights of a file that shrinks while it is loaded are an error, whatever their dtype and cut") {
  const TempFolder folder;
  const ModelConfig config = read_config(kData + "/tiny-qwen3-moe");
  const Tensors whole = read_tensors_of(kData + "/tiny-qwen3-moe");
  for (const char* dtype : {"BF16", "F32"}) {
    Tensors tensors = whole;
    if (std::string(dtype) == "F32")
      for (auto& [name, t] : tensors) {
        std::string wide;
        for (size_t i = 0; i < t.bytes.size(); i += 2) wide += std::string(2, '\0') + t.bytes.substr(i, 2);
        t = {dtype, t.shape, wide};
      }
    write_tensors(folder / "model.safetensors", tensors);
    const auto source = open_checkpoint(folder.path(), config, nullptr);
    const SliceTable table(config.shape, slice_counts(config.shape, 4));
    std::filesystem::resize_file(folder / "model.safetensors", std::filesystem::file_size(folder / "model.safetensors") / 20);
    int failed = 0;
    for (int l = 0; l < config.shape.num_layers(); ++l)
      for (const Slice& slice : table.layer(l)) try {
          packed(*source, config, table, slice);
        } catch (const Error& e) {
          CHECK(e.code() == Code::kIo);
          CHECK_THAT(e.what(), Contains("model.safetensors: ends at byte") && Contains("tensor 'model.layers."));
          ++failed;
        }
    CHECK(failed > 100);
  }
}

TEST_CASE("tensors that are not used and change nothing are told in one warning") {
  const TempFolder folder;
  copy_model("tiny-qwen3-moe", folder);
  Tensors tensors = read_tensors(folder / "model.safetensors");
  for (const char* name : {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "a.scale", "b.scale"})
    tensors[name] = {"F32", {1}, std::string(4, '\0')};
  write_tensors(folder / "model.safetensors", tensors);
  std::vector<std::string> warnings;
  open_checkpoint(folder.path(), read_config(folder.path()), [&](const std::string& w) { warnings.push_back(w); });
  REQUIRE(warnings.size() == 1);
  CHECK_THAT(warnings[0], Contains("4 tensors are not used") && Contains("model.layers.0.self_attn.rotary_emb.inv_freq") && Contains("…"));
}

TEST_CASE("tensors that would change the arithmetic and are not used are refused by name") {
  const TempFolder folder;
  for (const std::string model : {"tiny-qwen3-moe", "tiny-mixtral"}) {
    const ModelConfig config = read_config(kData + "/" + model);
    const Tensors whole = read_tensors_of(kData + "/" + model);
    for (const char* name : {"model.layers.0.mlp.experts.16.gate_proj.weight", "model.layers.1.block_sparse_moe.experts.8.w1.weight",
                             "model.layers.0.mlp.shared_expert.up_proj.weight", "model.layers.0.mlp.shared_experts.up_proj.weight",
                             "model.layers.0.mlp.shared_expert_gate.weight", "model.layers.0.self_attn.q_proj.bias",
                             "model.layers.3.self_attn.o_proj.bias", "model.layers.0.mlp.gate.bias", "model.layers.0.mlp.down_proj.bias",
                             "model.layers.0.mlp.gate.e_score_correction_bias", "model.layers.2.self_attn.sinks",
                             "model.layers.2.self_attn.q_proj.weight_scale_inv", "model.layers.0.pre_feedforward_layernorm.weight", "lm_head.bias"}) {
      Tensors tensors = whole;
      tensors[name] = {"F32", {1}, std::string(4, '\0')};
      write_tensors(folder / "model.safetensors", tensors);
      CHECK_THROWS_WITH(open_checkpoint(folder.path(), config, nullptr), Contains(name) && Contains("model.safetensors"));
    }
  }
  Tensors tensors = read_tensors_of(kData + "/tiny-mixtral");
  tensors["model.layers.0.self_attn.q_norm.weight"] = {"F32", {16}, std::string(64, '\0')};  // Qwen3's, which Mixtral does not have
  write_tensors(folder / "model.safetensors", tensors);
  CHECK_THROWS_WITH(open_checkpoint(folder.path(), read_config(kData + "/tiny-mixtral"), nullptr), Contains("self_attn.q_norm.weight"));
  json fewer = json::parse(std::ifstream(kData + "/tiny-mixtral/config.json"));
  fewer["num_local_experts"] = 7;
  CHECK_THROWS_WITH(open_checkpoint(kData + "/tiny-mixtral", parse_config(fewer.dump(), "c"), nullptr), Contains("gate.weight") && Contains("[7, 128]"));
}

TEST_CASE("a checkpoint with more layers than config.json says is refused by the name and the value") {
  for (const std::string model : {"tiny-qwen3-moe", "tiny-mixtral"}) {
    json fewer = json::parse(std::ifstream(kData + "/" + model + "/config.json"));
    for (int layers : {1, 3}) {
      fewer["num_hidden_layers"] = layers;
      CHECK_THROWS_WITH(open_checkpoint(kData + "/" + model, parse_config(fewer.dump(), "c"), nullptr),
                        Contains("tensor 'model.layers." + std::to_string(layers)) && Contains("num_hidden_layers is " + std::to_string(layers)));
    }
  }
}

TEST_CASE("a tensor of a layer whose number is past counting is refused as one beyond the last") {
  const TempFolder folder;
  Tensors tensors = read_tensors_of(kData + "/tiny-qwen3-moe");
  tensors["model.layers.99999999999999999999.foo"] = {"F32", {1}, std::string(4, '\0')};
  write_tensors(folder / "model.safetensors", tensors);
  CHECK_THROWS_WITH(open_checkpoint(folder.path(), read_config(kData + "/tiny-qwen3-moe"), nullptr), Contains("99999999999999999999.foo"));
}

TEST_CASE("10: a tensor of a dtype that is not read is refused by name where it is needed, and passes where it is not") {
  const TempFolder folder;
  const ModelConfig config = read_config(kData + "/tiny-qwen3-moe");
  const Tensors whole = read_tensors_of(kData + "/tiny-qwen3-moe");
  Tensors more = whole;
  more["model.position_ids"] = {"I64", {1, 2}, std::string(16, '\0')};
  more["extra.scale"] = {"F8_E4M3", {3}, std::string(3, '\0')};
  write_tensors(folder / "model.safetensors", more);
  std::string warning;
  CHECK_NOTHROW(open_checkpoint(folder.path(), config, [&](const std::string& w) { warning = w; }));
  CHECK_THAT(warning, Contains("2 tensors are not used: 'extra.scale', 'model.position_ids'"));
  for (const char* name : {"model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.k_proj.weight",
                           "model.layers.3.self_attn.q_norm.weight", "lm_head.weight"})
    for (const char* dtype : {"I64", "F8_E4M3"}) {
      Tensors other = whole;
      other[name].dtype = dtype;
      other[name].bytes.resize(other[name].bytes.size() / 2 * (std::string(dtype) == "I64" ? 8 : 1));
      write_tensors(folder / "model.safetensors", other);
      CHECK_THROWS_WITH(open_checkpoint(folder.path(), config, nullptr), Contains(name) && Contains(dtype));
    }
}

TEST_CASE("12: whatever count or width config.json lies about, the tensors tell") {
  const std::map<std::string, std::vector<int64_t>> lies = {
      {"num_experts", {0, 1, 4, 8, 15, 17, 32, 128, 65536}},
      {"moe_intermediate_size", {1, 2, 64, 127, 129, 256, 1 << 20}},
      {"num_key_value_heads", {1, 4, 8}},
      {"head_dim", {2, 16, 30, 34, 64, 4096}},
      {"num_hidden_layers", {1, 3, 5, 6, 64, 4096}},
      {"num_attention_heads", {2, 4, 16, 32, 8192}},
      {"hidden_size", {2, 64, 126, 130, 256, 1 << 20}},
      {"vocab_size", {511, 513, 1024, 1 << 24}}};
  for (const auto& [key, values] : lies)
    for (int64_t value : values) {
      json config = json::parse(std::ifstream(kData + "/tiny-qwen3-moe/config.json"));
      config[key] = value;
      INFO(key << " = " << value);
      try {
        open_checkpoint(kData + "/tiny-qwen3-moe", parse_config(config.dump(), "config.json"), nullptr);
        FAIL_CHECK("accepted");
      } catch (const Error& e) {
        CHECK((e.code() == Code::kCorruptModel || e.code() == Code::kUnsupported));
        CHECK_THAT(e.what(), Contains("model.safetensors") || Contains("config.json") || Contains("missing"));
      }
    }
}

TEST_CASE("the fixed-point scale is 2^28 for usual layers and follows unusual ones") {
  const ModelConfig model = read_config(kData + "/tiny-qwen3-moe");
  CHECK(mlp_exponent({0.5f, 0.5f, 0.5f}, model, 0) == 28);
  CHECK(attention_exponent({0.5f, 0.5f, 0.5f}, model, 0.0f) == 28);
  const int tiny = mlp_exponent({0.5f, 0.5f, 1e-7f}, model, 0);
  CHECK(tiny > 40);
  CHECK(tiny <= 60);
  CHECK(mlp_exponent({0.5f, 1e4f, 1e4f}, model, 0) < 28);
  CHECK(mlp_exponent({0, 0, 0}, model, 0) == 28);
}

}  // namespace moebius::test
