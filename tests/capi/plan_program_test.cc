// moebius-plan, the program: what it prints is JSON where it says so, always marked as simulated; bad input is status 2 with file and key.
#include <filesystem>
#include <fstream>
#include <string>

#include <unistd.h>
#include <nlohmann/json.hpp>

#include "tests/capi/program.h"

namespace {

using nlohmann::json;

Output run(const std::string& arguments, bool with_errors = false) { return output_of(MOEBIUS_PLAN, arguments, with_errors); }
json report(const std::string& arguments) {
  const Output r = run(arguments + " --format json");
  INFO(arguments);
  REQUIRE(r.status == 0);
  const json result = json::parse(r.out);
  CHECK(result["simulated"] == true);
  return result;
}

}  // namespace

TEST_CASE("a plan says what fits, what steps and switches take, and what to do") {
  const Folder folder;
  std::ofstream(folder.path + "/load.json")
      << R"({"kind": "rollout", "prompts": 40, "samples": 4, "prompt": {"median": 64, "most": 128, "sigma": 0.3},
                                                   "answer": {"median": 60, "most": 900, "sigma": 1.2}})";
  const std::string flags = "--config qwen3-30b-a3b --cluster 8xa100 --workload " + folder.path + "/load.json";
  const json r = report(flags);
  CHECK((r["fits"] == true && r["ranks"] == 8 && r["replicas"] == 1));
  CHECK(r["layer"]["ep_expert_bytes"] == 144.0 * (1 << 20));
  CHECK(r["steps"].size() == 13);
  for (const json& step : r["steps"]) CHECK((step["tp_seconds"] > 0.0 && step["ep_seconds"] > 0.0));
  CHECK(r["switches"].size() == 2);
  CHECK(r["workload"]["runs"].size() == 3);
  for (const auto& [name, served] : r["workload"]["runs"].items()) CHECK(served["tokens"] == r["workload"]["runs"]["tp"]["tokens"]);
  CHECK(r["recommendation"].get<std::string>().find("Simulated: ") == 0);
  const Output table = run(flags + " --html " + folder.path + "/page.html");
  CHECK(table.status == 0);
  CHECK(table.out.find("SIMULATED") == 0);
  CHECK(table.out.find(r["recommendation"].get<std::string>()) != std::string::npos);
  std::ifstream in(folder.path + "/page.html");
  const std::string page{std::istreambuf_iterator<char>(in), {}};
  CHECK(page.find("<!doctype html>") == 0);
  CHECK(page.find("simulated, none measured") != std::string::npos);
  for (const char* elsewhere : {"http://", "https://", "src="}) CHECK(page.find(elsewhere) == std::string::npos);
}

TEST_CASE("every shipped model on every shipped cluster is planned, or refused as not fitting") {
  const Output list = run("--list");
  CHECK(list.status == 0);
  const json names = json::parse(run("--list --format json").out);
  CHECK((names["models"].size() == 4 && names["clusters"].size() == 8 && names["clusters"][0] == "2core-zen5"));
  for (const char* model : {"qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-120b", "deepseek-v3"})
    for (const char* cluster : {"8xh200", "8xh100", "8xa100", "8xb200", "2xcpu", "2core-zen5", "nvl72", "4x8xh100"}) {
      CHECK(list.out.find(std::string("model ") + model + "\n") != std::string::npos);
      CHECK(list.out.find(std::string("cluster ") + cluster + "\n") != std::string::npos);
      const json r = report(std::string("--workload none --config ") + model + " --cluster " + cluster + " --max-batch 256");
      CHECK(r["fits"] == (r["least_memory_bytes"] <= r["memory_bytes"]));
    }
}

TEST_CASE("published figures stand beside predictions; those of pure arithmetic are met") {
  const json r = report("--published");
  int fitted = 0;
  for (const json& row : r["rows"]) {
    fitted += row["fitted"].get<bool>();
    if (row["unit"] == "MiB") CHECK(row["error"] == 0.0);
    if (row["unit"] == "tokens") CHECK(std::abs(row["error"].get<double>()) < 0.055);
  }
  CHECK(fitted == 1);
  CHECK(run("--published").out.find("SIMULATED beside published figures") == 0);
}

TEST_CASE("a sweep of ten thousand configurations") {
  const json r = report("--sweep --config qwen3-30b-a3b --workload none");
  CHECK(r["points"] >= 10000);
  CHECK(r["rows"].size() == r["points"]);
  CHECK(r["seconds"] < 60.0);
}

TEST_CASE("bad usage and bad input are status 2, on stderr, and no result") {
  CHECK(run("--help").status == 0);
  const Folder folder;
  const auto file = [&](const char* name, const char* text) {
    std::ofstream(folder.path + "/" + name) << text;
    return folder.path + "/" + name;
  };
  const std::string cluster = file("cluster.json", R"({"devices": 8, "devices_per_node": "all"})");
  const std::string load =
      file("load.json",
           R"({"kind": "rollout", "prompts": 1, "prompt": {"median": 1, "most": 1, "sigma": 0}, "answer": {"median": 0, "most": 1, "sigma": 0}})");
  const std::string small = std::string(MOEBIUS_SHIPPED_MODELS) + "/shakespeare-moe";
  const std::string model = file("config.json", R"({"model_type": "gpt_oss", "num_hidden_layers": 0})");
  const std::string rows = file("rows.jsonl", "{\"what\": \"decode\", \"shape\": 7}\n");
  const std::pair<std::string, const char*> bad[] = {{"--no-such-flag", "--no-such-flag"},
                                                     {"--cluster /no/such", "/no/such"},
                                                     {"--config /no/such", "/no/such"},
                                                     {"--format xml", "xml"},
                                                     {"--published --html page.html", "--html"},
                                                     {"--published --sweep", "--sweep"},
                                                     {"--routing-skew nan", "--routing-skew"},
                                                     {"--html /no/such/page.html", "/no/such/page.html"},
                                                     {"--fit-shape s", "--fit"},
                                                     {"--ranks 9", "9 ranks"},
                                                     {"--page-tokens 8", "page_tokens"},
                                                     {"--cluster " + cluster, "cluster.json: devices_per_node"},
                                                     {"--workload " + load, "load.json: answer: median"},
                                                     {"--config " + model, "config.json: num_hidden_layers"},
                                                     {"--config " + small + " --ranks 2", "answers of up to 8192"},
                                                     {"--fit " + rows, "rows.jsonl:1: shape"},
                                                     {"--fit /no/such", "/no/such"}};
  for (const auto& [arguments, named] : bad) {
    INFO(arguments);
    const Output r = run(arguments);
    CHECK(r.status == 2);
    CHECK(r.out.empty());
    CHECK(run(arguments, true).out.find(named) != std::string::npos);
  }
}
