// The same weights in every form that a checkpoint may have give the same tokens and logits, bit for bit.
#include <fstream>

#include <nlohmann/json.hpp>

#include "tests/unit/engine/harness.h"
#include "tests/unit/model/files.h"

namespace moebius::test {
namespace {

using nlohmann::json;

uint16_t half_at(const std::string& bytes, size_t i) {
  uint16_t x;
  std::memcpy(&x, bytes.data() + i * 2, 2);
  return x;
}

void append_half(std::string& bytes, uint16_t x) { bytes.append(reinterpret_cast<const char*>(&x), 2); }

// bf16 has the upper half of a float's bits.
StoredTensor as_f32(const StoredTensor& t) {
  StoredTensor out{"F32", t.shape, {}};
  for (size_t i = 0; i < t.bytes.size() / 2; ++i) {
    append_half(out.bytes, 0);
    append_half(out.bytes, half_at(t.bytes, i));
  }
  return out;
}

// Values that f16 holds as normal numbers; others become 0.
StoredTensor representable(const StoredTensor& t) {
  StoredTensor out{"BF16", t.shape, {}};
  for (size_t i = 0; i < t.bytes.size() / 2; ++i) {
    const uint16_t x = half_at(t.bytes, i);
    const int exponent = (x >> 7 & 0xff) - 127;
    append_half(out.bytes, exponent >= -14 && exponent <= 15 ? x : uint16_t{0});
  }
  return out;
}

// Of representable values: 7 bits of mantissa become the upper ones of 10.
StoredTensor as_f16(const StoredTensor& t) {
  StoredTensor out{"F16", t.shape, {}};
  for (size_t i = 0; i < t.bytes.size() / 2; ++i) {
    const uint16_t x = half_at(t.bytes, i);
    const int exponent = (x >> 7 & 0xff) - 127;
    append_half(out.bytes, x == 0 ? uint16_t{0} : static_cast<uint16_t>((x & 0x8000) | (exponent + 15) << 10 | (x & 0x7f) << 3));
  }
  return out;
}

template <class F>
Tensors each(const Tensors& tensors, F&& f) {
  Tensors out;
  for (const auto& [name, t] : tensors) out[name] = f(t);
  return out;
}

// Two ranks, a switch, logits kept.
Outcome outcome_of(const std::filesystem::path& folder) {
  return run_script(folder.string(), small_config(2, 1, Layout::kTp),
                    {{{greedy_request("a", prompt_of(1, 30), 6, true)}, {greedy_request("b", prompt_of(2, 9), 6, true), 1}}, {{3, 0}}});
}

Outcome outcome_of(const std::string& model, const Tensors& tensors, size_t header_padding = 0) {
  const TempFolder folder;
  std::filesystem::copy(model + "/config.json", folder / "config.json");
  write_tensors(folder / "model.safetensors", tensors, header_padding);
  return outcome_of(folder.path());
}

void rename(Tensors& tensors, const std::string& from, const std::string& to) {
  auto node = tensors.extract(from);
  REQUIRE(!node.empty());
  node.key() = to;
  tensors.insert(std::move(node));
}

// The experts of a layer become two tensors, [experts, 2 · width, 128] and [experts, 128, width].
void fuse(Tensors& tensors, const std::string& single, std::initializer_list<const char*> gate_up, const char* down, const std::string& fused,
          int64_t experts, int64_t width) {
  StoredTensor both{"BF16", {experts, 2 * width, 128}, {}}, downs{"BF16", {experts, 128, width}, {}};
  for (int64_t e = 0; e < experts; ++e) {
    const auto take = [&](const char* part) { return tensors.extract(single + std::to_string(e) + "." + part + ".weight").mapped().bytes; };
    for (const char* part : gate_up) both.bytes += take(part);
    downs.bytes += take(down);
  }
  tensors[fused + "gate_up_proj"] = both;
  tensors[fused + "down_proj"] = downs;
}

}  // namespace

TEST_CASE("weights in f32 and f16 give the bits that they give in bf16") {
  for (const std::string& model : {kQwen, kMixtral, kQwen2, kGlm, kGranite}) {
    const Tensors bf16 = read_tensors_of(model);
    CHECK(difference(outcome_of(model), outcome_of(model, each(bf16, as_f32))) == "");
    const Tensors exact = each(bf16, representable);
    CHECK(difference(outcome_of(model, exact), outcome_of(model, each(exact, as_f16))) == "");
  }
}

TEST_CASE("tensors at odd addresses are read as they are") {
  Tensors bf16 = read_tensors_of(kQwen), f32 = each(bf16, as_f32);
  const Outcome expected = outcome_of(kQwen);
  bf16["a.first"] = f32["a.first"] = {"U8", {1}, "x"};  // everything behind it begins at an odd offset
  for (size_t padding : {0, 1}) {                       // and the data at an even or odd byte of the file
    CHECK(difference(expected, outcome_of(kQwen, bf16, padding)) == "");
    CHECK(difference(expected, outcome_of(kQwen, f32, padding)) == "");
  }
}

TEST_CASE("shards of several dtypes, mixed inside a layer, are one checkpoint") {
  const Tensors exact = each(read_tensors_of(kQwen), representable);
  Tensors shards[3];
  json map = json::object();
  size_t i = 0;
  for (const auto& [name, t] : exact) {
    const size_t shard = i++ % 3;
    shards[shard][name] = i % 2 ? (i % 5 ? as_f32(t) : t) : as_f16(t);
    map[name] = "part" + std::to_string(shard) + ".safetensors";
  }
  const TempFolder folder;
  std::filesystem::copy(kQwen + "/config.json", folder / "config.json");
  for (size_t s = 0; s < 3; ++s) write_tensors(folder / ("part" + std::to_string(s) + ".safetensors"), shards[s], s);
  write_file(folder / "model.safetensors.index.json", json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}.dump());
  CHECK(difference(outcome_of(kQwen, exact), outcome_of(folder.path())) == "");
}

TEST_CASE("tensors as transformers 5 has them in memory, experts fused, are read like a checkpoint's") {
  for (const std::string& model : {kQwen, kMixtral, kQwen2, kGlm, kGranite}) {
    Tensors tensors = read_tensors_of(model);
    for (int l = 0; l < 4; ++l) {
      const std::string layer = "model.layers." + std::to_string(l) + ".", mlp = layer + "mlp.", sparse = layer + "block_sparse_moe.";
      if (model == kQwen) fuse(tensors, mlp + "experts.", {"gate_proj", "up_proj"}, "down_proj", mlp + "experts.", 16, 128);
      if (model == kQwen2 && l != 2) fuse(tensors, mlp + "experts.", {"gate_proj", "up_proj"}, "down_proj", mlp + "experts.", 10, 64);
      if (model == kGlm && (l == 1 || l == 2)) fuse(tensors, mlp + "experts.", {"gate_proj", "up_proj"}, "down_proj", mlp + "experts.", 8, 64);
      if (model == kMixtral) {
        fuse(tensors, sparse + "experts.", {"w1", "w3"}, "w2", mlp + "experts.", 8, 256);
        rename(tensors, sparse + "gate.weight", mlp + "gate.weight");
      }
      if (model == kGranite) {
        rename(tensors, sparse + "input_linear.weight", sparse + "experts.gate_up_proj");
        rename(tensors, sparse + "output_linear.weight", sparse + "experts.down_proj");
        rename(tensors, sparse + "router.layer.weight", sparse + "router.weight");
      }
    }
    const Outcome expected = outcome_of(model);
    CHECK(difference(expected, outcome_of(model, tensors)) == "");
    CHECK(difference(expected, outcome_of(model, each(tensors, as_f32))) == "");
  }
}

TEST_CASE("a tensor under both of its names is refused") {
  Tensors tensors = read_tensors_of(kMixtral);
  tensors["model.layers.2.mlp.gate.weight"] = tensors.at("model.layers.2.block_sparse_moe.gate.weight");
  CHECK_THROWS_WITH(outcome_of(kMixtral, tensors), Catch::Contains("model.layers.2.mlp.gate.weight"));
}

}  // namespace moebius::test
