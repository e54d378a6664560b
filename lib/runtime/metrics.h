// Counters, gauges and histograms of an engine with vLLM's names (prefix moebius_), rendered as Prometheus text.
// Recording is lock-free and allocates nothing; the stepping thread records, any thread renders.
// Left out of vLLM's: what is not here to be counted (LoRA, speculative decoding, sleep), and the sampled lives of KV blocks
// (kv_block_lifetime, _idle_before_evict and _reuse_gap_seconds): a time stamp on every block for three histograms. Left out too
// is expert_tokens_total by layer and expert: 12,032 series for 94 layers of 128 experts; expert_load_imbalance sums it up.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <string>

#include "lib/base/time.h"
#include "lib/runtime/event.h"

namespace moebius {

struct EngineStats;
struct PolicyFigures;

// What does not change while an engine lives.
struct MetricsInfo {
  std::string model_name;  // the model folder's
  int page_tokens = 0;
  int64_t tp_pages = 0, ep_pages = 0;  // KV pages in all
  bool prefix_caching = false;
  double load_seconds = 0;
  int engine_id = 0;  // tells the engines of a process apart
};

struct RequestTimes {
  Clock::time_point submitted{}, first_scheduled{}, first_token{}, finished{};  // epoch: never
};

// Buckets with fixed upper bounds; the last, +Inf, is implied.
class Histogram {
 public:
  static constexpr size_t kMaxBuckets = 24;
  explicit Histogram(std::span<const double> bounds) : bounds_(bounds) {}
  void record(double value);
  void render(std::string& out, const char* name, const char* help, const std::string& labels) const;

 private:
  std::span<const double> bounds_;  // static storage
  std::array<std::atomic<uint64_t>, kMaxBuckets + 1> counts_{};
  std::atomic<double> sum_{0};
};

class Metrics {
 public:
  Metrics();
  void on_step(int64_t tokens) { iteration_tokens_.record(static_cast<double>(tokens)); }
  void on_first_token(double seconds) { first_token_.record(seconds); }
  void on_inter_token(double seconds) { inter_token_.record(seconds); }
  // One sample of a request; then, with the last of its n, the request.
  void on_request_finished(const RequestTimes& times, int64_t prompt_tokens, int64_t generated, int64_t max_tokens, FinishReason reason);
  void on_samples_finished(int64_t n, int64_t most_generated);
  void on_corrupted() { ++corrupted_; }    // logits that are no numbers
  void on_rejection() { ++rejections_; }   // the queue was full
  void on_failed() { failed_ = true; }
  void on_exchange(int64_t all_reduce_bytes, int64_t all_to_all_bytes);
  void on_expert_load(int layer, double imbalance);  // max ÷ mean of a step's rows per expert
  void on_switch(Layout from, Layout to, double seconds);  // arrived at a layout
  void on_bytes_moved(int64_t bytes) { bytes_moved_ += static_cast<uint64_t>(bytes); }
  void on_rollback() { ++rollbacks_; }
  void on_refusal() { ++refusals_; }
  void on_preemption() { ++preemptions_; }
  void set_waiting(int64_t requests) { waiting_ = static_cast<double>(requests); }
  // Gauges and the counters that the engine keeps itself.
  void set_gauges(const EngineStats& stats);
  void set_policy(const PolicyFigures* figures);  // null: the policy rests on no costs

  std::string text(const MetricsInfo& info) const;

 private:
  void render_policy(std::string& out, const std::string& labels) const;

  using Counter = std::atomic<uint64_t>;
  Counter finished_[5] = {};          // by FinishReason
  Counter switches_[2][2] = {};       // [from][to]
  Counter bytes_moved_{0}, rollbacks_{0}, refusals_{0}, preemptions_{0}, corrupted_{0}, rejections_{0}, all_reduce_bytes_{0}, all_to_all_bytes_{0};
  Counter prompt_tokens_{0}, generation_tokens_{0}, prefix_queries_{0}, prefix_hits_{0};
  std::atomic<double> running_{0}, waiting_{0}, kv_usage_{0}, seam_{0}, layers_{0}, imbalance_{0};
  std::atomic<bool> measured_{false}, failed_{false};
  std::atomic<double> step_seconds_[2] = {}, step_error_[2] = {};  // [Layout]
  std::atomic<double> regret_{0}, price_{0}, budget_{0};
  std::atomic<int> imbalance_layer_{-1};  // −1: no experts
  Histogram iteration_tokens_, first_token_, inter_token_, e2e_, queue_, prefill_, decode_, inference_, switch_seconds_;
  Histogram request_prompt_, request_generation_, request_max_generation_, request_max_tokens_, request_n_;
};

}  // namespace moebius
