#include "lib/runtime/metrics.h"

#include <fmt/format.h>

#include "lib/runtime/engine.h"

namespace moebius {
namespace {

constexpr double kIterationTokens[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
constexpr double kFirstToken[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560};
constexpr double kInterToken[] = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
constexpr double kRequestSeconds[] = {0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
constexpr double kSwitchSeconds[] = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10};
constexpr double kTokenDecades[] = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};
constexpr double kSamples[] = {1, 2, 5, 10, 20};

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') out += "\\n";
    else out += c;
  }
  return out;
}

template <class V>
void single(std::string& out, const char* type, const char* name, const char* help, const std::string& labels, V value) {
  out += fmt::format("# HELP moebius_{0} {1}\n# TYPE moebius_{0} {2}\nmoebius_{0}{{{3}}} {4}\n", name, help, type, labels, value);
}

}  // namespace

void Histogram::record(double value) {
  size_t bucket = 0;
  while (bucket < bounds_.size() && value > bounds_[bucket]) ++bucket;
  counts_[bucket].fetch_add(1, std::memory_order_relaxed);
  sum_.fetch_add(value, std::memory_order_relaxed);
}

void Histogram::render(std::string& out, const char* name, const char* help, const std::string& labels) const {
  out += fmt::format("# HELP moebius_{0} {1}\n# TYPE moebius_{0} histogram\n", name, help);
  uint64_t total = 0;
  for (size_t i = 0; i < bounds_.size(); ++i) {
    total += counts_[i].load(std::memory_order_relaxed);
    out += fmt::format("moebius_{}_bucket{{{},le=\"{}\"}} {}\n", name, labels, bounds_[i], total);
  }
  total += counts_[bounds_.size()].load(std::memory_order_relaxed);
  out += fmt::format("moebius_{0}_bucket{{{1},le=\"+Inf\"}} {2}\nmoebius_{0}_sum{{{1}}} {3}\nmoebius_{0}_count{{{1}}} {2}\n", name, labels,
                     total, sum_.load(std::memory_order_relaxed));
}

Metrics::Metrics()
    : iteration_tokens_(kIterationTokens), first_token_(kFirstToken), inter_token_(kInterToken), e2e_(kRequestSeconds),
      queue_(kRequestSeconds), prefill_(kRequestSeconds), decode_(kRequestSeconds), inference_(kRequestSeconds),
      switch_seconds_(kSwitchSeconds), request_prompt_(kTokenDecades), request_generation_(kTokenDecades),
      request_max_generation_(kTokenDecades), request_max_tokens_(kTokenDecades), request_n_(kSamples) {}

void Metrics::on_request_finished(const RequestTimes& t, int64_t prompt_tokens, int64_t generated, int64_t max_tokens, FinishReason reason) {
  ++finished_[static_cast<size_t>(reason)];
  const Clock::time_point never{};
  e2e_.record(seconds_between(t.submitted, t.finished));
  if (t.first_scheduled != never) {
    queue_.record(seconds_between(t.submitted, t.first_scheduled));
    inference_.record(seconds_between(t.first_scheduled, t.finished));
  }
  if (t.first_token != never) {
    prefill_.record(seconds_between(t.first_scheduled, t.first_token));
    decode_.record(seconds_between(t.first_token, t.finished));
  }
  request_prompt_.record(static_cast<double>(prompt_tokens));
  request_generation_.record(static_cast<double>(generated));
  request_max_tokens_.record(static_cast<double>(max_tokens));
}

void Metrics::on_samples_finished(int64_t n, int64_t most_generated) {
  request_n_.record(static_cast<double>(n));
  request_max_generation_.record(static_cast<double>(most_generated));
}

void Metrics::on_exchange(int64_t all_reduce_bytes, int64_t all_to_all_bytes) {
  all_reduce_bytes_ += static_cast<uint64_t>(all_reduce_bytes);
  all_to_all_bytes_ += static_cast<uint64_t>(all_to_all_bytes);
}

void Metrics::on_expert_load(int layer, double imbalance) {
  imbalance_layer_ = layer;
  imbalance_ = imbalance;
}

void Metrics::on_switch(Layout from, Layout to, double seconds) {
  ++switches_[static_cast<size_t>(from)][static_cast<size_t>(to)];
  switch_seconds_.record(seconds);
}

void Metrics::set_gauges(const EngineStats& s) {
  running_ = s.running;
  waiting_ = s.waiting;
  kv_usage_ = s.kv_usage;
  seam_ = s.seam;
  layers_ = s.num_layers;
  prompt_tokens_ = s.prompt_tokens;
  generation_tokens_ = s.generation_tokens;
  prefix_queries_ = s.prefix_queries;
  prefix_hits_ = s.prefix_hits;
}

void Metrics::set_policy(const PolicyFigures* figures) {
  measured_ = figures != nullptr;
  if (figures == nullptr) return;
  for (size_t l : {0u, 1u}) {
    step_seconds_[l] = figures->step[l].seconds;
    step_error_[l] = figures->step[l].relative;
  }
  regret_ = figures->regret_s;
  price_ = figures->price_s;
  budget_ = figures->budget_s;
}

// A layout that was never seen has no sample of its step.
void Metrics::render_policy(std::string& out, const std::string& labels) const {
  const auto by_layout = [&](const char* name, const char* help, const std::atomic<double>(&values)[2]) {
    out += fmt::format("# HELP moebius_{0} {1}\n# TYPE moebius_{0} gauge\n", name, help);
    for (Layout l : {Layout::kTp, Layout::kEp})
      if (const auto i = static_cast<size_t>(l); step_seconds_[i] > 0)
        out += fmt::format("moebius_{}{{{},mode=\"{}\"}} {}\n", name, labels, name_of(l), values[i].load());
  };
  by_layout("policy_step_seconds", "What the last step would take in each layout, as the policy measured has learned.", step_seconds_);
  by_layout("policy_step_error", "Standard error of policy_step_seconds, relative.", step_error_);
  single(out, "gauge", "policy_regret_seconds", "What the other layout would have saved since the policy's rule came to its own.", labels, regret_.load());
  single(out, "gauge", "policy_price_seconds", "Of a switch there and back; the rule moves when its regret reaches it.", labels, price_.load());
  single(out, "gauge", "policy_budget_seconds", "What may be spent elsewhere than the rule says.", labels, budget_.load());
}

std::string Metrics::text(const MetricsInfo& info) const {
  const std::string labels = fmt::format("model_name=\"{}\",engine=\"{}\"", escaped(info.model_name), info.engine_id);
  std::string out;
  single(out, "gauge", "num_requests_running", "Requests that have KV and take part in steps.", labels, running_.load());
  single(out, "gauge", "num_requests_waiting", "Requests that wait to run.", labels, waiting_.load());
  single(out, "gauge", "kv_cache_usage_perc", "Share of the present layout's KV pages in use, 0 to 1.", labels, kv_usage_.load());
  const std::string cache = fmt::format("{},block_size=\"{}\",num_tp_blocks=\"{}\",num_ep_blocks=\"{}\",enable_prefix_caching=\"{}\"", labels,
                                        info.page_tokens, info.tp_pages, info.ep_pages, info.prefix_caching);
  single(out, "gauge", "cache_config_info", "The KV cache, in labels; block_size is in tokens.", cache, 1);
  single(out, "gauge", "engine_failed", "1: the engine has failed and serves no more.", labels, failed_ ? 1 : 0);
  single(out, "gauge", "load_seconds", "Time that loading the model took.", labels, info.load_seconds);
  if (imbalance_layer_ >= 0)
    single(out, "gauge", "expert_load_imbalance", "Rows of the busiest expert over the mean, in the last step's last MoE layer.",
           fmt::format("{},layer=\"{}\"", labels, imbalance_layer_.load()), imbalance_.load());
  single(out, "gauge", "seam_position", "Layers before it run in TP, from it on in EP.", labels, seam_.load());
  const double seam = seam_.load(), layers = layers_.load();
  out += "# HELP moebius_parallel_mode Which layout serves (both while the seam is inside).\n# TYPE moebius_parallel_mode gauge\n";
  out += fmt::format("moebius_parallel_mode{{{},mode=\"tp\"}} {}\nmoebius_parallel_mode{{{},mode=\"ep\"}} {}\n", labels,
                     seam > 0 ? 1 : 0, labels, seam < layers ? 1 : 0);
  if (measured_) render_policy(out, labels);
  single(out, "counter", "num_preemptions_total", "Requests that gave up their KV to others.", labels, preemptions_.load());
  single(out, "counter", "prompt_tokens_total", "Prompt tokens computed, each once.", labels, prompt_tokens_.load());
  single(out, "counter", "generation_tokens_total", "Tokens generated.", labels, generation_tokens_.load());
  single(out, "counter", "prefix_cache_queries_total", "Tokens looked up in the prefix cache.", labels, prefix_queries_.load());
  single(out, "counter", "prefix_cache_hits_total", "Tokens found in the prefix cache.", labels, prefix_hits_.load());
  out += "# HELP moebius_request_success_total Requests finished, by reason.\n# TYPE moebius_request_success_total counter\n";
  const char* reasons[] = {nullptr, "stop", "length", "abort", "error"};
  for (size_t i = 1; i < 5; ++i)
    out += fmt::format("moebius_request_success_total{{{},finished_reason=\"{}\"}} {}\n", labels, reasons[i], finished_[i].load());
  out += "# HELP moebius_mode_switches_total Switches that arrived; from tp to tp is one that was turned round.\n"
         "# TYPE moebius_mode_switches_total counter\n";
  for (Layout from : {Layout::kTp, Layout::kEp})
    for (Layout to : {Layout::kTp, Layout::kEp})
      out += fmt::format("moebius_mode_switches_total{{{},from=\"{}\",to=\"{}\"}} {}\n", labels, name_of(from), name_of(to),
                         switches_[static_cast<size_t>(from)][static_cast<size_t>(to)].load());
  single(out, "counter", "switch_bytes_total", "Bytes written by switches, those that were rolled back included.", labels, bytes_moved_.load());
  single(out, "counter", "switch_rollbacks_total", "Switches rolled back.", labels, rollbacks_.load());
  single(out, "counter", "switch_refusals_total", "Switches refused because the other layout could not hold the requests.", labels,
         refusals_.load());
  single(out, "counter", "corrupted_requests_total", "Requests ended because their logits were no numbers.", labels, corrupted_.load());
  single(out, "counter", "admission_rejections_total", "Requests refused because the queue was full.", labels, rejections_.load());
  single(out, "counter", "all_reduce_bytes_total", "Bytes that ranks read of one another's sums in TP layers.", labels, all_reduce_bytes_.load());
  single(out, "counter", "all_to_all_bytes_total", "Bytes that rows and sums travelled between ranks in EP layers.", labels, all_to_all_bytes_.load());
  iteration_tokens_.render(out, "iteration_tokens_total", "Tokens of a step.", labels);
  first_token_.render(out, "time_to_first_token_seconds", "From submit to the first token.", labels);
  inter_token_.render(out, "inter_token_latency_seconds", "Between two tokens of a request.", labels);
  e2e_.render(out, "e2e_request_latency_seconds", "From submit to the end.", labels);
  queue_.render(out, "request_queue_time_seconds", "From submit to the first step.", labels);
  prefill_.render(out, "request_prefill_time_seconds", "From the first step to the first token.", labels);
  decode_.render(out, "request_decode_time_seconds", "From the first token to the end.", labels);
  inference_.render(out, "request_inference_time_seconds", "From the first step to the end.", labels);
  switch_seconds_.render(out, "mode_switch_seconds", "Time that a switch took from steps.", labels);
  request_prompt_.render(out, "request_prompt_tokens", "Prompt tokens of a request.", labels);
  request_generation_.render(out, "request_generation_tokens", "Generated tokens of a request.", labels);
  request_max_generation_.render(out, "request_max_num_generation_tokens", "Generated tokens of a request's longest sample.", labels);
  request_n_.render(out, "request_params_n", "n of a request.", labels);
  request_max_tokens_.render(out, "request_params_max_tokens", "max_tokens of a request.", labels);
  return out;
}

}  // namespace moebius
