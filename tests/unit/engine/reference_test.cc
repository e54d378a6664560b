// Against Hugging Face transformers in float32 on the same bf16 weights (tests/data, examples/models: reference.json and
// reference.safetensors). The yardstick is the error of Hugging Face's own bf16 run: docs/numerics.md.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>

#include <nlohmann/json.hpp>

#include "lib/cpu/cpu_ops.h"
#include "tests/unit/engine/harness.h"

namespace moebius::test {
namespace {

using nlohmann::json;

// A trusted safetensors file of float32 tensors, read the short way.
class ReferenceTensors {
 public:
  explicit ReferenceTensors(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(in), {});
    uint64_t header = 0;
    std::memcpy(&header, bytes_.data(), 8);
    names_ = json::parse(bytes_.begin() + 8, bytes_.begin() + 8 + static_cast<long>(header));
    data_ = 8 + header;
  }
  std::vector<float> floats(const std::string& name) const {
    const json& t = names_.at(name);
    const uint64_t begin = t["data_offsets"][0], end = t["data_offsets"][1];
    std::vector<float> out((end - begin) / 4);
    std::memcpy(out.data(), bytes_.data() + data_ + begin, end - begin);
    return out;
  }

 private:
  std::vector<char> bytes_;
  json names_;
  uint64_t data_;
};

// Teacher forcing: the logits after every token of `ids`.
std::vector<float> logits_of(Engine& engine, const std::vector<int32_t>& ids) {
  Script s;
  s.requests.push_back({greedy_request("t", ids, 1, true)});
  return Runner(engine).run(s).outputs.at("t").logits;
}

struct Comparison {
  double ours = 0, theirs = 0;           // pooled RMS errors
  double calm = 0;                       // ours without the rows where a near tie sent a token to another expert
  int tied = 0, rows = 0;                // such rows, and all
  int wide = 0, wide_agree = 0;          // positions with a clear winner, and those of them with our arg-max equal
  int sequences = 0, greedy_wide = 0, greedy_equal = 0;
};

Comparison compare(const std::string& model, const EngineConfig& config) {
  const json reference = json::parse(std::ifstream(model + "/reference.json"));
  const ReferenceTensors tensors(model + "/reference.safetensors");
  Engine engine(model, config);
  const int64_t vocab = engine.model().vocab_size;

  std::vector<double> bf16_rms;
  for (const json& s : reference["sequences"]) bf16_rms.push_back(s["bf16_rms"]);
  std::vector<double> sorted = bf16_rms;
  std::sort(sorted.begin(), sorted.end());
  const double median = sorted[sorted.size() / 2];

  Comparison c;
  double squares = 0, their_squares = 0, calm_squares = 0;
  int64_t elements = 0, calm_elements = 0;
  int index = 0;
  for (const json& s : reference["sequences"]) {
    std::vector<int32_t> ids = s["prompt_ids"];
    const std::vector<int32_t> greedy = s["greedy_ids"];
    const std::vector<float> expected = tensors.floats("logits." + std::to_string(index));
    ids.insert(ids.end(), greedy.begin(), greedy.end());
    const std::vector<float> got = logits_of(engine, ids);
    REQUIRE(got.size() == expected.size());
    const std::vector<float> margin = tensors.floats("margin." + std::to_string(index));  // [moe layers, T]
    for (size_t row = 0; row < ids.size(); ++row) {
      double error = 0;
      for (size_t i = row * vocab; i < (row + 1) * vocab; ++i) error += std::pow(static_cast<double>(got[i]) - expected[i], 2);
      squares += error;
      // Explained: far off, and some router had to choose between experts closer than bf16 can tell (its logits are around 6).
      float least = INFINITY;
      for (size_t l = row; l < margin.size(); l += ids.size()) least = std::min(least, margin[l]);
      const bool explained = std::sqrt(error / static_cast<double>(vocab)) > 5 * median && least < 0.03f;
      c.tied += explained;
      ++c.rows;
      if (!explained) calm_squares += error, calm_elements += vocab;
    }
    their_squares += bf16_rms[index] * bf16_rms[index] * static_cast<double>(got.size());
    elements += static_cast<int64_t>(got.size());
    for (size_t row = 0; row < ids.size(); ++row) {
      std::vector<float> e(expected.begin() + row * vocab, expected.begin() + (row + 1) * vocab);
      const auto best = std::max_element(e.begin(), e.end()) - e.begin();
      const float top = e[best];
      e[best] = -INFINITY;
      const float gap = top - *std::max_element(e.begin(), e.end());
      const auto mine = std::max_element(got.begin() + row * vocab, got.begin() + (row + 1) * vocab) - (got.begin() + row * vocab);
      if (gap > 6 * median) {
        ++c.wide;
        c.wide_agree += mine == best;
      }
    }
    Script script;
    script.requests.push_back({greedy_request("g", s["prompt_ids"], 16)});
    const std::vector<int32_t> tokens = Runner(engine).run(script).outputs.at("g").tokens;
    ++c.sequences;
    if (static_cast<double>(s["min_top2_gap"]) > 3 * median) {
      ++c.greedy_wide;
      c.greedy_equal += tokens == greedy;
    }
    ++index;
  }
  c.ours = std::sqrt(squares / static_cast<double>(elements));
  c.calm = std::sqrt(calm_squares / static_cast<double>(calm_elements));
  c.theirs = std::sqrt(their_squares / static_cast<double>(elements));
  return c;
}

// Those of the CPU, or the device under test.
std::vector<std::string> kernel_paths() {
  if (test_device() != nullptr) return {test_device()};
  std::vector<std::string> out;
  for (const Isa isa : available_isas()) out.emplace_back(isa_name(isa));
  return out;
}

}  // namespace

TEST_CASE("logits are as close to float32 as Hugging Face's own bf16, and greedy tokens are equal") {
  const std::string shakespeare = std::string(MOEBIUS_SHIPPED_MODELS) + "/shakespeare-moe";
  for (const std::string& model : {kQwen, kDense, kMixtral, kQwen2, kGlm, kGranite, shakespeare})
    for (const std::string& path : kernel_paths()) {
      EngineConfig config;
      if (test_device() != nullptr) config.device = path;
      else config.isa = path;
      config.mode = test_mode();
      config.threads = 1;
      config.kv_tokens = 4096;
      const Comparison c = compare(model, config);
      INFO(model << " " << path << " " << config.mode << ": rms " << c.ours << " against " << c.theirs << ", arg-max " << c.wide_agree << " of "
                 << c.wide << ", greedy " << c.greedy_equal << " of " << c.greedy_wide);
      WARN(model.substr(model.rfind('/') + 1) << " " << path << ": rms " << c.ours << " against " << c.theirs << " ("
                                              << c.ours / c.theirs << "), " << c.calm << " without " << c.tied << " near ties, arg-max " << c.wide_agree << " of " << c.wide << ", greedy "
                                              << c.greedy_equal << " of " << c.greedy_wide);
      CHECK(c.calm <= 1.0 * c.theirs);
      CHECK(c.tied <= 0.01 * c.rows);
      CHECK(c.ours <= 1.25 * c.theirs);
      CHECK(c.wide_agree >= 0.99 * c.wide);
      CHECK(c.greedy_equal == c.greedy_wide);
    }
}

}  // namespace moebius::test
