// The Engine: a model served on several ranks, whose parallel layout can be switched between any two steps.
//
// Threads: submit, cancel, request_switch, set_policy, update_weights, poll, stats and metrics_text may be called from any thread.
// step is called by one thread at a time (the host's), or by the engine's own thread after start(). The thread that calls
// step computes as rank 0's first thread; its floating-point mode is set on entry and restored on exit.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lib/device/host_memory.h"
#include "lib/layout/types.h"
#include "lib/model/files.h"
#include "lib/runtime/event.h"
#include "lib/runtime/policy.h"
#include "lib/runtime/sampling_params.h"

namespace moebius {

enum class LogLevel : int32_t { kError = 0, kWarning = 1, kInfo = 2 };

struct EngineConfig {
  int ranks = 1;
  int threads = 0;                 // computing threads per rank; 0: cores ÷ ranks, at least 1
  Layout layout = Layout::kTp;     // to start in
  int64_t memory_bytes = 0;        // per rank, weights + KV + workspace; 0: what max_batch requests of up to 4,096 tokens need (ModelStore::plan)
  int64_t kv_tokens = 0;           // KV tokens at most, over all ranks; 0: as many as the memory holds
  std::string device = "cpu";      // or the name of a module, "cuda": libmoebius-<name>.so
  std::vector<int32_t> device_ids; // [ranks] the device of each rank; empty: ranks take turns
  std::string communicator = "peer";  // or "nccl": how ranks on devices exchange; peer reads their memory, nccl needs a device for each
  bool rank_processes = false;     // each rank on a device has a process of its own (moebius-rank), which the library starts
  std::vector<void*> streams;      // [ranks] the host's cudaStream_t to work on, not the default stream; empty: its own
  std::vector<void*> nccl_comms;   // [ranks] the host's ncclComm_t of one world; aborted where a rank fails; empty: its own
  int64_t two_shot_bytes = 256 << 10;  // sums of TP on devices: from so many bytes of a rank on, each rank adds up its share of the rows first
  std::string mode;                // exact: equal bits whatever the layout; fast: sums in any order; empty: exact on the cpu, fast elsewhere
  bool capture_steps = true;       // decode steps are captured at start-up where the device can (CUDA graphs)
  std::string isa;                 // empty: the best this machine has
  int slices_per_expert = 0;       // 0: the default rule
  int page_tokens = 16;
  int chunk_tokens = 512;          // prompt tokens a step takes over all requests
  int max_batch = 64;              // running requests over all ranks
  int max_queue = 65536;           // waiting requests; submit beyond it is refused
  int64_t max_context = 0;         // 0: the model's; tokens of a request, prompt included
  bool prefix_cache = true;
  uint64_t seed = 0;
  double stall_budget_ms = 0;      // 0: a switch moves all at once; else the time each step may lend to it
  bool preempt_to_fit = false;     // a switch that does not fit preempts requests instead of being refused
  double wait_deadline_ms = 30000; // every wait of one rank for another
  PolicyConfig policy;
  double policy_calibrate_ms = 0;  // time at start-up for dummy requests in both layouts, unless the file has the costs; 0: none
  std::string policy_file;         // learned costs are read from it and, when the engine is destroyed, written to it; empty: nowhere
  int engine_id = 0;               // label `engine` of the metrics
  bool dummy_weights = false;      // seeded random weights, config.json only (benchmarks)
  // Of the load and of each update of the weights: bytes done, bytes in all; false cancels it. It may not call the engine.
  std::function<bool(int64_t, int64_t)> progress;
  // What happens, in a line: on the thread that it happens on, some of it inside a step; may not call the engine. The category is load,
  // switch, policy or engine.
  std::function<void(LogLevel, const char* category, const std::string& message)> log;
  // Every thread of the library's calls it first (starting) and last: the ranks', and the engine's own as rank and thread −1.
  std::function<void(int rank, int thread, bool starting)> thread_hook;
  HostAllocator allocator;         // of the large memory of ranks on the cpu; empty: mappings of huge pages

  bool fast() const { return mode == "fast"; }  // of a config that the engine has completed
};

struct RequestSpec {
  std::string id;                   // seeds the request; empty: its number in decimal
  std::vector<int32_t> prompt_ids;
  SamplingParams sampling;
  int32_t priority = 0;             // lower runs first, then arrival
  double deadline_ms = 0;           // 0: none; from submit, then finished as abort
  bool keep_logits = false;         // every position's logits, to be fetched with take_logits
  bool keep_routes = false;         // every position's choice of experts, to be fetched with take_routes
  uint64_t user_data = 0;           // comes back in every event of the request
};

struct ModelInfo {
  std::string family;
  int32_t num_layers = 0, vocab_size = 0, hidden = 0, num_experts = 0, top_k = 0;
  int64_t max_context = 0;
  int slices_per_expert = 0, head_groups = 0;
  std::vector<int32_t> eos_token_ids;
};

struct MemoryReport {
  int64_t arena_bytes = 0, kept_bytes = 0, lead_bytes = 0, shared_bytes = 0;  // per rank (largest); shared: once
  int64_t workspace_bytes = 0;      // per rank: activations, scratch of forward pass and sampling, its share of the logits, tables
  int64_t layer_bytes = 0;          // the largest layer's moving bytes
  int64_t tp_tokens = 0;            // KV tokens that TP holds in all
  std::vector<int64_t> ep_tokens;   // [rank]
};

struct EngineStats {
  uint64_t step = 0;                // steps run, idle ones included
  int32_t running = 0, waiting = 0;
  int32_t seam = 0, num_layers = 0;
  bool switching = false;
  uint64_t switches = 0;            // that arrived at a layout; a seam that is held inside is none
  uint64_t rollbacks = 0, refusals = 0, preemptions = 0;
  double switch_seconds = 0;         // of switches that ended or were rolled back, held seams too; so the bytes
  int64_t bytes_moved = 0;
  uint64_t prompt_tokens = 0, generation_tokens = 0;
  uint64_t prefix_queries = 0, prefix_hits = 0;   // tokens
  double kv_usage = 0;              // 0–1 of the present layout's pages
};

// What a step did; for drivers and benchmarks.
struct StepResult {
  bool worked = false;              // false: nothing was running or due
  int32_t decode_rows = 0, prefill_rows = 0;
  double seconds = 0, compute_seconds = 0, switch_seconds = 0;
  bool captured = false;            // a captured step was replayed
  int64_t experts_reached = 0;      // distinct experts with rows, summed over layers (and over ranks: in TP each has its cut, in EP its shared ones)
};

struct SwitchEstimate {
  bool fits = false;
  std::string reason;               // why not
  int64_t bytes = 0, bytes_changed = 0;
  double seconds = 0;               // predicted from the last switches, or from a copy probe
};

class Engine {
 public:
  // Nothing of `files` is used once the engine is made.
  Engine(const ModelFiles& files, const EngineConfig& config);
  Engine(const std::filesystem::path& model_dir, const EngineConfig& config) : Engine(FolderFiles(model_dir), config) {}
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Throws Error: kInvalidArgument (empty prompt, id outside the vocabulary, sampling), kContextTooLong, kDoesNotFit, kQueueFull.
  uint64_t submit(const RequestSpec& spec);
  // All of them or none.
  void submit(std::span<const RequestSpec* const> specs, uint64_t* out_numbers);
  // The same checks but for the queue's, without queueing.
  void check(const RequestSpec& spec) const;
  // One of its samples, or all (−1). False: the request is unknown or already finished. Throws kInvalidArgument: it has no such sample.
  // All of one that has finished and keeps logits or routes: these are given back, untaken.
  bool cancel(uint64_t request, int32_t sample = -1);
  // From now on submit is refused (kInvalidState). Waits at most timeout_ms until no request runs or waits and no switch is
  // under way; false: some still do. Throws kInvalidState: the engine has failed.
  bool drain(double timeout_ms);
  void resume();                  // submit is taken again

  StepResult step();
  void start();  // the engine's own thread steps whenever there is work, and now and then while a policy watches
  void stop();   // and poll waits no more, until start or step

  // Up to `out.size()` events, waiting at most timeout_ms for the first.
  size_t poll(std::span<Event> out, double timeout_ms);
  // A descriptor that is readable while events wait, for poll, select or epoll; the engine's own: not to be read or closed.
  int event_descriptor();

  // Taken up before the next step, in the order asked for; the outcome of each is an event. Throws kQueueFull at 65,536.
  void request_switch(Layout to);
  void hold_seam(int32_t seam);        // move the seam to this layer and hold it there, until a switch is asked for (by policy threshold too)
  void set_stall_budget(double ms);
  void set_policy(const PolicyConfig& policy);
  SwitchEstimate estimate_switch(Layout to) const;

  // Other weights of the same model, written over the present ones between two steps; the prefix cache is emptied. `files` has all tensors
  // and, if it likes, the config. Refused before anything changes: kInvalidState while a request runs or waits or a switch is under way, and
  // what cannot be loaded into this engine. A failure later on (kIo, kCancelled, …) leaves a mixture of weights: until an update succeeds,
  // submit and step are refused.
  void update_weights(const ModelFiles& files);
  // The same of the tensors that `files` has, one at least; the others stay. Refused after an update that failed: that takes all of them.
  void update_tensors(const ModelFiles& files);
  void update_weights(const std::filesystem::path& model_dir) { update_weights(FolderFiles(model_dir)); }

  EngineStats stats() const;
  std::string metrics_text() const;
  ModelInfo model() const;
  MemoryReport memory() const;
  // Logits [positions, vocab] of a keep_logits request since the last call that took them. Returns how many floats there are;
  // all of them are moved into `out` when they fit, none when they do not or when out.data() is null.
  size_t take_logits(uint64_t request, int32_t sample, std::span<float> out);
  std::vector<float> take_logits(uint64_t request, int32_t sample = 0);
  // The same for the experts that the router chose: [positions, num_layers, top_k] of a keep_routes request, −1 in a dense layer. A
  // row whose numbers are NaN may have chosen none.
  size_t take_routes(uint64_t request, int32_t sample, std::span<int16_t> out);

  class Impl;
  Impl& impl() { return *impl_; }   // for tests and benchmarks: lib/runtime/engine_impl.h

 private:
  std::shared_ptr<Impl> impl_;  // shared with the stuck threads of a dead world, if ever there are
};

}  // namespace moebius
