// moebius-bench: each figure beside its floor, both measured in the same run. Links the library's inner parts (engine, kernels).
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <optional>
#include <random>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "examples/bench/floor.h"
#include "examples/bench/profile.h"
#include "examples/common/checks.h"
#include "examples/common/device_trace.h"
#include "examples/common/inner_main.h"
#include "examples/common/shapes.h"
#include "examples/common/statistics.h"
#include "examples/common/strict_json.h"
#include "lib/comm/waits.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/runtime/engine_impl.h"
#include "lib/runtime/sampler.h"

namespace moebius::bench {
namespace {

using moebius_examples::DeviceRun;
using moebius_examples::DeviceShare;
using moebius_examples::DeviceTrace;
using moebius_examples::median;
using moebius_examples::shares_of;
using moebius_examples::ShapeFolder;
using nlohmann::json;

struct Options {
  std::string shape = "m", model, layout = "tp", format = "table", device = "cpu", communicator = "peer", mode, rates, isa, compare;
  bool dummy = false, profile = false, capture = true;
  int ranks = 1, threads = 0, layers = 0, slices = 0, steps = 32, requests = 64, rounds = 5;
  std::vector<int> batches = {1, 8, 32};
  std::vector<double> budgets;
  int max_switch_steps = 200;
  int context = 64, tokens = 512, vocab = 151936;
  int64_t memory_bytes = 0;
};

class Bench {
 public:
  explicit Bench(const Options& options) : o_(options) {
    if (o_.model.empty()) folder_.emplace(o_.shape, o_.layers);
    dir_ = o_.model.empty() ? folder_->path() : o_.model;
    layout_now_ = o_.layout == "tp" ? Layout::kTp : Layout::kEp;
    if (!o_.compare.empty()) read_earlier();
  }

  bool has_run() const { return has_run_; }

  std::unique_ptr<Engine> engine(int max_batch, int64_t context) {
    EngineConfig c;
    c.ranks = o_.ranks;
    c.threads = o_.threads;
    c.layout = o_.layout == "tp" ? Layout::kTp : Layout::kEp;
    c.device = o_.device;
    c.communicator = o_.communicator;
    c.isa = o_.isa;
    c.slices_per_expert = o_.slices;
    c.memory_bytes = o_.memory_bytes;
    c.prefix_cache = false;
    c.policy.kind = PolicyKind::kManual;
    c.max_batch = max_batch;
    c.dummy_weights = o_.model.empty() || o_.dummy;
    c.mode = o_.mode;
    c.capture_steps = o_.capture;
    c.max_context = std::min<int64_t>(context, read_config(dir_).max_position_embeddings);
    if (o_.memory_bytes == 0) c.kv_tokens = (max_batch + o_.ranks) * round_up(context, 16);
    return std::make_unique<Engine>(dir_, c);
  }

  // What the threads that run the model can do now; of another device, what --rates says it gives at best.
  Rates rates_of(Engine& e) {
    if (o_.device == "cpu") return measure_rates(e.impl().world(), e.impl().ops());
    return {device_rate("read_bytes_per_second"), device_rate("matrix_flops")};
  }
  double device_rate(const char* name) const { return o_.rates.empty() ? 0 : json::parse(std::ifstream(o_.rates)).at(name).get<double>(); }

  // A plain copy of as many bytes.
  double copy_seconds(Engine& e, int64_t bytes) {
    if (o_.device == "cpu") return memcpy_seconds(e.impl().world(), bytes);
    const double rate = device_rate("copy_bytes_per_second");
    return rate > 0 ? static_cast<double>(bytes) / rate : 0;
  }

  json base(const std::string& what, Engine& e) {
    const World& w = e.impl().world();
    return base(what, w.ranks(), w.threads(), e.impl().ops(), e.model().slices_per_expert);
  }

  // Every row has these keys.
  json base(const std::string& what, int ranks, int threads, const Ops& ops, int slices_per_expert) {
    return {{"what", what},
            {"shape", o_.model.empty() ? o_.shape : o_.model},
            {"batch", 0},
            {"tokens", 0},
            {"context", 0},
            {"ranks", ranks},
            {"threads", threads},
            {"layout", o_.layout},
            {"isa", ops.name},
            {"slices_per_expert", slices_per_expert},
            {"mode", !o_.mode.empty() ? o_.mode : o_.device == "cpu" ? "exact" : "fast"},
            {"tokens_per_second", nullptr},
            {"floor_tokens_per_second", nullptr},  // null: not measured by this command
            {"read_bytes_per_second", nullptr},
            {"bf16_flops", nullptr}};
  }

  void submit(Engine& e, int n, int length, int max_tokens) {
    for (int i = 0; i < n; ++i) {
      RequestSpec r;
      r.sampling.temperature = 0;
      r.sampling.max_tokens = max_tokens;
      r.sampling.ignore_eos = true;
      for (int t = 0; t < length; ++t) r.prompt_ids.push_back(static_cast<int32_t>(random_() % static_cast<uint64_t>(e.model().vocab_size)));
      e.submit(r);
    }
    has_run_ = true;
  }

  json switch_row(const std::string& what, Engine& e, Layout to) {
    json row = base(what, e);
    row["batch"] = o_.requests;
    row["context"] = o_.context;
    row["from"] = name_of(other(to));
    row["to"] = name_of(to);
    return row;
  }

  // Steps that the prompts of n requests of `length` tokens take: meanwhile the first of them decode already.
  static int filling_steps(int n, int64_t length) { return static_cast<int>(n * length / EngineConfig{}.chunk_tokens) + 2; }

  // Until n requests of `length` tokens decode, for at least `steps` more.
  void fill(Engine& e, int n, int64_t length, int steps) {
    submit(e, n, static_cast<int>(length), filling_steps(n, length) + steps);
    for (StepResult r = e.step(); r.prefill_rows > 0 || e.stats().running < n; r = e.step()) {
      if (!r.worked) throw std::runtime_error(fmt::format("the KV cache does not hold {} requests of {} tokens at once: raise --memory-bytes", n, length));
      drain(e);
    }
  }
  std::unique_ptr<Engine> engine_for(int n, int64_t length, int steps) { return engine(n, length + filling_steps(n, length) + steps + 1); }
  std::unique_ptr<Engine> filled_engine(int n, int64_t length, int steps) {
    auto e = engine_for(n, length, steps);
    fill(*e, n, length, steps);
    return e;
  }

  static int64_t kv_tokens(Engine& e) {
    int64_t tokens = 0;
    for (const Sequence* s : e.impl().scheduler().running()) tokens += s->computed;
    return tokens;
  }

  void drain(Engine& e) {
    std::vector<Event> events(1024);
    while (e.poll(events, 0) == events.size()) {}
  }

  void decode() {
    const int steps = o_.steps + (profiles_device() ? 12 + kTracedSteps : 12);
    const auto e = engine_for(*std::max_element(o_.batches.begin(), o_.batches.end()), o_.context, steps);
    const Ops& ops = e->impl().ops();
    for (int batch : o_.batches) {
      while (e->step().worked) drain(*e);  // the last of the batch before
      fill(*e, batch, o_.context, steps);
      for (int i = 0; i < 3; ++i) e->step();
      std::vector<double> seconds, floors;
      FloorInputs work = inputs_of(*e);
      Rates rates = rates_of(*e);
      if (profiles_ops()) e->impl().use_ops(profiled(ops));
      reset_profile();
      for (int i = 0; i < o_.steps; ++i) {
        const StepResult r = e->step();
        if (r.decode_rows != batch) break;
        work.rows = work.logit_rows = batch;
        work.kv_tokens_read = kv_tokens(*e);
        work.experts_reached = r.experts_reached;
        seconds.push_back(r.seconds);
        floors.push_back(floor_seconds(work, rates));
        drain(*e);
        if (i % 8 == 7) rates = better(rates, rates_of(*e));
      }
      if (seconds.empty()) throw std::runtime_error(fmt::format("the KV cache does not hold {} requests of {} tokens at once: raise --memory-bytes", batch, o_.context));
      json row = base("decode", *e);
      row["batch"] = batch;
      row["context"] = o_.context;
      add_speed(row, batch / median(seconds), batch / median(floors), rates);
      print(row);
      if (profiles_ops()) print_profile(row, seconds, e->impl().world(), rates);
      if (!profiles_device()) continue;
      DeviceTrace trace;
      seconds.clear();
      for (int i = 0; i < kTracedSteps; ++i) seconds.push_back(e->step().seconds), drain(*e);
      print_trace(row, trace.stop(), seconds);
    }
  }

  // Ops are timed where they are called; another device only queues them there, so its profiler says what it did, in steps of their own.
  bool profiles_ops() const { return o_.profile && o_.device == "cpu"; }
  bool profiles_device() const { return o_.profile && o_.device != "cpu"; }
  static constexpr int kTracedSteps = 8;

  // A line of a profile: the run's row, with an op's figures.
  void print_op(json row, const json& figures) {
    row["what"] = "profile";
    row.update(figures);
    fmt::print("{}\n", moebius_examples::line_of(row));
  }

  // Per step: what each kernel adds to it, and where none runs. Ranks that work side by side share one line.
  void print_trace(const json& row, const std::vector<DeviceRun>& runs, const std::vector<double>& steps) {
    if (runs.empty()) fail(Code::kUnsupported, "the device's profiler told of no kernel; with --no-capture steps are queued kernel by kernel");
    const auto n = static_cast<double>(steps.size());
    double total = 0, added = 0;
    for (double s : steps) total += s;
    const auto print_line = [&](const DeviceShare& k) {
      added += k.added;
      const double each = k.runs > 0 ? k.seconds / static_cast<double>(k.runs) : 0;
      if (o_.format == "json")
        print_op(row, {{"op", k.name}, {"seconds", k.added / n}, {"share", k.added / total}, {"runs", static_cast<double>(k.runs) / n}, {"seconds_each", each}});
      else
        fmt::print("    {:40} {:9.3f} ms {:5.1f} %  {:7.1f} runs of {:8.2f} us\n", k.name, 1e3 * k.added / n, 100 * k.added / total,
                   static_cast<double>(k.runs) / n, 1e6 * each);
    };
    for (const DeviceShare& k : shares_of(runs)) print_line(k);
    print_line({"no kernel runs", 0, 0, total - added});
  }

  // Per step and thread; what is no op (plan, barriers, sampling, waiting) is the rest.
  void print_profile(const json& row, const std::vector<double>& steps, const World& world, const Rates& rates) {
    double total = 0, inside = 0;
    for (double s : steps) total += s;
    const double per_step = 1.0 / static_cast<double>(steps.size());
    const auto print_line = [&](const char* name, double seconds, double bytes, double flops) {
      const double floor = std::max(bytes / rates.read, flops / rates.flops);
      if (o_.format == "json")
        return print_op(row, {{"op", name}, {"seconds", seconds * per_step}, {"share", seconds / total}, {"bytes", bytes * per_step},
                              {"flops", flops * per_step}, {"share_of_floor", seconds > 0 ? floor / seconds : 0}});
      fmt::print("    {:17} {:9.3f} ms {:5.1f} %", name, 1e3 * seconds * per_step, 100 * seconds / total);
      if (floor > 0)
        fmt::print("  {:8.1f} MB {:6.1f} GB/s  {:8.2f} GFLOP {:7.1f} GFLOP/s  {:5.1f} % of its floor", bytes * per_step / 1e6, bytes / seconds / 1e9,
                   flops * per_step / 1e9, flops / seconds / 1e9, 100 * floor / seconds);
      fmt::print("\n");
    };
    for (const OpProfile& op : profile()) {
      const double seconds = op.seconds / (world.ranks() * world.threads());
      inside += seconds;
      print_line(op.name, seconds, op.bytes, op.flops);
    }
    print_line("outside ops", total - inside, 0, 0);
  }

  void prefill() {
    const int tokens = o_.tokens;
    auto e = engine(1, tokens + 16);
    const FloorInputs shape = inputs_of(*e);
    std::vector<double> seconds, floors, steps;
    Rates rates = rates_of(*e);
    if (profiles_ops()) e->impl().use_ops(profiled(e->impl().ops()));
    reset_profile();
    std::optional<DeviceTrace> trace;
    for (int round = 0; round < o_.rounds + (profiles_device() ? 1 : 0); ++round) {
      if (round == o_.rounds) trace.emplace(), steps.clear();
      submit(*e, 1, tokens, 1);
      double total = 0, floor = 0;
      for (int done = 0; done < tokens;) {
        const StepResult r = e->step();
        FloorInputs work = shape;
        work.rows = r.prefill_rows + r.decode_rows;
        work.logit_rows = done + work.rows >= tokens ? 1 : 0;
        work.kv_tokens_read = done + work.rows;
        work.attention_pairs = work.rows * done + work.rows * (work.rows + 1) / 2;
        work.experts_reached = r.experts_reached;
        floor += floor_seconds(work, rates);
        total += r.seconds;
        steps.push_back(r.seconds);
        done += static_cast<int>(work.rows);
      }
      drain(*e);
      if (trace) break;
      seconds.push_back(total);
      floors.push_back(floor);
      rates = better(rates, rates_of(*e));
    }
    json row = base("prefill", *e);
    row["batch"] = 1;
    row["tokens"] = tokens;
    add_speed(row, tokens / median(seconds), tokens / median(floors), rates);
    print(row);
    if (profiles_ops()) print_profile(row, steps, e->impl().world(), rates);
    if (trace) print_trace(row, trace->stop(), steps);
  }

  Layout flipped(int i) const { return (o_.layout == "tp") == (i % 2 == 0) ? Layout::kEp : Layout::kTp; }

  // One switch of everything; seconds and bytes from its event.
  Event switch_once(Engine& e, Layout to) {
    drain(e);
    e.request_switch(to);
    e.step();
    std::vector<Event> events(4096);
    for (size_t n; (n = e.poll(events, 0)) > 0;)
      for (size_t i = 0; i < n; ++i) {
        if (events[i].type == EventType::kSwitchFinished) return events[i];
        if (events[i].type == EventType::kSwitchRefused) throw std::runtime_error("switch refused: " + events[i].reason.str());
      }
    throw std::runtime_error("no switch happened");
  }

  void switches() {
    auto e = filled_engine(o_.requests, o_.context, 16 + 4 * o_.rounds);
    for (int i = 0; i < 2; ++i) switch_once(*e, flipped(i));  // touches both layouts' pages
    struct Part {
      int64_t bytes = 0, changed = 0;
      std::vector<double> seconds, memcpy;
    };
    std::vector<double> plan_seconds;
    std::map<std::string, Part> parts[2];  // [to]
    for (int i = 0; i < 2 * o_.rounds; ++i) {
      const Layout to = flipped(i);
      const Event all = switch_once(*e, to);
      const Switcher& switcher = e->impl().switcher();
      const auto record = [&](const char* name, int64_t bytes, int64_t changed, double seconds) {
        Part& p = parts[static_cast<int>(to)][name];
        p.bytes = bytes;
        p.changed = changed;
        p.seconds.push_back(seconds);
        p.memcpy.push_back(copy_seconds(*e, bytes));
      };
      record("weights", switcher.weights_part().bytes, switcher.weights_part().bytes_changed, switcher.weights_part().seconds);
      record("kv", switcher.kv_part().bytes, switcher.kv_part().bytes_changed, switcher.kv_part().seconds);
      record("all", all.bytes, all.bytes_changed, all.seconds);
      plan_seconds.push_back(switcher.plan_seconds());
    }
    for (int to : {0, 1})
      for (const char* name : {"weights", "kv", "all"}) {
        const Part& p = parts[to][name];
        json row = switch_row("switch", *e, static_cast<Layout>(to));
        row["part"] = name;
        row["bytes"] = p.bytes;
        row["bytes_changed"] = p.changed;
        row["seconds"] = median(p.seconds);
        row["memcpy_seconds"] = median(p.memcpy);
        row["share_of_memcpy"] = median(p.memcpy) / median(p.seconds);
        row["plan_seconds"] = median(plan_seconds);  // of the whole switch, every request's metadata
        row["lead_bytes"] = e->memory().lead_bytes;
        row["layer_bytes"] = e->memory().layer_bytes;
        if (o_.device != "cpu" && o_.communicator == "peer" && std::string_view(name) == "weights") {
          std::vector<double> seconds;
          for (int i = 0; i < o_.rounds; ++i) seconds.push_back(block_seconds(*e, static_cast<Layout>(to)));
          row["seconds_block_by_block"] = median(seconds);
        }
        print(row);
      }
  }

  // The weights of a switch by a call of the device's for each block of the plan. It writes where the other layout lies: the last thing done.
  double block_seconds(Engine& e, Layout to) {
    Engine::Impl& impl = e.impl();
    const TransferPlan& plan = to == Layout::kTp ? impl.store().to_tp() : impl.store().to_ep();
    const std::vector<std::byte*> arenas = impl.store().arenas();
    const double begin = now();
    impl.world().run([&](int rank, int) {
      for (const ItemTransfer& item : plan.items) {
        for (const BlockCopy& c : item.to[static_cast<size_t>(rank)])
          impl.device().copy(rank, arenas[static_cast<size_t>(rank)] + c.dst_offset, c.src_rank,
                             arenas[static_cast<size_t>(c.src_rank)] + c.src_offset, c.bytes);
        wait_until_idle(impl.world(), impl.device(), rank);
        impl.world().world_barrier();
      }
    });
    return now() - begin;
  }

  // What a switch does to the gap between tokens: decode steps of `requests` requests, steady and while a switch moves under a budget.
  void stalls() {
    constexpr int kSteady = 50;  // steps before and after
    auto e = filled_engine(o_.requests, o_.context, 2 * o_.rounds * static_cast<int>(o_.budgets.size()) * (2 * kSteady + o_.max_switch_steps) + 16);
    for (int i = 0; i < 2; ++i) switch_once(*e, flipped(i));
    struct Stall {
      std::vector<double> steady, longest, seconds, steps, kept;
    };
    std::map<double, Stall> stalls[2];  // [to]
    std::vector<double> budgets;  // each there and back
    for (int i = 0; i < o_.rounds; ++i)
      for (double budget : o_.budgets) budgets.insert(budgets.end(), 2, budget);
    for (double budget : budgets) {
      const Layout to = other(layout_now_);
      Stall& stall = stalls[static_cast<int>(to)][budget];
      std::vector<double> steady, moving;
      const auto steps = [&](std::vector<double>& out) {
        drain(*e);
        out.push_back(e->step().seconds);
      };
      for (int k = 0; k < kSteady; ++k) steps(steady);
      e->set_stall_budget(budget);
      e->request_switch(to);
      do steps(moving);
      while (e->impl().switcher().moving() && static_cast<int>(moving.size()) < o_.max_switch_steps);
      if (e->impl().switcher().moving()) throw std::runtime_error(fmt::format("a switch under {} ms took over {} steps", budget, moving.size()));
      if (e->stats().seam != (to == Layout::kTp ? e->model().num_layers : 0)) throw std::runtime_error(fmt::format("no switch to {} happened", name_of(to)));
      layout_now_ = to;
      for (int k = 0; k < kSteady; ++k) steps(steady);
      double total = 0;
      for (double x : moving) total += x;
      stall.steady.insert(stall.steady.end(), steady.begin(), steady.end());
      stall.longest.push_back(*std::max_element(moving.begin(), moving.end()));
      stall.seconds.push_back(total);
      stall.steps.push_back(static_cast<double>(moving.size()));
      stall.kept.push_back(median(steady) * static_cast<double>(moving.size()) / total);
    }
    for (int to : {0, 1})
      for (auto& [budget, stall] : stalls[to]) {
        std::sort(stall.steady.begin(), stall.steady.end());
        json row = switch_row("stall", *e, static_cast<Layout>(to));
        row["stall_budget_ms"] = budget;
        row["steps"] = median(stall.steps);
        row["seconds"] = median(stall.seconds);
        row["longest_gap_seconds"] = median(stall.longest);
        row["steady_gap_seconds"] = median(stall.steady);
        row["steady_p99_seconds"] = stall.steady[stall.steady.size() * 99 / 100];
        row["gap_against_p99"] = median(stall.longest) / stall.steady[stall.steady.size() * 99 / 100];
        row["rate_kept"] = median(stall.kept);
        print(row);
      }
  }

  // Seconds to choose a token from one row of logits, with what each setting adds; no model runs.
  void sampling() {
    const auto vocab = static_cast<int64_t>(o_.vocab);
    const Ops& ops = cpu_ops(o_.isa);
    std::normal_distribution<float> gauss(0, 2);
    std::vector<float> logits(static_cast<size_t>(vocab));
    std::vector<int32_t> prompt(1024);
    for (float& x : logits) x = gauss(random_);
    for (int32_t& t : prompt) t = static_cast<int32_t>(random_() % static_cast<uint64_t>(vocab));
    SamplerScratch scratch(vocab);
    SamplingParams greedy, plain, top, all;
    greedy.temperature = 0;
    top.top_k = 50, top.top_p = 0.9;
    all = top;
    all.presence_penalty = 0.5, all.frequency_penalty = 0.2, all.repetition_penalty = 1.1, all.logprobs = kMaxTopLogprobs;
    for (const auto& [name, params] : {std::pair("greedy", greedy), {"temperature", plain}, {"top_k, top_p", top}, {"and penalties, logprobs", all}}) {
      SamplerState state;
      state.start(params, 1, prompt, static_cast<int32_t>(vocab));
      std::vector<double> seconds;
      for (int i = 0; i < 100 * o_.rounds; ++i) {
        const double begin = now();
        sample(logits.data(), vocab, params, state, ops, scratch, {});
        seconds.push_back(now() - begin);
      }
      json row = base("sampling", 1, 1, ops, 0);
      row["part"] = name;
      row["tokens"] = vocab;
      row["seconds"] = median(seconds);
      print(row);
    }
  }

  // A real checkpoint's floor is reading its files, which lie in the page cache after the first round, by as many threads.
  void load() {
    const bool dummy = o_.model.empty() || o_.dummy;
    std::vector<double> seconds, read_seconds;
    std::unique_ptr<Engine> e;
    for (int i = 0; i < o_.rounds; ++i) {
      e.reset();
      const double begin = now();
      e = engine(1, 256);
      has_run_ = true;
      seconds.push_back(now() - begin);
      if (!dummy) read_seconds.push_back(cached_read_seconds(e->impl().world(), dir_));
    }
    const int64_t bytes = inputs_of(*e).total_weight_bytes;
    json row = base("load", *e);
    row["bytes"] = bytes;
    row["seconds"] = median(seconds);
    row["bytes_per_second"] = static_cast<double>(bytes) / median(seconds);
    row["peak_resident_bytes"] = peak_resident_bytes();
    if (!dummy) {
      row["read_seconds"] = median(read_seconds);
      row["share_of_read"] = median(read_seconds) / median(seconds);
    }
    row["memcpy_seconds"] = memcpy_seconds(e->impl().world(), bytes);
    row["share_of_memcpy"] = row["memcpy_seconds"].get<double>() / median(seconds);
    print(row);
  }

 private:
  FloorInputs inputs_of(Engine& e) { return floor_inputs(read_config(dir_), e.model().slices_per_expert, o_.ranks, o_.layout == "tp"); }

  void add_speed(json& row, double speed, double floor, const Rates& rates) {
    row["tokens_per_second"] = speed;
    if (rates.read == 0) return;
    row["floor_tokens_per_second"] = floor;
    row["share_of_floor"] = speed / floor;
    row["read_bytes_per_second"] = rates.read;
    row["bf16_flops"] = rates.flops;
  }

  static std::string key_of(const json& row) {
    std::string key;
    for (const char* k : {"what", "shape", "batch", "tokens", "context", "ranks", "threads", "layout", "from", "to", "part", "stall_budget_ms"})
      key += row.contains(k) ? moebius_examples::line_of(row[k]) + "|" : "|";
    return key;
  }

  static const char* figure_of(const json& row) {
    return row.value("tokens_per_second", json()).is_number() ? "tokens_per_second" : "seconds";
  }

  void read_earlier() {
    std::ifstream in(o_.compare);
    if (!in) throw CLI::ValidationError("--compare", "cannot read " + o_.compare);
    std::string line;
    for (int number = 1; std::getline(in, line); ++number) {
      const json row = json::parse(line, nullptr, false);
      const bool result = row.is_object() && row.contains("what") && row.contains(figure_of(row)) && row[figure_of(row)].is_number();
      if (!result) throw CLI::ValidationError("--compare", fmt::format("{}:{} is no line of moebius-bench's JSON", o_.compare, number));
      earlier_[key_of(row)].push_back(row);
    }
  }

  void print(json row) {
    const char* figure = figure_of(row);
    if (const auto it = earlier_.find(key_of(row)); it != earlier_.end()) {
      std::vector<double> before;
      for (const json& r : it->second) before.push_back(r[figure]);
      const auto [low, high] = std::minmax_element(before.begin(), before.end());
      row["against_earlier"] = row[figure].get<double>() / median(before);
      row["earlier_spread"] = *high / *low;
    }
    if (o_.format == "json") {
      fmt::print("{}\n", moebius_examples::line_of(row));
    } else if (row["tokens_per_second"].is_number()) {
      fmt::print("{:8} {:2} batch {:4} tokens {:5} context {:5}  P={} T={} {}  {:9.1f} tok/s", row["what"].get<std::string>(),
                 row["shape"].get<std::string>(), row["batch"].get<int>(), row["tokens"].get<int>(), row["context"].get<int>(), row["ranks"].get<int>(),
                 row["threads"].get<int>(), row["layout"].get<std::string>(), row["tokens_per_second"].get<double>());
      if (row["floor_tokens_per_second"].is_number())
        fmt::print("  floor {:9.1f}  {:5.1f} %   read {:5.1f} GB/s  bf16 {:6.1f} GFLOP/s", row["floor_tokens_per_second"].get<double>(),
                   100 * row["share_of_floor"].get<double>(), row["read_bytes_per_second"].get<double>() / 1e9, row["bf16_flops"].get<double>() / 1e9);
      end_line(row);
    } else if (row["what"] == "switch") {
      fmt::print("switch {}→{} {:7}  {:8.1f} MiB, {:8.1f} MiB to a new owner  {:8.2f} ms  memcpy {:8.2f} ms  {:5.1f} %",
                 row["from"].get<std::string>(), row["to"].get<std::string>(), row["part"].get<std::string>(), row["bytes"].get<double>() / 1048576,
                 row["bytes_changed"].get<double>() / 1048576, 1e3 * row["seconds"].get<double>(), 1e3 * row["memcpy_seconds"].get<double>(),
                 100 * row["share_of_memcpy"].get<double>());
      if (row.contains("seconds_block_by_block")) fmt::print("  block by block {:8.2f} ms", 1e3 * row["seconds_block_by_block"].get<double>());
      if (row["part"] == "all") fmt::print("  planning {:.3f} ms", 1e3 * row["plan_seconds"].get<double>());
      end_line(row);
    } else if (row["what"] == "stall") {
      fmt::print("switch {}→{} batch {:4}  budget {:6.2f} ms  {:4.0f} steps, {:8.2f} ms  longest gap {:7.2f} ms = {:.2f}× steady p99 ({:.2f} ms)  rate kept {:5.1f} %",
                 row["from"].get<std::string>(), row["to"].get<std::string>(), row["batch"].get<int>(), row["stall_budget_ms"].get<double>(),
                 row["steps"].get<double>(), 1e3 * row["seconds"].get<double>(), 1e3 * row["longest_gap_seconds"].get<double>(),
                 row["gap_against_p99"].get<double>(), 1e3 * row["steady_p99_seconds"].get<double>(), 100 * row["rate_kept"].get<double>());
      end_line(row);
    } else if (row["what"] == "sampling") {
      fmt::print("sampling from {} tokens  {:24} {:8.1f} µs a token", row["tokens"].get<int64_t>(), row["part"].get<std::string>(),
                 1e6 * row["seconds"].get<double>());
      end_line(row);
    } else {
      fmt::print("load {}  {:.1f} MiB in {:.3f} s, {:.2f} GB/s, peak {:.1f} MiB resident  memcpy {:.3f} s ({:.1f} %)", row["shape"].get<std::string>(),
                 row["bytes"].get<double>() / 1048576, row["seconds"].get<double>(), row["bytes_per_second"].get<double>() / 1e9,
                 row["peak_resident_bytes"].get<double>() / 1048576, row["memcpy_seconds"].get<double>(), 100 * row["share_of_memcpy"].get<double>());
      if (row.contains("read_seconds"))
        fmt::print("  reading the files {:.3f} s ({:.1f} %)", row["read_seconds"].get<double>(), 100 * row["share_of_read"].get<double>());
      end_line(row);
    }
    std::fflush(stdout);
  }

  static void end_line(const json& row) {
    if (row.contains("against_earlier"))
      fmt::print("  {:.3f}× earlier (spread {:.2f})", row["against_earlier"].get<double>(), row["earlier_spread"].get<double>());
    fmt::print("\n");
  }

  Options o_;
  bool has_run_ = false;
  Layout layout_now_ = Layout::kTp;
  std::optional<ShapeFolder> folder_;
  std::string dir_;
  std::mt19937_64 random_{1};
  std::map<std::string, std::vector<json>> earlier_;
};

int run(int argc, char** argv) {
  Options o;
  CLI::App app{
      "Measures moebius: each figure beside its floor, max(bytes ÷ read rate, operations ÷ bf16 rate), with both rates measured in the same\n"
      "run. Links the library's inner parts (engine, kernels).\nShapes: m = 16 layers, hidden 1024, 64 experts top-8, intermediate 512, 16/4 "
      "heads × 64, vocabulary 32,000; s = 8 layers, hidden 512,\nintermediate 256, else the same; qwen3-30b-a3b and qwen3-235b-a22b are those of the models. Weights of a shape are seeded random ones."};
  app.require_subcommand(1);
  const auto common = [&](CLI::App* sub) {
    sub->add_option("--shape", o.shape, "shape with dummy weights: s, m, qwen3-30b-a3b, qwen3-235b-a22b")->check(CLI::IsMember(moebius_examples::shape_names()))->capture_default_str();
    sub->add_option("--layers", o.layers, "layers of the shape (0: all)")->check(CLI::Range(0, 1000))->capture_default_str();
    sub->add_option("--model", o.model, "a model folder instead of a shape")->default_str("none");
    sub->add_flag("--dummy", o.dummy, "with --model: seeded random weights, only config.json is read");
    sub->add_option("--layout", o.layout, "layout: tp or ep")->check(CLI::IsMember({"tp", "ep"}))->capture_default_str();
    sub->add_option("--ranks", o.ranks, "ranks")->check(CLI::Range(1, 64))->capture_default_str();
    sub->add_option("--threads", o.threads, "threads per rank (0: cores ÷ ranks)")->check(CLI::Range(0, 1024))->capture_default_str();
    sub->add_option("--device", o.device, "where ranks work: cpu, or the name of a module (cuda)")->capture_default_str();
    sub->add_option("--communicator", o.communicator, "how ranks on devices exchange")->check(CLI::IsMember({"peer", "nccl"}))->capture_default_str();
    sub->add_option("--rates", o.rates, "with another device: a file with the output of moebius-gpu-rates, for the floors")->check(CLI::ExistingFile)->default_str("none: no floors");
    sub->add_option("--isa", o.isa, "kernel path: amx, avx512bf16, avx512, avx2, portable")->default_str("the best there is");
    sub->add_option("--slices-per-expert", o.slices, "cuts of each MLP (0: the default rule)")->capture_default_str();
    sub->add_option("--memory-bytes", o.memory_bytes, "per rank (0: what the run needs)")->capture_default_str();
    sub->add_flag("!--no-capture", o.capture, "decode steps queue their kernels one by one, to measure what capturing them saves");
    sub->add_option("--mode", o.mode, "exact (the default on the cpu) or fast (elsewhere): what exactness costs")->check(CLI::IsMember({"exact", "fast"}));
    sub->add_option("--format", o.format, "table or json (one object a line)")->check(CLI::IsMember({"table", "json"}))->capture_default_str();
    sub->add_option("--compare", o.compare, "an earlier run's JSON lines: adds the ratio and the spread of those")->default_str("none");
    sub->add_option("--rounds", o.rounds, "repetitions where a figure is a median")->check(CLI::Range(1, 1000))->capture_default_str();
    return sub;
  };
  auto* decode = common(app.add_subcommand("decode", "decode steps at given batch sizes"));
  decode->add_option("--batch", o.batches, "batch sizes, e.g. 1,8,32")->delimiter(',')->check(CLI::Range(1, 65536))->capture_default_str();
  decode->add_option("--context", o.context, "tokens of KV per request")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  decode->add_option("--steps", o.steps, "timed steps")->check(CLI::Range(1, 100000))->capture_default_str();
  auto* prefill = common(app.add_subcommand("prefill", "one prompt"));
  prefill->add_option("--tokens", o.tokens, "tokens of the prompt")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  for (CLI::App* sub : {decode, prefill})
    sub->add_flag("--profile", o.profile, "where a step's time goes: op by op, with the bytes and operations of each and its share of their floor; of a GPU kernel by kernel");
  auto* switches = common(app.add_subcommand("switch", "switches at once, there and back, beside a memcpy of as many bytes"));
  switches->add_option("--requests", o.requests, "live requests")->check(CLI::Range(1, 65536))->capture_default_str();
  switches->add_option("--context", o.context, "tokens of KV per request")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  switches->add_option("--stall-budget-ms", o.budgets, "instead: the gap between tokens while a switch moves, for each budget (0: at once)")
      ->delimiter(',')->check(moebius_examples::at_least(0))->default_str("none");
  switches->add_option("--max-steps", o.max_switch_steps, "with --stall-budget-ms: most steps of one switch")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  auto* sampling = common(app.add_subcommand("sampling", "choosing a token from a row of logits; no model runs"));
  sampling->add_option("--vocab", o.vocab, "tokens of the vocabulary")->check(CLI::Range(64, 1 << 24))->capture_default_str();
  auto* load = common(app.add_subcommand("load", "loading a model, beside a memcpy of its weights and reading its files"));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  Bench bench(o);
  try {
    if (*decode) bench.decode();
    if (*prefill) bench.prefill();
    if (*switches && o.ranks < 2) throw CLI::ValidationError("--ranks", "a switch needs at least 2 ranks");
    if (*switches) o.budgets.empty() ? bench.switches() : bench.stalls();
    if (*sampling) bench.sampling();
    if (*load) bench.load();
  } catch (const moebius::Error& e) {
    if (!bench.has_run()) throw;
    throw std::runtime_error(e.what());  // not the input's fault any more: status 1
  }
  return 0;
}

}  // namespace
}  // namespace moebius::bench

int main(int argc, char** argv) {
  return moebius_examples::inner_main("moebius-bench", [&] { return moebius::bench::run(argc, argv); });
}
