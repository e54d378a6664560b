#include "examples/common/options.h"

#include <unistd.h>
#include <filesystem>

#include <fmt/format.h>

namespace moebius_examples {

std::string folder_name(const std::string& dir) {
  const auto path = std::filesystem::absolute(dir).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

void EngineOptions::add_to(CLI::App& app, bool model_required) {
  auto* m = app.add_option("--model", model, "model folder: config.json, *.safetensors, tokenizer.json for text");
  if (model_required) m->required();
  app.add_option("--ranks", ranks, "ranks that share the model")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--threads", threads, "computing threads per rank (0: cores ÷ ranks)")->check(CLI::Range(0, 4096))->capture_default_str();
  app.add_option("--layout", layout, "layout to start in: tp or ep")->check(CLI::IsMember({"tp", "ep"}))->capture_default_str();
  app.add_option(
         "--memory-bytes", memory_bytes,
         "of a rank, everything that is allocated (0: what weights and KV of max-batch requests of min(context, 4096) tokens take, at most half of "
         "the free memory)")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--device", device, "where ranks work: cpu, or the name of a module (cuda)")->capture_default_str();
  app.add_option("--communicator", communicator, "how ranks on devices exchange: peer, or nccl (a device for each)")->capture_default_str();
  app.add_option("--mode", mode, "exact: equal bits whatever the layout; fast: sums in any order (default: exact on the cpu, fast elsewhere)");
  app.add_option("--isa", isa, "kernel path: amx, avx512bf16, avx512, avx2, portable")->default_str("the best there is");
  app.add_option("--slices-per-expert", slices_per_expert, "cuts of each MLP; fixes the bits (0: the default rule)")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--page-tokens", page_tokens, "tokens of a KV page, a multiple of 16")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  app.add_option("--chunk-tokens", chunk_tokens, "prompt tokens that a step takes over all requests")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--max-batch", max_batch, "running requests over all ranks")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--max-queue", max_queue, "waiting requests; what is beyond waits outside")->check(at_least(1))->capture_default_str();
  app.add_option("--kv-tokens", kv_tokens, "KV tokens at most, over all ranks (0: as many as the memory holds)")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--stall-budget-ms", stall_budget_ms, "time that each step may lend to a switch (0: all at once)")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--prefix-cache", prefix_cache, "share KV pages of equal prefixes (1 or 0)")->capture_default_str();
  app.add_flag("--preempt-to-fit", preempt_to_fit, "a switch that does not fit preempts requests instead of being refused");
  app.add_option("--policy", policy, "who decides on switches: manual, threshold or measured")
      ->check(CLI::IsMember({"manual", "threshold", "measured"}))
      ->capture_default_str();
  app.add_option("--policy-variant", policy_variant, "what the threshold counts: decode, prefill or rollout")
      ->check(CLI::IsMember({"decode", "prefill", "rollout"}))
      ->capture_default_str();
  app.add_option("--policy-threshold", policy_threshold, "from so much load on EP (0: the variant's)")->check(at_least(0))->capture_default_str();
  app.add_option("--policy-window-steps", policy_window_steps, "steps that are averaged (0: the variant's)")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--policy-cooldown-s", policy_cooldown_s, "seconds without a decision after a switch")
      ->check(at_least(0))
      ->default_str("the variant's");
  app.add_flag("--policy-shadow", policy_shadow, "decide and record, but do not switch");
  app.add_option("--policy-explore", policy_explore, "measured: share of the time that may be spent elsewhere than its rule says")
      ->check(within(0, 0.5))
      ->capture_default_str();
  app.add_option("--policy-calibrate-ms", policy_calibrate_ms, "measured: time at start-up that teaches the costs of both layouts")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--policy-file", policy_file, "measured: where learned costs are read from, and written to at the end")
      ->default_str("none");
}

moebius_cpp::Config EngineOptions::config() const {
  moebius_cpp::Config c;
  c.set("ranks", ranks).set("threads", threads).set("layout", layout).set("memory_bytes", memory_bytes);
  c.set("slices_per_expert", slices_per_expert).set("chunk_tokens", chunk_tokens).set("max_batch", max_batch);
  c.set("page_tokens", page_tokens).set("seed", seed).set("prefix_cache", prefix_cache).set("preempt_to_fit", preempt_to_fit);
  c.set("max_queue", max_queue).set("kv_tokens", kv_tokens);
  c.set_real("stall_budget_ms", stall_budget_ms);
  c.set("device", device).set("communicator", communicator);
  c.set("policy", policy).set("policy_variant", policy_variant).set("policy_window_steps", policy_window_steps).set("policy_shadow", policy_shadow);
  c.set_real("policy_threshold", policy_threshold).set_real("policy_cooldown_s", policy_cooldown_s);
  c.set_real("policy_explore", policy_explore).set_real("policy_calibrate_ms", policy_calibrate_ms).set("policy_file", policy_file);
  if (!mode.empty()) c.set("mode", mode);
  if (!isa.empty()) c.set("isa", isa);
  return c;
}

namespace {

// `user` is the function that says whether to give up, or null.
int32_t show_progress(void* user, int64_t done, int64_t total) {
  if (user != nullptr && reinterpret_cast<bool (*)()>(user)()) return 1;
  if (!isatty(STDERR_FILENO)) return 0;
  static int64_t last = -1;
  const int64_t percent = total > 0 ? done * 100 / total : 100;
  if (percent == last) return 0;
  last = percent;
  complain("\rloading [{:<40}] {:3} %{}", std::string(static_cast<size_t>(percent * 2 / 5), '#'), percent, done == total ? "\n" : "");
  return 0;
}

// Of the load and of a policy's file; other things that happen the programs tell by the engine's events.
void show_warning(void*, int32_t level, const char* category, const char* text) {
  const std::string_view of = category;
  if (level <= MOEBIUS_LOG_WARNING && (of == "load" || of == "policy")) complain("warning: {}\n", text);
}

}  // namespace

moebius_cpp::Engine load(const EngineOptions& options, moebius_cpp::Config& config, bool (*interrupted)()) {
  using moebius_cpp::check;
  check([&](moebius_error** e) { return moebius_config_set_progress(config.get(), show_progress, reinterpret_cast<void*>(interrupted), e); });
  check([&](moebius_error** e) { return moebius_config_set_log(config.get(), show_warning, nullptr, e); });
  return moebius_cpp::Engine(options.model, config);
}

std::optional<uint64_t> submit_if_room(moebius_cpp::Engine& engine, const moebius_cpp::Request& request) {
  try {
    return engine.submit(request);
  } catch (const moebius_cpp::Error& e) {
    if (e.code() != MOEBIUS_E_QUEUE_FULL) throw;
    return std::nullopt;
  }
}

int run_program(const char* name, const std::function<void()>& body) {
  return exit_status_of(name, [&] {
    body();
    return 0;
  });
}

void parse_or_exit(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (app.exit(e) != 0) std::exit(2);
    flush_results();
    std::exit(0);
  }
}

}  // namespace moebius_examples
