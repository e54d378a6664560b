// The engine's inside: how requests, the scheduler, the switcher and the ranks make a step. Tests and benchmarks look in here.
//
// Two locks. `inbox_mutex_` guards what other threads hand in (submissions, cancels, wishes) and the table of requests;
// `step_mutex_` is held for a whole step by whoever steps. They are taken in the order step, inbox.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>

#include "lib/base/fair_mutex.h"
#include "lib/comm/communicator.h"
#include "lib/comm/world.h"
#include "lib/device/pinned.h"
#include "lib/kv/kv_manager.h"
#include "lib/runtime/engine.h"
#include "lib/runtime/event_queue.h"
#include "lib/runtime/metrics.h"
#include "lib/runtime/model_store.h"
#include "lib/runtime/rank_executor.h"
#include "lib/runtime/sampler.h"
#include "lib/runtime/scheduler.h"
#include "lib/runtime/switcher.h"
#include "lib/runtime/workspace.h"

namespace moebius {

// What an engine fixes before it is made; moebius-inspect plans by it without one.
EngineConfig complete(EngineConfig config, const ModelConfig& model);            // checked, with the defaults that the model gives
PolicyLimits policy_limits(const EngineConfig& config);
int threads_per_rank(const EngineConfig& config, const ModelConfig& model);      // of a complete config; checks the ranks
WorkspaceShape workspace_shape(const ModelConfig& model, const EngineConfig& config, int threads, Device& device);
RouteRule route_rule(const ModelConfig& model, const WorkspaceShape& shape);
StepLimits step_limits(const WorkspaceShape& shape, const EngineConfig& config);
int64_t workspace_bytes(const Device& device, const WorkspaceShape& shape, const ModelConfig& model, const EngineConfig& config);

inline int64_t ns_of(Clock::time_point t) { return std::chrono::duration_cast<std::chrono::nanoseconds>(t.time_since_epoch()).count(); }

struct DummyRound;

// What a step reads of the ranks' memory, in one piece of the host's, which devices read into directly.
class Readings {
 public:
  Readings(Device& device, const WorkspaceShape& shape, int64_t vocab, int ranks);

  float* logits = nullptr;             // [logit group, vocab]
  int32_t* chosen = nullptr;           // [logit group] tokens that the device chose
  int32_t* choices = nullptr;          // [rows, choices] experts, of the last MoE layer
  int32_t* experts_reached = nullptr;  // [ranks]

 private:
  int64_t place(const WorkspaceShape& shape, int64_t vocab, int ranks, std::byte* base);

  PinnedBuffer memory_;
};

class Engine::Impl {
 public:
  Impl(const ModelFiles& files, const EngineConfig& config);
  ~Impl();

  void submit(std::span<const RequestSpec* const> specs, uint64_t* out_numbers);
  void check(const RequestSpec& spec) const;  // what submit checks, but for the queue
  void check_request(const RequestSpec& spec) const;
  bool cancel(uint64_t request, int32_t sample);
  bool drain(double timeout_ms);
  void resume();
  StepResult step();
  StepResult step_by_host();  // kInvalidState while the own thread steps
  void start();
  void stop();
  size_t poll(std::span<Event> out, double timeout_ms) { return events_.poll(out, timeout_ms); }
  int event_descriptor() { return events_.descriptor(); }
  void aim(int32_t seam);  // request_switch, hold_seam
  void set_stall_budget(double ms);
  void set_policy(const PolicyConfig& policy);
  SwitchEstimate estimate_switch(Layout to);
  void update_weights(const ModelFiles& files, bool partial);
  void calibrate();  // before anything else is asked of it
  void keep_costs() noexcept;
  EngineStats stats() const;
  std::string metrics_text() const;
  ModelInfo model() const;
  MemoryReport memory() const;
  size_t take_logits(uint64_t request, int32_t sample, std::span<float> out);
  size_t take_routes(uint64_t request, int32_t sample, std::span<int16_t> out);

  // For tests and benchmarks, between steps only.
  CostModel& costs() { return costs_; }
  World& world() { return world_; }
  Switcher& switcher() { return switcher_; }
  const ModelStore& store() const { return store_; }
  KvManager& kv() { return kv_; }
  const Scheduler& scheduler() const { return scheduler_; }
  const Ops& ops() const { return device_->ops(); }
  Device& device() { return *device_; }
  void use_ops(const Ops& ops) {  // for the forward pass; a benchmark's wrapped table of the same path
    for (const auto& executor : executors_) executor->context().ops = &ops;
  }
  std::function<void(int rank, int thread)> step_hook;  // called by every thread at the start of a step's region; may throw

 private:
  static constexpr size_t kMaxWishes = 65536;  // switches asked for between two steps; a host that asks for more has lost count

  void compare_ranks();
  int most_dummies(int64_t tokens) const;
  void serve_dummies(const DummyRound& round, Clock::time_point until);
  void learn_price(const Event& event);
  void refuse_if_failed() const;
  void refuse_if_mixed() const;
  void refuse_if_busy() const;
  void fail_update(std::string_view why);
  StepResult run_step();
  void refuse_if_draining() const;
  void refuse_if_full(int64_t n);
  void refuse_if_never(int64_t n) const;
  std::unique_ptr<Request> make_request(const RequestSpec& spec, uint64_t number) const;
  void make_samples(Request& request) const;
  void take_inbox();
  void take_cancel(Request& request, int32_t sample);
  void take_wishes();
  void foresee(LoadSample& load) const;
  void observe_load();
  StepLoads load_of_step();
  void learn_cost(const StepLoads& load, double seconds);
  void expire(Clock::time_point now);
  void run_plan(StepResult& result);
  void compute(int rank, int thread);
  void prepare_ranks();
  void capture_steps();
  void capture(const StepShape& shape, int rank, int* number);
  const StepShape& choose_shape();
  void replay(int rank);
  void count_prompt_tokens();
  void measure_exchanges();
  void measure_expert_load();
  int last_moe_layer() const;
  void read_counts(int rank);
  void list_choices();
  void finish_logits(int rank, Range group, const Lane& lane);
  void sample_row(const LogitRow& row, const float* logits, int32_t chosen, int lane);
  void accept_tokens();
  void accept(Sequence& sequence, const SampleResult& result);
  void finish(Sequence& sequence, FinishReason reason, std::string_view why = {});
  Event end_event(const Sequence& sequence, FinishReason reason, std::string_view why) const;
  void record_end(const Sequence& sequence, FinishReason reason);
  void forget_if_done(Request& request);
  template <class T>
  size_t take(uint64_t number, int32_t sample, Record<T> Sequence::*record, const char* key, bool RequestSpec::*wanted, int64_t width,
              std::span<T> out);
  Sequence& sequence_that_keeps(uint64_t request, int32_t sample, const char* key, bool RequestSpec::*wanted);
  void make_records();
  void keep_routes(const ScheduledChunk& chunk);
  int64_t route_width() const { return model_.shape.num_layers() * int64_t{model_.top_k}; }
  void fail_everything(std::string_view why);
  void count_moved(const Event& event);
  void emit(Event&& event);
  void log_event(const Event& event) const;
  void log(LogLevel level, const char* category, const std::string& message) const;
  Event request_event(EventType type, const Sequence& sequence) const;
  void emit_request(EventType type, const Sequence& sequence);
  int32_t seam() const { return config_.ranks > 1 ? switcher_.seam() : label_seam_; }
  void report_seam(int32_t target);
  void refuse_seam(int32_t target, std::string_view why);
  void publish_stats();
  bool was_called() const;
  bool has_work();
  bool wait_for_call();

  const Clock::time_point created_ = Clock::now();
  const ModelConfig model_;
  const EngineConfig config_;
  const int threads_;
  const Ops& host_ops_;  // for sampling
  const std::unique_ptr<Device> device_;
  CallersDevice caller_;         // of the thread that makes the engine, or destroys it
  World world_;
  WorkspaceShape shape_;
  ModelStore store_;
  KvManager kv_;
  Scheduler scheduler_;
  Switcher switcher_;
  StepPlan plan_;
  // Decode steps that were captured when the engine was made, for each layout by growing shape; and what the step under way uses.
  struct CapturedStep {
    StepShape shape;
    int64_t rows_of_home = 0;
    int number = -1;
  };
  std::vector<CapturedStep> captured_[2];  // [Layout]
  int captured_connection_ = 0;
  const CapturedStep* captured_now_ = nullptr;
  const StepShape* shape_now_ = nullptr;

  std::vector<std::unique_ptr<Workspace>> workspaces_;  // [ranks]
  std::vector<StepTables> tables_;                      // [ranks]
  std::vector<ExchangeBuffers> exchange_;               // [ranks]
  std::vector<std::unique_ptr<Communicator>> comms_;
  std::vector<std::unique_ptr<RankExecutor>> executors_;
  Readings readings_;
  PinnedBuffer routes_;                                 // [layers, max_rows, top_k] int32, of a step; made when a request wants them
  std::vector<SamplerScratch> sampler_scratch_;         // [ranks · threads]
  std::vector<SampleResult> sampled_;                   // [chunks]

  EventQueue events_;
  Metrics metrics_;
  MetricsInfo metrics_info_;
  std::vector<int32_t> expert_rows_;      // [experts] of readings_.choices
  std::vector<StepLoad> home_loads_;  // [ranks] scratch of load_of_step()
  CostModel costs_;              // learned whatever the policy is
  bool calibrating_ = false;     // no event is emitted, nothing is logged
  std::string costs_key_;        // with a policy_file: what they hold for
  bool keeps_costs_ = false;     // there
  StepLoads last_load_;          // of the last step that ran in one layout
  double last_seconds_ = 0;      // that it took; 0 once the policy has seen it
  std::unique_ptr<Policy> policy_;
  bool policy_asked_ = false;    // for the switch under way or the last one; else the host did
  double stall_budget_ms_;
  int32_t label_seam_;           // with one rank a switch only changes this
  uint64_t step_ = 0;
  uint64_t arrivals_ = 0;
  Clock::time_point next_deadline_ = kNoDeadline;  // none of those that run or wait is earlier
  bool failed_ = false;          // it serves no more; written under step_mutex_ and inbox_mutex_
  bool mixed_ = false;           // an update of the weights has failed half-way and none has succeeded since; written likewise
  Reason failure_;               // why

  FairMutex step_mutex_;
  mutable std::mutex inbox_mutex_;
  std::condition_variable inbox_filled_;
  std::condition_variable emptied_;      // nothing runs or waits, or the engine has failed
  bool draining_ = false;
  std::unordered_map<uint64_t, std::unique_ptr<Request>> requests_;
  std::vector<Request*> inbox_;
  struct Cancel {
    uint64_t request;
    int32_t sample;  // −1: all
    bool forgets;    // it had finished: what it keeps is given back
  };
  std::vector<Cancel> cancels_;
  std::vector<int32_t> wished_seams_;  // in the order asked for, at most kMaxWishes
  std::optional<double> wished_budget_;
  std::unique_ptr<Policy> wished_policy_;
  uint64_t next_number_ = 1;
  int64_t waiting_hint_ = 0;     // waiting sequences, for the queue limit
  std::vector<Request*> arriving_;
  std::vector<Cancel> cancelling_;
  std::vector<int32_t> seams_;           // wishes that this step has taken up
  size_t seams_begun_ = 0;               // of these
  EngineStats stats_;            // the stepping thread's own
  EngineStats published_;        // a copy as of the last step, guarded by inbox_mutex_

  std::mutex own_thread_mutex_;
  std::thread own_thread_;
  std::atomic<bool> own_thread_stops_{false};
};

}  // namespace moebius
