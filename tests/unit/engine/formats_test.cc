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

std::string joined(const Tensors& tensors, const std::string& prefix, std::initializer_list<const char*> parts, int expert) {
  std::string out;
  for (const char* part : parts) out += tensors.at(prefix + std::to_string(expert) + "." + part + ".weight").bytes;
  return out;
}

}  // namespace

TEST_CASE("weights in f32 and f16 give the bits that they give in bf16") {
  for (const std::string& model : {kQwen, kMixtral}) {
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

TEST_CASE("experts fused into one tensor are read like experts one by one") {
  const Tensors single = read_tensors_of(kQwen);
  Tensors fused = single;
  std::erase_if(fused, [](const auto& entry) { return entry.first.find(".experts.") != std::string::npos; });
  for (int l = 0; l < 4; ++l) {
    const std::string prefix = "model.layers." + std::to_string(l) + ".mlp.experts.";
    StoredTensor gate_up{"BF16", {16, 256, 128}, {}}, down{"BF16", {16, 128, 128}, {}};
    for (int e = 0; e < 16; ++e) {
      gate_up.bytes += joined(single, prefix, {"gate_proj", "up_proj"}, e);
      down.bytes += joined(single, prefix, {"down_proj"}, e);
    }
    fused[prefix + "gate_up_proj"] = gate_up;
    fused[prefix + "down_proj"] = down;
  }
  const Outcome expected = outcome_of(kQwen);
  CHECK(difference(expected, outcome_of(kQwen, fused)) == "");
  CHECK(difference(expected, outcome_of(kQwen, each(fused, as_f32))) == "");
}

}  // namespace moebius::test
