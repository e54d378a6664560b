// Models, clusters and workloads as moebius-plan reads them: sizes by hand, and refusals by file and key.
#include "examples/plan/model.h"

#include <string>

#include <nlohmann/json.hpp>

#include "examples/inspect/plan.h"
#include "examples/plan/cluster.h"
#include "examples/plan/placement.h"
#include "examples/plan/shipped.h"
#include "examples/plan/workload.h"
#include "lib/base/error.h"
#include "tests/catch.h"

namespace moebius::plan {
namespace {

using Catch::Contains;
using nlohmann::json;

// Parameters of all layers and of what is replicated.
double parameters(const Model& m) {
  double sum = (m.config.tie_word_embeddings ? 1 : 2) * m.lm_head.products;
  for (const MlpShape& mlp : m.shape().mlps)
    sum += m.heads.products + m.keys.products +
           (mlp.num_experts > 0 ? mlp.num_experts * m.expert.products + m.shared.products + m.router.products : m.dense.products);
  return sum;
}

int64_t bytes_of(const SliceTable& table) {
  int64_t bytes = 0;
  for (int l = 0; l < table.num_layers(); ++l)
    for (const Slice& s : table.layer(l)) bytes += s.bytes;
  return bytes;
}

}  // namespace

TEST_CASE("shipped models have the parameters and the bytes that they are known for") {
  const Model a = read_model("qwen3-30b-a3b"), b = read_model("qwen3-235b-a22b"), oss = read_model("gpt-oss-120b"), v3 = read_model("deepseek-v3");
  CHECK((a.served && b.served && !oss.served && !v3.served));
  CHECK(parameters(a) == Approx(30.5e9).epsilon(0.005));
  CHECK(parameters(b) == Approx(235.1e9).epsilon(0.002));
  CHECK(parameters(oss) == Approx(116.8e9).epsilon(0.002));
  CHECK(parameters(v3) == Approx(671.0e9).epsilon(0.002));
  // Checkpoints: 65.2 GB in MXFP4; a byte a parameter and a float for each block of 128 × 128, embeddings in bf16.
  CHECK(static_cast<double>(bytes_of(oss.slices(1))) + oss.replicated_bytes == Approx(65.2e9).epsilon(0.003));
  CHECK(static_cast<double>(bytes_of(v3.slices(1))) + v3.replicated_bytes ==
        Approx(671e9 * (1 + 4.0 / 16384) + 2 * 2 * 129280.0 * 7168 / 2).epsilon(0.003));
  // A served model's parts are its slices.
  CHECK(static_cast<double>(bytes_of(b.slices(0))) == 94 * (128 * b.expert.bytes + b.heads.bytes + b.keys.bytes));
}

TEST_CASE("a cut that begins inside a block of MXFP4 has that block's scales too") {
  const Model oss = read_model("gpt-oss-120b");
  const SliceTable whole = oss.slices(1), cut = oss.slices(8);  // 2,880 neurons are 90 blocks; a cut of 360 touches 12
  const auto of = [](const SliceTable& t, int cuts) { return cuts * t.layer(0)[static_cast<size_t>(t.expert_cut(0, 0))].bytes; };
  CHECK(of(cut, 8) - of(whole, 1) >= (8 * 12 - 90) * 2880);
  CHECK(of(cut, 8) - of(whole, 1) < (8 * 12 - 90) * 2880 + 9 * 64);
}

TEST_CASE("latent KV is one head that every rank has in TP") {
  const Model v3 = read_model("deepseek-v3");
  CHECK(v3.kv_token_bytes == 2 * (512 + 64));
  const inspect::MemoryPlan plan = inspect::plan_slices(v3.slices(0), 8, v3.kv_slice_bytes(16), int64_t{130} << 30, 0);
  for (int r = 0; r < 8; ++r) CHECK(plan.arena.local_kv_heads(r, Layout::kTp).size() == 1);
  Cluster cluster = read_cluster("8xh200");
  const SwitchModel switches(plan, cluster, 16);
  CHECK(switches.kv_bytes_per_token(Layout::kEp) == 0);  // a home has it already
  CHECK(switches.kv_bytes_per_token(Layout::kTp) == Approx(61 * 1152 * 7 / 8.0));
}

TEST_CASE("published figures that are pure arithmetic: bytes of a layer, lead and KV tokens of an arena of 130 GiB on 8 ranks") {
  const Model model = read_model("qwen3-235b-a22b");
  const inspect::MemoryPlan plan = inspect::plan_slices(model.slices(0), 8, model.kv_slice_bytes(16), int64_t{130} << 30, 0);
  const ArenaPlan& arena = plan.arena;
  const auto mib = [&](Layout layout, bool experts) {
    int64_t bytes = 0;
    for (size_t i = 0; i < arena.table().layer(0).size(); ++i) {
      const Slice& s = arena.table().layer(0)[i];
      if ((s.kind == SliceKind::kExpertCut) == experts && arena.slice_offset(3, layout, 0, static_cast<int>(i)) >= 0) bytes += s.bytes;
    }
    return static_cast<double>(bytes) / (1 << 20);
  };
  CHECK(mib(Layout::kEp, true) == 576);
  CHECK(mib(Layout::kEp, false) == 136);
  CHECK(mib(Layout::kTp, true) == 576);
  CHECK(mib(Layout::kTp, false) == 18);
  CHECK(arena.ep_pages()[0] == 353387 / 16);
  CHECK(arena.tp_pages() == 1655215 / 16);
  CHECK(static_cast<double>(arena.lead(0)) / (1 << 20) == Approx(1312).margin(3));
  // What a rank gets of the weights: its part of the experts of the seven others, and to EP the attention that it lacks.
  const SwitchModel switches(plan, read_cluster("8xh200"), 16);
  CHECK(switches.weight_bytes(Layout::kTp) == 94 * 576.0 * 7 / 8 * (1 << 20));
  CHECK(switches.weight_bytes(Layout::kEp) == 94 * (576.0 * 7 / 8 + 136 - 18) * (1 << 20));
}

TEST_CASE("what fits and what does not is the engine's own plan") {
  const Model model = read_model("qwen3-235b-a22b");
  Cluster cluster = read_cluster("8xh200");
  const Placement placement = place(model, cluster, {});
  CHECK((placement.fits && placement.ranks == 8 && placement.replicas == 1));
  EngineConfig config = placement.engine;
  CHECK(inspect::plan_memory(model.config, config, true).arena.tp_pages() == placement.memory.arena.tp_pages());
  Settings settings;
  settings.memory_bytes = 20'000'000'000;
  const Placement poor = place(model, cluster, settings);
  CHECK((!poor.fits && poor.least_memory_bytes > settings.memory_bytes));
  CHECK_THAT(poor.why_not, Contains("short"));
  settings.memory_bytes = poor.least_memory_bytes;
  CHECK(place(model, cluster, settings).fits);
  // 72 devices: 9 replicas of 8 ranks; 18 ranks need more cuts than 8, 64 more than 16.
  cluster = read_cluster("nvl72");
  settings = {};
  settings.ranks = 8;
  CHECK(place(model, cluster, settings).replicas == 9);
  settings.ranks = 18;
  CHECK(place(read_model("deepseek-v3"), cluster, settings).engine.slices_per_expert == 32);
  settings.ranks = 73;
  CHECK_THROWS_WITH(place(model, cluster, settings), Contains("73 ranks") && Contains("72 devices"));
}

TEST_CASE("shipped clusters say where their numbers come from") {
  for (const Shipped& s : kClusters) {
    INFO(s.name);
    CHECK(!read_cluster(s.name).sources.empty());
  }
  CHECK(kClusters.size() >= 7);
}

TEST_CASE("a wrong fact is refused with its file and key") {
  json cluster = json::parse(read_shipped(kClusters, "8xh200", "cluster"));
  const auto refused = [&](const char* key, const json& value) {
    json wrong = cluster;
    if (value.is_discarded())
      wrong.erase(key);
    else
      wrong[key] = value;
    CHECK_THROWS_WITH(parse_cluster(wrong.dump(), "mine.json"), Contains("mine.json") && Contains(key));
  };
  refused("devices", -1);
  refused("devices", 1.5);
  refused("memory_bandwidth", "fast");
  refused("matrix_flops", json(json::value_t::discarded));
  refused("launch_s", nullptr);
  refused("inside", 7);
  refused("colour", "red");
  cluster["inside"]["latency_s"] = -1;
  CHECK_THROWS_WITH(parse_cluster(cluster.dump(), "mine.json"), Contains("mine.json: inside: latency_s"));

  json model = json::parse(read_shipped(kModels, "deepseek-v3", "model"));
  model["kv_lora_rank"] = 0;
  CHECK_THROWS_WITH(parse_model(model.dump(), "v3.json"), Contains("v3.json") && Contains("kv_lora_rank"));
  model = json::parse(read_shipped(kModels, "gpt-oss-120b", "model"));
  model["quantization_config"]["quant_method"] = "gptq";
  CHECK_THROWS_WITH(parse_model(model.dump(), "oss.json"), Contains("oss.json") && Contains("gptq"));
  model["model_type"] = "llama";
  CHECK_THROWS_WITH(parse_model(model.dump(), "llama.json"), Contains("llama.json") && Contains("llama"));
  CHECK_THROWS_WITH(read_cluster("9xh200"), Contains("9xh200") && Contains("8xh200"));
  CHECK_THROWS_WITH(read_workload("nothing"), Contains("nothing") && Contains("rollout"));
}

}  // namespace moebius::plan
