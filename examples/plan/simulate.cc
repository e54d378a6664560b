#include "examples/plan/simulate.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "lib/base/error.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/runtime/dummies.h"
#include "lib/runtime/engine_impl.h"
#include "lib/runtime/hindsight.h"
#include "lib/runtime/switcher.h"

namespace moebius::plan {
namespace {

// Bytes that a rank has been asked to bring from other ranks; what its queue() is.
struct Brought {
  int64_t weights = 0, kv = 0;
  std::vector<int64_t> kept{0};  // ends of tables of weight copies
};

void count_pages(const CopyPagesArgs& a, const Lane& lane) {
  int64_t slices = 0;
  for (int64_t i = 0; i < a.num; ++i) {
    const PagePair& pair = a.pairs[i];
    if (a.to_tp)
      slices += pair.home == a.rank ? 0 : a.counts[a.rank];
    else
      slices += a.num_kv_heads - a.counts[a.rank];
  }
  static_cast<Brought*>(lane.queue)->kv += slices * a.slice_bytes;
}

// Memory that is only addresses, and copies that are only counted: a device with tables of its own, as a GPU is.
class SimulatedDevice final : public Device {
 public:
  explicit SimulatedDevice(int ranks) : ranks_(static_cast<size_t>(ranks)), ops_(cpu_ops("")) { ops_.copy_pages = count_pages; }
  ~SimulatedDevice() override {
    for (const auto& [address, bytes] : reserved_) munmap(address, bytes);
  }
  const char* name() const override { return "simulated"; }
  bool host_memory() const override { return false; }
  const Ops& ops() const override { return ops_; }
  int place(int rank) const override { return rank; }
  int64_t total_bytes(int) const override { return int64_t{1} << 60; }
  int64_t free_bytes(int) const override { return int64_t{1} << 60; }
  // Of lists that are really written.
  std::byte* allocate(int, int64_t bytes) override {
    return static_cast<std::byte*>(::operator new (static_cast<size_t>(std::max<int64_t>(bytes, 1)), std::align_val_t{4096}));
  }
  void release(int, std::byte* memory, int64_t) noexcept override { ::operator delete (memory, std::align_val_t{4096}); }
  void* queue(int rank) override { return &of(rank); }
  void write(int, void* to, const void* from, int64_t bytes) override { std::memcpy(to, from, static_cast<size_t>(bytes)); }
  void read(int, void*, int64_t, const void*, int64_t, int64_t, int64_t) override {}
  void copy(int, void*, int, const void*, int64_t) override {}
  void copy_block(int rank, void*, int, const void*, int64_t bytes) override { of(rank).kept.back() += bytes; }
  void finish_blocks(int) override {}
  int keep_blocks(int rank) override {
    of(rank).kept.push_back(0);
    return static_cast<int>(of(rank).kept.size()) - 2;
  }
  void copy_kept(int rank, int, int64_t begin, int64_t end) override { of(rank).weights += end - begin; }
  void mark(int) override {}
  void pass(int) override {}
  bool idle(int) override { return true; }

  // An arena that nobody touches.
  std::byte* reserve(int64_t bytes) {
    void* address = mmap(nullptr, static_cast<size_t>(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) throw std::bad_alloc();
    reserved_.emplace_back(address, static_cast<size_t>(bytes));
    return static_cast<std::byte*>(address);
  }
  // Of the rank that was asked for most, since the last time.
  int64_t take_most() {
    int64_t most = 0;
    for (Brought& r : ranks_) most = std::max(most, r.weights + r.kv), r.weights = r.kv = 0;
    return most;
  }

 private:
  Brought& of(int rank) { return ranks_[static_cast<size_t>(rank)]; }
  std::vector<Brought> ranks_;
  Ops ops_;
  std::vector<std::pair<void*, size_t>> reserved_;
};

class Simulation {
 public:
  Simulation(const Placement& p, const StepModel& steps, const SwitchModel& switches, const moebius_examples::Load& load, const PolicyConfig& policy,
             Layout start)
      : p_(p),
        model_(steps),
        switches_(switches),
        load_(load),
        device_(p.ranks),
        world_(p.ranks, 1, p.engine.wait_deadline_ms),
        kv_(p.memory.arena.tp_pages(), p.memory.arena.ep_pages(), p.engine.page_tokens, p.engine.prefix_cache,
            start == Layout::kTp ? Phase::kTp : Phase::kEp),
        scheduler_(kv_, {p.engine.chunk_tokens, p.engine.max_batch, p.engine.max_queue, p.engine.prefix_cache}),
        plan_(p.engine.chunk_tokens + p.engine.max_batch, p.engine.max_batch, p.ranks) {
    std::vector<std::byte*> arenas;
    for (int r = 0; r < p.ranks; ++r) arenas.push_back(device_.reserve(p.memory.arena.arena_bytes(r)));
    switcher_ = std::make_unique<Switcher>(Switcher::Parts{world_, device_, p.memory.arena, p.memory.to_tp, p.memory.to_ep, arenas, kv_, scheduler_,
                                                           [this](Event&& e) { on_event(e); }, [](Sequence&) {}},
                                           start);
    if (p.ranks > 1 && policy.kind == PolicyKind::kMeasured) calibrate();
    policy_ = make_policy(policy, policy_limits(p.engine), &costs_);
    check_that_all_fit();
  }

  SimulatedRun run() {
    Hindsight best(layout(), prices());
    for (size_t asked = 0; asked < load_.asked.size() || !scheduler_.running().empty() || !scheduler_.waiting().empty();) {
      if (scheduler_.running().empty() && scheduler_.waiting().empty()) {
        idle_s_ += std::max(0.0, load_.asked[asked].at_s - now_s_);
        now_s_ = std::max(now_s_, load_.asked[asked].at_s);
      }
      for (;
           asked < load_.asked.size() && load_.asked[asked].at_s <= now_s_ && scheduler_.waiting().size() < static_cast<size_t>(p_.engine.max_queue);
           ++asked)
        ask(load_.asked[asked]);
      observe();
      out_.preemptions += static_cast<int64_t>(scheduler_.plan(plan_).size());
      if (plan_.num_rows() > 0)
        step(best);
      else if (asked == load_.asked.size() && scheduler_.running().empty())
        fail(Code::kDoesNotFit, "a request waits for KV pages that there are not");
      ++out_.steps;
    }
    out_.seconds = now_s_;
    out_.hindsight_s = idle_s_ + best.cost();
    const double answers = static_cast<double>(std::max<size_t>(1, load_.asked.size()));
    out_.first_token_s /= answers;
    out_.answer_s /= answers;
    out_.token_gap_s /= std::max(1.0, gaps_);
    return std::move(out_);
  }

 private:
  struct Asked {
    Request request;
    int64_t tokens = 0;
    double at_s = 0, first_s = 0;
  };

  Layout layout() const { return switcher_->seam() == 0 ? Layout::kEp : Layout::kTp; }
  double kv_tokens() const { return static_cast<double>(kv_.live_blocks().size()) * p_.engine.page_tokens; }
  // By the model, with the KV that there is.
  Costs prices() const { return {switches_.seconds(Layout::kTp, kv_tokens()), switches_.seconds(Layout::kEp, kv_tokens())}; }

  void check_that_all_fit() const {
    int64_t pages = kv_.tp_capacity();
    for (int h = 0; h < kv_.num_homes(); ++h) pages = std::min(pages, kv_.ep_capacity(h));
    for (const moebius_examples::Asked& a : load_.asked) {
      const auto tokens = static_cast<int64_t>(load_.prompts[static_cast<size_t>(a.prompt)].size()) + a.tokens;
      if (tokens + 1 > pages * p_.engine.page_tokens)
        fail(Code::kDoesNotFit, "a request of {} tokens is asked for, {} tokens of KV are the most that one may have", tokens,
             pages * p_.engine.page_tokens);
    }
  }

  // As policy_calibrate_ms does (lib/runtime/calibrate.cc), before anything is served, in rounds instead of a time.
  void calibrate() {
    constexpr int kRounds = 6;
    for (Layout l : {Layout::kTp, Layout::kEp}) {
      int64_t prompt = DummyRound::kShortest;
      for (int i = 0; i < kRounds; ++i, prompt = DummyRound::next(prompt)) learn_dummies(l, DummyRound::of(prompt, INT64_MAX));
      costs_.on_switch(l, switcher_->bytes_across(l), switches_.seconds(l, 0));
    }
  }

  void learn_dummies(Layout l, const DummyRound& round) {
    const auto learn = [&](const StepWork& work) {
      const double seconds = model_.seconds(l, work);
      costs_.on_step(l, loads_of(work), seconds, clock_s_ += seconds);
    };
    const auto prompt = static_cast<double>(round.prompt), chunk = static_cast<double>(p_.engine.chunk_tokens);
    const int64_t most = std::min<int64_t>({round.most, p_.engine.max_batch, kv_.tp_capacity() * p_.engine.page_tokens / round.total});
    for (int64_t size = 1, before = 0; size <= most; before = size, size *= 2) {
      // Prompts of a step, or parts of one; what was prefilled of it before.
      for (double left = static_cast<double>(size - before) * prompt, done = 0; left > 0; left -= chunk, done = std::fmod(done + chunk, prompt)) {
        const double rows = std::min(left, chunk), prompts = std::ceil(rows / prompt);
        StepWork work = model_.prompts(prompts, rows / prompts, done);
        const StepWork running = model_.decode(static_cast<double>(before), prompt + static_cast<double>(size));
        for (size_t h = 0; h < work.size(); ++h) work[h] += running[h];
        learn(work);
      }
      for (int i = 0; i < DummyRound::kStepsOfSize; ++i) learn(model_.decode(static_cast<double>(size), prompt + static_cast<double>(size) * 0.01 + i));
    }
  }

  static StepLoads loads_of(const StepWork& work) {
    const std::vector<StepLoad> homes(work.begin(), work.end());
    return StepLoads::of(homes);
  }

  void ask(const moebius_examples::Asked& asked) {
    auto a = std::make_unique<Asked>();
    const std::vector<int32_t>& prompt = load_.prompts[static_cast<size_t>(asked.prompt)];
    a->request.number = requests_.size() + 1;
    a->request.spec.prompt_ids = prompt;
    a->request.spec.sampling.max_tokens = static_cast<int32_t>(load_.most_tokens);
    a->request.samples.resize(1);
    a->request.unfinished = 1;
    Sequence& s = a->request.samples[0];
    s.request = &a->request;
    s.arrival = requests_.size();
    s.tokens.reserve(prompt.size() + static_cast<size_t>(asked.tokens) + 1);
    s.tokens = prompt;
    a->tokens = asked.tokens;
    a->at_s = asked.at_s;
    scheduler_.add(s);
    requests_.push_back(std::move(a));
  }

  // As Engine::Impl::observe_load.
  void observe() {
    LoadSample load = sample_of(scheduler_);
    load.step = static_cast<uint64_t>(out_.steps);
    load.time_s = clock_s_ + now_s_;
    load.layout = layout();
    load.last = last_load_;
    load.last_seconds = std::exchange(last_seconds_, 0);
    if (policy_->figures() != nullptr) {
      for (Layout to : {Layout::kTp, Layout::kEp}) load.price[static_cast<size_t>(to)] = costs_.price(to, switcher_->bytes_across(to));
      add_remaining(scheduler_, load);
    }
    const std::optional<Decision> decision = policy_->observe(load);
    if (!decision || decision->shadow) return;
    if (out_.decisions.size() < 100) out_.decisions.push_back(decision->record.str());
    if (switcher_->begin(decision->to == Layout::kTp ? switcher_->num_layers() : 0, p_.engine.preempt_to_fit)) switcher_->advance(0);
  }

  void on_event(const Event& e) {
    if (e.type == EventType::kSwitchStarted) costs_.on_switch_started();
    if (e.type == EventType::kSwitchRefused) {
      ++out_.refusals;
      policy_->on_failed(e.to, e.reason.view());
    }
    if (e.type != EventType::kSwitchFinished || e.bytes == 0) return;
    const double seconds = switches_.seconds_of(static_cast<double>(device_.take_most()));
    now_s_ += seconds;
    out_.switch_s += seconds;
    ++out_.switches;
    costs_.on_switch(e.to, e.bytes, seconds);
    policy_->on_switched(clock_s_ + now_s_);
  }

  void step(Hindsight& best) {
    const Layout here = layout();
    const StepWork work = model_.of(plan_, here == Layout::kTp);
    const Costs both{model_.seconds(Layout::kTp, work), model_.seconds(Layout::kEp, work)};
    const double seconds = of(both, here);
    best.add(both, prices());
    now_s_ += seconds;
    last_load_ = loads_of(work);
    last_seconds_ = seconds;
    costs_.on_step(here, last_load_, seconds, clock_s_ + now_s_);
    scheduler_.commit(plan_);
    accept_tokens();
    out_.most_running = std::max(out_.most_running, static_cast<int>(scheduler_.running().size()));
    keep_moment(here);
  }

  // A token is its place: answers are of no interest, and differ between requests as sampled ones do.
  void accept_tokens() {
    for (const ScheduledChunk& chunk : plan_.chunks) {
      if (!chunk.samples) continue;
      Sequence& s = *chunk.sequence;
      Asked& a = *requests_[s.request->number - 1];
      s.tokens.push_back(static_cast<int32_t>((s.request->number * 1000003 + s.tokens.size()) & 0x7fffffff));
      ++out_.tokens;
      if (s.generated() == 1) {
        a.first_s = now_s_;
        out_.first_token_s += now_s_ - a.at_s;
      }
      if (s.generated() < a.tokens) continue;
      if (a.tokens > 1) {
        out_.token_gap_s += (now_s_ - a.first_s) / static_cast<double>(a.tokens - 1);
        ++gaps_;
      }
      out_.answer_s += now_s_ - a.at_s;
      scheduler_.remove(s);
      s.tokens = {};
    }
  }

  // Every so many steps; when there are a thousand, every other one of them goes.
  void keep_moment(Layout here) {
    if (out_.steps % every_ != 0) return;
    out_.moments.push_back({now_s_, static_cast<int>(scheduler_.running().size()), static_cast<int>(scheduler_.waiting().size()), here});
    if (out_.moments.size() < 1000) return;
    for (size_t i = 0; i < 500; ++i) out_.moments[i] = out_.moments[2 * i];
    out_.moments.resize(500);
    every_ *= 2;
  }

  const Placement& p_;
  const StepModel& model_;
  const SwitchModel& switches_;
  const moebius_examples::Load& load_;
  SimulatedDevice device_;
  World world_;
  KvManager kv_;
  Scheduler scheduler_;
  StepPlan plan_;
  std::unique_ptr<Switcher> switcher_;
  CostModel costs_;
  std::unique_ptr<Policy> policy_;
  std::vector<std::unique_ptr<Asked>> requests_;
  SimulatedRun out_;
  double now_s_ = 0, clock_s_ = 0, idle_s_ = 0, last_seconds_ = 0, gaps_ = 0;
  StepLoads last_load_;
  int64_t every_ = 1;
};

}  // namespace

SimulatedRun simulate(const Placement& placement, const StepModel& steps, const SwitchModel& switches, const moebius_examples::Load& load,
                      const PolicyConfig& policy, Layout start) {
  return Simulation(placement, steps, switches, load, policy, start).run();
}

}  // namespace moebius::plan
