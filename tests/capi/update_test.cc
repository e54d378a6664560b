// New weights for an engine that runs, by the C ABI: from a folder, from files in memory, from tensors by themselves.
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "moebius/moebius.hpp"
#include "tests/catch.h"

namespace {

const std::string kShipped = std::string(MOEBIUS_SHIPPED_MODELS) + "/shakespeare-moe";

std::string file(const char* name) {
  std::ifstream in(kShipped + "/" + name, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

struct Weights {
  std::string bytes;   // a safetensors file
  size_t data = 0;     // where its tensors begin
  nlohmann::json header;
};

// The model's, every other value with the other sign.
Weights changed() {
  Weights w{file("model.safetensors"), 0, {}};
  uint64_t size = 0;
  std::memcpy(&size, w.bytes.data(), 8);
  w.header = nlohmann::json::parse(w.bytes.substr(8, size));
  w.header.erase("__metadata__");
  w.data = 8 + size;
  for (size_t i = w.data + 1; i < w.bytes.size(); i += 4) w.bytes[i] = static_cast<char>(w.bytes[i] ^ 0x80);
  return w;
}

// Those tensors by themselves of which chosen(number, name) says so.
template <class Chosen>
void add_tensors(moebius_cpp::Source& source, const Weights& w, Chosen&& chosen) {
  size_t i = 0;
  for (const auto& [name, info] : w.header.items()) {
    const std::vector<size_t> at = info.at("data_offsets");
    if (chosen(i++, name)) source.add_tensor(name, info.at("dtype"), info.at("shape"), w.bytes.data() + w.data + at[0], at[1] - at[0]);
  }
}

std::vector<float> logits_of(moebius_cpp::Engine& engine) {
  moebius_cpp::Request r({52, 49, 47, 11, 12});
  const uint64_t id = engine.submit(r.set("temperature", int64_t{0}).set("max_tokens", int64_t{6}).set("keep_logits", int64_t{1}));
  while (engine.stats().running + engine.stats().waiting > 0) engine.step();
  return engine.take_logits(id);
}

moebius_cpp::Config config_of(moebius_layout layout) {
  moebius_cpp::Config c;
  c.set("ranks", int64_t{2}).set("threads", int64_t{1}).set("kv_tokens", int64_t{1024});
  c.set("layout", std::string(layout == MOEBIUS_LAYOUT_TP ? "tp" : "ep")).set("policy", std::string("manual"));
  return c;
}

moebius_status update(moebius_cpp::Engine& engine, const moebius_cpp::Source& source, std::string* why) {
  moebius_error* error = nullptr;
  const moebius_status status = moebius_engine_update_weights_from(engine.get(), source.get(), &error);
  *why = moebius_error_message(error);
  moebius_error_destroy(error);
  return status;
}

}  // namespace

TEST_CASE("weights from files in memory, from tensors and from a folder give the logits of an engine made of them", "[long]") {
  const Weights w = changed();
  const std::string config = file("config.json");
  moebius_cpp::Source files("trained"), tensors("trained");
  files.add("config.json", config.data(), config.size()).add("model.safetensors", w.bytes.data(), w.bytes.size());
  add_tensors(tensors, w, [](size_t, const std::string&) { return true; });
  for (moebius_layout layout : {MOEBIUS_LAYOUT_TP, MOEBIUS_LAYOUT_EP}) {
    moebius_cpp::Engine engine(kShipped, config_of(layout)), fresh(files, config_of(layout));
    const std::vector<float> old = logits_of(engine), expected = logits_of(fresh);
    REQUIRE(old != expected);
    for (int i = 0; i < 2; ++i) {
      engine.update_weights(i == 0 ? files : tensors);
      CHECK(logits_of(engine) == expected);
      engine.request_switch(layout == MOEBIUS_LAYOUT_TP ? MOEBIUS_LAYOUT_EP : MOEBIUS_LAYOUT_TP);
      CHECK(logits_of(engine) == expected);
      engine.update_weights(kShipped);
      CHECK(logits_of(engine) == old);
    }
    for (size_t half : {0, 1}) {
      moebius_cpp::Source some("trained");
      add_tensors(some, w, [half](size_t i, const std::string&) { return i % 2 == half; });
      engine.update_tensors(some);
      CHECK((logits_of(engine) == expected) == (half == 1));
    }
  }
  tensors.add("config.json", config.data(), config.size());
  moebius_cpp::Engine made(tensors, config_of(MOEBIUS_LAYOUT_TP)), fresh(files, config_of(MOEBIUS_LAYOUT_TP));
  CHECK(logits_of(made) == logits_of(fresh));
}

TEST_CASE("tensors that are missing, have another shape or are not what they say are refused, and the engine goes on with the old ones") {
  const Weights w = changed();
  moebius_cpp::Engine engine(kShipped, config_of(MOEBIUS_LAYOUT_TP));
  const std::vector<float> old = logits_of(engine);
  const auto source_of = [&](const std::string& without) {
    moebius_cpp::Source s("trained");
    add_tensors(s, w, [&](size_t, const std::string& name) { return name != without; });
    return s;
  };
  std::string why;
  const std::vector<char> zeros(1 << 20);
  moebius_cpp::Source s = source_of("model.norm.weight");
  CHECK(update(engine, s, &why) == MOEBIUS_E_CORRUPT_MODEL);
  CHECK_THAT(why, Catch::Contains("trained: tensor 'model.norm.weight' is missing"));
  s.add_tensor("model.norm.weight", "BF16", {2, 3}, zeros.data(), 12);
  CHECK(update(engine, s, &why) == MOEBIUS_E_CORRUPT_MODEL);
  CHECK_THAT(why, Catch::Contains("'model.norm.weight' has shape [2, 3]"));
  s.add_tensor("model.norm.weight", "BF16", {2, 3}, zeros.data(), 13);
  CHECK(update(engine, s, &why) == MOEBIUS_E_CORRUPT_MODEL);
  CHECK_THAT(why, Catch::Contains("make 12 bytes") && Catch::Contains("make 13"));
  s.add_tensor("model.norm.weight", "BF\"16", {-1}, zeros.data(), 12);
  CHECK(update(engine, s, &why) == MOEBIUS_E_CORRUPT_MODEL);
  CHECK_THAT(why, Catch::Contains("-1"));
  s = source_of("");
  s.add_tensor("model.layers.0.self_attn.q_proj.bias", "BF16", {6}, zeros.data(), 12);
  CHECK(update(engine, s, &why) == MOEBIUS_E_UNSUPPORTED);
  CHECK_THAT(why, Catch::Contains("would change what the model computes"));
  engine.submit(moebius_cpp::Request({1, 2}));
  CHECK(update(engine, source_of(""), &why) == MOEBIUS_E_INVALID_STATE);
  CHECK_THAT(why, Catch::Contains("drain"));
  while (engine.step().worked) {
  }
  CHECK(logits_of(engine) == old);
}
