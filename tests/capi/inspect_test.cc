// moebius-inspect against the engine's own report, and against sizes computed by hand of models that are not here.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include <nlohmann/json.hpp>

#include "moebius/moebius.hpp"
#include "tests/capi/program.h"

namespace {

using nlohmann::json;

const std::string kModel = std::string(MOEBIUS_SHIPPED_MODELS) + "/shakespeare-moe";

Output run(const std::string& arguments, bool with_errors = false) { return output_of(MOEBIUS_INSPECT, arguments, with_errors); }
json report(const std::string& arguments) {
  const Output r = run(arguments + " --format json");
  INFO(arguments);
  REQUIRE(r.status == 0);
  return json::parse(r.out);
}

moebius_memory engine_memory(const moebius_cpp::Engine& engine) {
  moebius_memory memory{};
  memory.struct_size = sizeof memory;
  moebius_cpp::check([&](moebius_error** e) { return moebius_engine_memory(engine.get(), &memory, e); });
  return memory;
}

// config.json of a Qwen3-MoE model.
void write_config(const Folder& folder, int64_t layers, int64_t hidden, int64_t neurons, int64_t heads) {
  std::ofstream(folder.path + "/config.json") << json{
      {"architectures", {"Qwen3MoeForCausalLM"}}, {"model_type", "qwen3_moe"}, {"hidden_act", "silu"}, {"num_hidden_layers", layers}, {"hidden_size", hidden},
      {"num_experts", 128}, {"num_experts_per_tok", 8}, {"moe_intermediate_size", neurons}, {"intermediate_size", 4 * neurons}, {"num_attention_heads", heads},
      {"num_key_value_heads", 4}, {"head_dim", 128}, {"vocab_size", 151936}, {"max_position_embeddings", 40960}, {"rms_norm_eps", 1e-6}, {"rope_theta", 1e6},
      {"norm_topk_prob", true}, {"tie_word_embeddings", false}, {"decoder_sparse_step", 1}, {"mlp_only_layers", json::array()}};
}

}  // namespace

TEST_CASE("what is planned is what the engine reports") {
  const auto ranks = GENERATE(int64_t{1}, int64_t{2}, int64_t{4});
  const auto settings = GENERATE(values<std::map<std::string, int64_t>>({
      {},
      {{"memory-bytes", 48'000'000}},
      {{"memory-bytes", 20'000'123}, {"page-tokens", 32}, {"max-batch", 8}, {"threads", 2}},
      {{"kv-tokens", 5000}, {"slices-per-expert", 8}, {"chunk-tokens", 64}, {"max-context", 512}},
  }));
  moebius_cpp::Config config;
  config.set("ranks", ranks);
  std::string flags = "--model " + kModel + " --ranks " + std::to_string(ranks);
  for (const auto& [flag, value] : settings) {
    flags += " --" + flag + " " + std::to_string(value);
    std::string key = flag;
    std::replace(key.begin(), key.end(), '-', '_');
    config.set(key.c_str(), value);
  }
  INFO(flags);
  const moebius_memory engine = engine_memory(moebius_cpp::Engine(kModel, config));
  const json r = report(flags);
  CHECK(r["fits"] == true);
  CHECK(r["tensors"] == "match");
  const json& m = r["memory"];
  CHECK(m["arena_bytes"] == engine.arena_bytes);
  CHECK(m["kept_bytes"] == engine.kept_bytes);
  CHECK(m["lead_bytes"] == engine.lead_bytes);
  CHECK(m["workspace_bytes"] == engine.workspace_bytes);
  CHECK(m["shared_bytes"] == engine.shared_bytes);
  CHECK(m["layer_bytes"] == engine.layer_bytes);
  CHECK(m["tp_tokens"] == engine.tp_tokens);
  CHECK(m["ep_tokens"] == engine.ep_tokens);
}

TEST_CASE("large models without weights: slices, memory and switches add up") {
  struct Shape {
    int64_t layers, hidden, neurons, heads;
  };
  const Shape shape = GENERATE(Shape{48, 2048, 768, 32}, Shape{94, 4096, 1536, 64});  // Qwen3-30B-A3B, Qwen3-235B-A22B
  const Folder folder;
  write_config(folder, shape.layers, shape.hidden, shape.neurons, shape.heads);
  constexpr int64_t kRanks = 8, kMemory = 141'000'000'000, kExperts = 128, kKvHeads = 4, kHeadDim = 128, kBytes = 2;
  const json r = report("--model " + folder.path + " --ranks 8 --memory-bytes 141000000000 --layers --own-memory");
  CHECK(r["tensors"] == "none");
  CHECK(r["fits"] == true);
  CHECK(r["layers"].size() == static_cast<size_t>(shape.layers));

  // bf16, and no width here needs padding.
  const int64_t experts = shape.layers * kExperts * 3 * shape.hidden * shape.neurons * kBytes;
  const int64_t queries = shape.layers * 2 * shape.hidden * shape.heads * kHeadDim * kBytes, keys = shape.layers * 2 * shape.hidden * kKvHeads * kHeadDim * kBytes;
  std::map<std::string, int64_t> bytes;
  int64_t of_layers = 0;
  for (const json& s : r["slices"]) {
    bytes[s["kind"]] += s["bytes"].get<int64_t>();
    CHECK(s["count"].get<int64_t>() * s["bytes_each"].get<int64_t>() == s["bytes"].get<int64_t>());
  }
  for (const json& layer : r["layers"]) of_layers += layer["bytes"].get<int64_t>();
  CHECK(bytes["expert cut"] == experts);
  CHECK(bytes["attention group"] == queries);
  CHECK(bytes["K/V projection"] == keys);
  CHECK(of_layers == experts + queries + keys);

  // 8 ranks, 8 cuts, 128 experts: of a rank's weights in either layout one in 8 is kept.
  for (const json& rank : r["per_rank"]) {
    CHECK(rank["tp_moving_bytes"] == experts / kRanks - experts / kRanks / kRanks);
    CHECK(rank["arena_bytes"].get<int64_t>() + r["memory"]["workspace_bytes"].get<int64_t>() + r["memory"]["shared_bytes"].get<int64_t>() <= kMemory);
    for (const char* layout : {"tp", "ep"}) {
      const std::string name = layout;
      CHECK(rank["kept_bytes"].get<int64_t>() + rank[name + "_moving_bytes"].get<int64_t>() + rank[name + "_kv_bytes"].get<int64_t>() <=
            rank["arena_bytes"].get<int64_t>());
    }
  }
  // To TP every rank takes its cuts of the experts of the other seven. KV of a token: two ranks hold each head in TP.
  const json& to_tp = r["switches"][1];
  CHECK(to_tp["to"] == "tp");
  CHECK(to_tp["weight_bytes_changed"] == experts - experts / kRanks);
  const double token = static_cast<double>(shape.layers * kKvHeads * 2 * kHeadDim * kBytes);
  CHECK(r["switches"][0]["kv_bytes_per_token"] == token);
  CHECK(to_tp["kv_bytes_per_token"] == 2 * token);
  CHECK(to_tp["kv_bytes_changed_per_token"] == 2 * token - 2 * token / kRanks);
}

TEST_CASE("what does not fit is said with what would") {
  const Folder folder;
  write_config(folder, 94, 4096, 1536, 64);
  const std::string flags = "--model " + folder.path + " --memory-bytes ";
  const json r = report(flags + "80000000000 --ranks 4");
  CHECK(r["fits"] == false);
  CHECK(r["ranks_that_fit"] == 8);
  const int64_t least = r["least_memory_bytes"];
  CHECK(r["short_bytes"] == least - 80'000'000'000);
  CHECK(report(flags + std::to_string(least) + " --ranks 4")["fits"] == true);
  CHECK(report(flags + std::to_string(least - 4096) + " --ranks 4")["fits"] == false);
  CHECK(report(flags + "80000000000 --ranks 8")["fits"] == true);
  CHECK(report(flags + "1000000000 --ranks 4")["ranks_that_fit"].is_null());
  const Output table = run(flags + "80000000000 --ranks 4 --layers");
  CHECK(table.status == 0);
  CHECK(table.out.find("does not fit, " + std::to_string(least - 80'000'000'000) + " bytes are missing") != std::string::npos);
  CHECK(table.out.find("or 8 ranks") != std::string::npos);
}

TEST_CASE("tensors that config.json does not call for are named; bad usage is status 2 and no result") {
  const Folder folder;
  json config = json::parse(std::ifstream(kModel + "/config.json"));
  config["num_hidden_layers"] = config["num_hidden_layers"].get<int>() - 1;
  std::ofstream(folder.path + "/config.json") << config;
  std::filesystem::create_symlink(std::filesystem::absolute(kModel + "/model.safetensors"), folder.path + "/model.safetensors");
  CHECK(report("--model " + folder.path)["tensors"].get<std::string>().find("model.layers.5") != std::string::npos);

  const std::string loop = folder.path + "/model.safetensors", strange = folder.path + "/\xff";
  std::filesystem::remove(loop);
  std::filesystem::create_symlink("model.safetensors", loop);
  CHECK(report("--model " + folder.path)["tensors"].get<std::string>().find("model.safetensors") != std::string::npos);
  std::filesystem::create_directory_symlink(folder.path, strange);
  CHECK(report("--model '" + strange + "'")["model"]["path"] == folder.path + "/\uFFFD");
  CHECK(run("--help").status == 0);
  for (const char* bad : {"", "--no-such-flag", "--model /no/such", "--format xml --model ", "--ranks 5 --model ", "--ranks 0 --model ", "--page-tokens 8 --model ",
                          "--slices-per-expert 7 --model ", "--isa sse9 --model ", "--max-context 4096 --model ", "--memory-bytes -1 --model "}) {
    const std::string arguments = std::string(bad) + (std::string(bad).ends_with("--model ") ? kModel : "");
    INFO(arguments);
    const Output r = run(arguments);
    CHECK(r.status == 2);
    CHECK(r.out.empty());
    CHECK(!run(arguments, true).out.empty());
  }
}
