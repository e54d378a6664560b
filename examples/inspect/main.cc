// moebius-inspect: how a checkpoint is cut into slices and laid out, and what fits. Links the library's inner parts (config, layout, planning).
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string_view>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "examples/common/inner_main.h"
#include "examples/common/strict_json.h"
#include "examples/inspect/plan.h"
#include "examples/inspect/report.h"
#include "lib/base/error.h"
#include "lib/model/weights.h"

namespace moebius::inspect {
namespace {

using json = nlohmann::ordered_json;

struct Options {
  std::string model, format = "table";
  bool layers = false, own_memory = false;
  EngineConfig engine;
};

json model_facts(const ModelConfig& model, const std::string& path) {
  const ModelShape& s = model.shape;
  int experts = 0, shared_experts = 0, expert_neurons = 0, dense_neurons = 0, sparse = 0;
  for (const MlpShape& mlp : s.mlps) {
    (mlp.num_experts > 0 ? expert_neurons : dense_neurons) = mlp.intermediate;
    experts = std::max(experts, mlp.num_experts);
    shared_experts = std::max(shared_experts, mlp.num_shared);
    sparse += mlp.num_experts > 0;
  }
  return {{"path", path},          {"family", model.family},       {"layers", s.num_layers()},        {"sparse_layers", sparse},
          {"hidden", s.hidden},    {"experts", experts},           {"top_k", model.top_k},            {"shared_experts", shared_experts}, {"expert_neurons", expert_neurons},
          {"dense_neurons", dense_neurons}, {"heads", s.num_heads}, {"kv_heads", s.num_kv_heads},     {"head_dim", s.head_dim},
          {"vocab", model.vocab_size},      {"context", model.max_position_embeddings}, {"tied_embeddings", model.tie_word_embeddings}};
}

void warn(const std::string& text) { moebius_examples::complain("warning: {}\n", text); }

// "match", "none" (config.json alone), or what is wrong.
std::string compare_tensors(const std::string& path, const ModelConfig& model) {
  const std::filesystem::path dir = path;
  const auto there = [&](const char* file) { return std::filesystem::exists(symlink_status(dir / file)); };  // a link to nowhere too
  if (!there("model.safetensors") && !there("model.safetensors.index.json")) return "none";
  try {
    open_checkpoint(dir, model, warn);
    return "match";
  } catch (const Error& e) {
    return e.what();
  }
}

json layer_rows(const ArenaPlan& arena) {
  json out = json::array();
  for (int l = 0; l < arena.num_layers(); ++l) {
    const MlpShape& mlp = arena.table().model().mlps[static_cast<size_t>(l)];
    int64_t bytes = 0;
    for (const Slice& slice : arena.table().layer(l)) bytes += slice.bytes;
    json row = {{"layer", l}, {"experts", mlp.num_experts}, {"shared_experts", mlp.num_shared}, {"neurons", mlp.intermediate}, {"slices", arena.table().layer(l).size()}, {"bytes", bytes}};
    for (Layout layout : kLayouts) {
      json& ranges = row[std::string(moebius::name_of(layout)) + "_ranges"] = json::array();
      for (int r = 0; r < arena.ranks(); ++r) ranges.push_back({arena.item_range(r, layout, l).begin, arena.item_range(r, layout, l).end});
    }
    out.push_back(std::move(row));
  }
  return out;
}

// None where it does not fit.
std::optional<MemoryPlan> plan_if_it_fits(const ModelConfig& model, const EngineConfig& config, bool own_memory) {
  try {
    return plan_memory(model, config, own_memory);
  } catch (const Error& e) {
    if (e.code() != Code::kDoesNotFit) throw;
    return std::nullopt;
  }
}

// The fewest ranks with as much memory each among which the model fits; none: not among as many as it can be divided over.
json ranks_that_fit(const ModelConfig& model, EngineConfig config, bool own_memory) {
  try {
    for (++config.ranks;; ++config.ranks)
      if (plan_if_it_fits(model, config, own_memory)) return config.ranks;
  } catch (const Error& e) {
    if (e.code() != Code::kInvalidArgument) throw;
    return nullptr;
  }
}

json inspect(const Options& o) {
  const ModelConfig model = read_config(o.model);
  for (const std::string& key : model.unknown_keys) warn("config.json: " + key + " is not known and was ignored");
  const std::optional<MemoryPlan> fitting = plan_if_it_fits(model, o.engine, o.own_memory);
  const MemoryPlan least = plan_least(model, o.engine, o.own_memory);
  const MemoryPlan& plan = fitting ? *fitting : least;
  const SliceCounts counts = plan.arena.table().counts();

  json ranks = rank_rows(plan.arena, o.engine.page_tokens);
  json out = {{"what", "inspect"},
              {"model", model_facts(model, o.model)},
              {"tensors", compare_tensors(o.model, model)},
              {"ranks", o.engine.ranks},
              {"slices_per_expert", counts.cuts},
              {"head_groups", counts.head_groups},
              {"page_tokens", o.engine.page_tokens},
              {"own_memory", o.own_memory},
              {"slices", slices_by_kind(plan.arena.table())},
              {"fits", fitting.has_value()},
              {"memory_bytes", fitting ? plan.memory_bytes : o.engine.memory_bytes},
              {"least_memory_bytes", least.memory_bytes},
              {"short_bytes", fitting ? 0 : least.memory_bytes - o.engine.memory_bytes},
              {"ranks_that_fit", fitting ? json(o.engine.ranks) : ranks_that_fit(model, o.engine, o.own_memory)},
              {"memory", memory_report(plan, ranks)},
              {"per_rank", std::move(ranks)},
              {"switches", {switch_row(plan, Layout::kEp, o.engine.page_tokens), switch_row(plan, Layout::kTp, o.engine.page_tokens)}}};
  if (o.layers) out["layers"] = layer_rows(plan.arena);
  return out;
}

// ---- as a table

std::string size_text(double bytes) {
  const char* unit = "B";
  for (const char* next : {"kB", "MB", "GB", "TB"}) {
    if (bytes < 1e4) break;
    bytes /= 1000;
    unit = next;
  }
  return fmt::format("{:.{}f} {}", bytes, unit[0] == 'B' ? 0 : 1, unit);
}
std::string size_text(const json& bytes) { return size_text(bytes.get<double>()); }
int64_t number(const json& value) { return value.get<int64_t>(); }

void print_model(const json& r) {
  const json& m = r["model"];
  fmt::print("{}: {}, {} layers ({} sparse), hidden {}, {} experts of {} neurons, {} a token", m["path"].get<std::string>(), m["family"].get<std::string>(),
             number(m["layers"]), number(m["sparse_layers"]), number(m["hidden"]), number(m["experts"]), number(m["expert_neurons"]), number(m["top_k"]));
  if (number(m["shared_experts"]) > 0) fmt::print(" and {} shared", number(m["shared_experts"]));
  if (number(m["dense_neurons"]) > 0) fmt::print(", dense MLPs of {}", number(m["dense_neurons"]));
  fmt::print("\n  {} query and {} KV heads × {}, vocabulary {}{}, context {}\n", number(m["heads"]), number(m["kv_heads"]), number(m["head_dim"]),
             number(m["vocab"]), m["tied_embeddings"] ? " (tied)" : "", number(m["context"]));
  const std::string tensors = r["tensors"];
  fmt::print("  tensors: {}\n", tensors == "none" ? "no checkpoint here, config.json only" : tensors == "match" ? "those that config.json calls for" : tensors);
}

void print_slices(const json& r) {
  fmt::print("\nslices: {} cuts of an MLP, {} head groups\n  {:16} {:>10} {:>14} {:>12}\n", number(r["slices_per_expert"]), number(r["head_groups"]), "kind",
             "count", "bytes each", "in all");
  for (const json& s : r["slices"])
    fmt::print("  {:16} {:10} {:14} {:>12}\n", s["kind"].get<std::string>(), number(s["count"]), number(s["bytes_each"]), size_text(s["bytes"]));
}

void print_ranks(const json& r) {
  fmt::print("\n  {:4} {:>10} {:>10} {:>11} {:>11} {:>10} {:>10} {:>10} {:>11} {:>11}\n", "rank", "arena", "kept", "TP moving", "EP moving", "TP KV", "EP KV",
             "lead", "TP tokens", "EP tokens");
  for (const json& row : r["per_rank"])
    fmt::print("  {:4} {:>10} {:>10} {:>11} {:>11} {:>10} {:>10} {:>10} {:11} {:11}\n", number(row["rank"]), size_text(row["arena_bytes"]),
               size_text(row["kept_bytes"]), size_text(row["tp_moving_bytes"]), size_text(row["ep_moving_bytes"]), size_text(row["tp_kv_bytes"]),
               size_text(row["ep_kv_bytes"]), size_text(row["lead_bytes"]), number(row["tp_tokens"]), number(row["ep_tokens"]));
}

void print_fit(const json& r) {
  const std::string ranks = fmt::format("{} rank{}", number(r["ranks"]), number(r["ranks"]) == 1 ? "" : "s");
  if (r["fits"].get<bool>()) {
    fmt::print("\n{} with {} each: fits; at least {} are needed\n", ranks, size_text(r["memory_bytes"]), size_text(r["least_memory_bytes"]));
    return;
  }
  fmt::print("\n{} with {} each: does not fit, {} bytes are missing on a rank: {} bytes each would do", ranks, size_text(r["memory_bytes"]),
             number(r["short_bytes"]), number(r["least_memory_bytes"]));
  if (r["ranks_that_fit"].is_null()) fmt::print("; no number of ranks helps with these slices\n");
  else fmt::print(", or {} ranks\n", number(r["ranks_that_fit"]));
  fmt::print("what follows is the smallest layout: one page of KV\n");
}

void print_memory(const json& r) {
  const json& m = r["memory"];
  fmt::print("  per rank: arena {} (lead {}: {:.2f} %), workspace {}; replicated, {}: {}; largest layer {}\n", size_text(m["arena_bytes"]),
             size_text(m["lead_bytes"]), m["lead_percent"].get<double>(), size_text(m["workspace_bytes"]), r["own_memory"] ? "on each" : "once for all",
             size_text(m["shared_bytes"]), size_text(m["layer_bytes"]));
  fmt::print("  KV: {} tokens in TP, {} in EP, pages of {}\n", number(m["tp_tokens"]), number(m["ep_tokens"]), number(r["page_tokens"]));
}

void print_switches(const json& r) {
  fmt::print("\nswitch          weights    KV a token, to a new owner\n");
  for (const json& s : r["switches"])
    fmt::print("  {} → {}  {:>12}  {:>12}  {:>12}\n", s["from"].get<std::string>(), s["to"].get<std::string>(), size_text(s["weight_bytes"]),
               size_text(s["kv_bytes_per_token"]), size_text(s["kv_bytes_changed_per_token"]));
}

void print_layers(const json& r) {
  fmt::print("\n  {:5} {:>8} {:>8} {:>8} {:>10}   {:37}   {}\n", "layer", "experts", "neurons", "slices", "weights", "TP range on rank 0", "EP range on rank 0");
  for (const json& l : r["layers"])
    fmt::print("  {:5} {:8} {:8} {:8} {:>10}   {:>17} – {:<17}   {:>17} – {:<17}\n", number(l["layer"]), number(l["experts"]), number(l["neurons"]),
               number(l["slices"]), size_text(l["bytes"]), number(l["tp_ranges"][0][0]), number(l["tp_ranges"][0][1]), number(l["ep_ranges"][0][0]),
               number(l["ep_ranges"][0][1]));
}

void print_table(const json& r) {
  print_model(r);
  print_slices(r);
  print_fit(r);
  print_memory(r);
  print_ranks(r);
  print_switches(r);
  if (r.contains("layers")) print_layers(r);
}

int run(int argc, char** argv) {
  Options o;
  EngineConfig& e = o.engine;
  CLI::App app{
      "Shows a checkpoint's slices, their bytes in each layout, the arena and the KV capacity of ranks with so much memory, and what a switch\n"
      "copies. Reads config.json, and the headers of the weights where they are. That something does not fit or match is a result (exit 0); what\n"
      "does not fit is shown with a single page of KV. Plans with the library's inner parts, for ranks on the CPU; on another device\n"
      "the workspace differs."};
  app.add_option("--model,model", o.model, "model folder: config.json; *.safetensors are compared with it where they are")->required();
  app.add_option("--ranks", e.ranks, "ranks that share the model")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--threads", e.threads, "computing threads per rank, each with scratch of its own (0: cores ÷ ranks)")->check(CLI::Range(0, 4096))->capture_default_str();
  app.add_option("--memory-bytes", e.memory_bytes, "of a rank, everything that is allocated (0: what weights and KV of max-batch requests of min(context, 4096) tokens take)")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 60))
      ->capture_default_str();
  app.add_flag("--own-memory", o.own_memory, "ranks do not share memory (a device each): what is replicated counts on each of them");
  app.add_option("--kv-tokens", e.kv_tokens, "KV tokens at most, over all ranks (0: as many as the memory holds)")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
  app.add_option("--slices-per-expert", e.slices_per_expert, "cuts of each MLP (0: the default rule)")->check(CLI::Range(0, 1 << 20))->capture_default_str();
  app.add_option("--page-tokens", e.page_tokens, "tokens of a KV page, a multiple of 16")->check(CLI::Range(1, 1 << 16))->capture_default_str();
  app.add_option("--chunk-tokens", e.chunk_tokens, "prompt tokens that a step takes over all requests")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--max-batch", e.max_batch, "running requests over all ranks")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--max-context", e.max_context, "tokens of a request (0: the model's)")->check(CLI::Range(int64_t{0}, int64_t{1} << 31))->capture_default_str();
  app.add_option("--isa", e.isa, "kernel path: amx, avx512bf16, avx512, avx2, portable")->default_str("the best there is");
  app.add_flag("--layers", o.layers, "each layer too (the table: its place on rank 0)");
  app.add_option("--format", o.format, "table, or json (one object)")->check(CLI::IsMember({"table", "json"}))->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  const json report = inspect(o);
  if (o.format == "json") fmt::print("{}\n", moebius_examples::line_of(report));
  else print_table(report);
  return 0;
}

}  // namespace
}  // namespace moebius::inspect

int main(int argc, char** argv) {
  return moebius_examples::inner_main("moebius-inspect", [&] { return moebius::inspect::run(argc, argv); });
}
