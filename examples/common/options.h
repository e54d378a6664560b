// What every program that serves takes: flags of the engine and of sampling, a progress bar, exit codes.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "examples/common/checks.h"
#include "examples/common/program.h"
#include "moebius/moebius.hpp"

namespace moebius_examples {

// What is checked before anything runs: the library's errors become BadInput.
template <class Body>
auto before_running(Body&& body) {
  try {
    return body();
  } catch (const moebius_cpp::Error& e) {
    throw BadInput(e.what());
  }
}

// The last part of a path, "." and a slash at its end included.
std::string folder_name(const std::string& dir);

// Unset flags keep the library's defaults.
struct EngineOptions {
  std::string model, layout = "tp", device = "cpu", communicator = "peer", mode, isa, policy = "manual", policy_variant = "decode",
      policy_file;
  int64_t ranks = 1, threads = 0, memory_bytes = 0, slices_per_expert = 0, chunk_tokens = 512, max_batch = 64, seed = 0, page_tokens = 16,
          kv_tokens = 0, max_queue = 65536, policy_window_steps = 0;
  double stall_budget_ms = 0, policy_threshold = 0, policy_cooldown_s = -1, policy_explore = 0.01, policy_calibrate_ms = 0;
  bool prefix_cache = true, preempt_to_fit = false, policy_shadow = false;

  void add_to(CLI::App& app, bool model_required);
  moebius_cpp::Config config() const;
};

// Loads with a progress bar where stderr is a terminal. Gives up (MOEBIUS_E_CANCELLED) once `interrupted`, if there is one, says so.
moebius_cpp::Engine load(const EngineOptions& options, moebius_cpp::Config& config, bool (*interrupted)() = nullptr);

// The request's number; none where the queue is full: it waits outside for another step.
std::optional<uint64_t> submit_if_room(moebius_cpp::Engine& engine, const moebius_cpp::Request& request);

// Runs a program's body with the contract's exit status: 0, 2 for bad usage or input, 1 for a later failure.
int run_program(const char* name, const std::function<void()>& body);
// Parses, exiting with 0 after --help and 2 on bad usage; to be called in run_program.
void parse_or_exit(CLI::App& app, int argc, char** argv);

}  // namespace moebius_examples
