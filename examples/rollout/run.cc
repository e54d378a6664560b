#include "examples/rollout/run.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <thread>

#include "examples/common/options.h"

namespace moebius_examples {
namespace {

using Clock = std::chrono::steady_clock;  // the engine's clock too

// An idle engine in a layout, with nobody to move it away.
void settle(moebius_cpp::Engine& engine, moebius_layout layout) {
  moebius_cpp::Config manual;
  manual.set("policy", std::string("manual"));
  engine.set_policy(manual);
  engine.request_switch(layout);
  const int32_t seam = layout == MOEBIUS_LAYOUT_TP ? engine.model().num_layers : 0;
  std::vector<moebius_event> events;
  do {
    engine.step();
    for (engine.poll(events); const moebius_event& e : events)
      if (e.type == MOEBIUS_EVENT_SWITCH_REFUSED || e.type == MOEBIUS_EVENT_ROLLED_BACK)
        throw std::runtime_error(std::string("the engine does not get into the layout to begin with: ") + e.reason);
  } while (engine.stats().switching != 0 || engine.stats().seam != seam);
}

class Server {
 public:
  Server(moebius_cpp::Engine& engine, const Load& load, const Choice& choice, int32_t salt)
      : engine_(engine), load_(load), choice_(choice), salt_(salt), id_(load.asked.size()) {
    for (const Asked& a : load.asked) total_ += a.tokens;
    run_.choice = choice.name;
    run_.num_layers = engine.model().num_layers;
    run_.answers.resize(load.asked.size());
  }

  Run serve() {
    if (!choice_.goes_on) {
      settle(engine_, choice_.start);
      engine_.set_policy(choice_.policy);
    }
    begin_ = Clock::now();
    while (ended_ < load_.asked.size()) {
      submit_due();
      if (submitted_ == ended_) {
        std::this_thread::sleep_until(
            begin_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(load_.asked[submitted_].at_s)));
        continue;
      }
      engine_.step();
      take_events();
      if (choice_.fixed) ask_price();
    }
    run_.end = engine_.stats().seam == 0 ? MOEBIUS_LAYOUT_EP : MOEBIUS_LAYOUT_TP;
    for (const Answer& a : run_.answers) run_.seconds = std::max(run_.seconds, a.last_s);
    return std::move(run_);
  }

 private:
  double now_s() const { return seconds_of(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count()); }
  double seconds_of(int64_t time_ns) const {
    return 1e-9 * static_cast<double>(time_ns - begin_.time_since_epoch() / std::chrono::nanoseconds(1));
  }

  void submit_due() {
    for (const double now = now_s(); submitted_ < load_.asked.size() && load_.asked[submitted_].at_s <= now; ++submitted_) {
      const Asked& a = load_.asked[submitted_];
      std::vector<int32_t> prompt = load_.prompts[static_cast<size_t>(a.prompt)];
      prompt[0] = (prompt[0] + salt_) % vocab_;
      moebius_cpp::Request r(prompt);
      r.set("max_tokens", load_.most_tokens).set("ignore_eos", int64_t{1}).set("seed", static_cast<int64_t>(submitted_));
      r.set_user_data(submitted_);
      const auto id = submit_if_room(engine_, r);
      if (!id) return;
      id_[submitted_] = *id;
    }
  }

  void take_events() {
    double longest = 0;
    do {
      engine_.poll(events_);
      for (const moebius_event& e : events_) take(e, longest);
    } while (!events_.empty());
    const moebius_stats s = engine_.stats();
    run_.steps.push_back({now_s(), s.running, s.waiting, s.seam, run_.tokens, longest});
  }

  void take(const moebius_event& e, double& longest) {
    if (e.type == MOEBIUS_EVENT_TOKEN) return take_token(e, longest);
    if (e.type == MOEBIUS_EVENT_FINISHED && e.finish_reason == MOEBIUS_FINISH_ERROR)
      throw std::runtime_error(std::string("a request failed: ") + e.reason);
    const bool refused = e.type == MOEBIUS_EVENT_SWITCH_REFUSED, rolled_back = e.type == MOEBIUS_EVENT_ROLLED_BACK;
    const bool moved = e.type == MOEBIUS_EVENT_SWITCH_FINISHED;
    if (moved || refused || rolled_back || e.type == MOEBIUS_EVENT_DECISION)
      run_.moments.push_back({seconds_of(e.time_ns), static_cast<moebius_layout>(e.to), moved, refused, rolled_back, e.seconds, e.reason});
  }

  void take_token(const moebius_event& e, double& longest) {
    Answer& a = run_.answers[e.user_data];
    const Asked& asked = load_.asked[e.user_data];
    if (a.tokens == asked.tokens) return;  // it came before the cancel did
    const double at = seconds_of(e.time_ns);
    if (a.tokens++ == 0) {
      a.asked_s = asked.at_s;
      a.first_s = at;
    } else {
      run_.gaps.push_back(at - a.last_s);
      longest = std::max(longest, at - a.last_s);
    }
    a.last_s = at;
    ++run_.tokens;
    if (a.tokens < asked.tokens) return;
    ++ended_;
    if (a.tokens < load_.most_tokens) engine_.cancel(id_[e.user_data]);
  }

  void ask_price() {
    if (run_.tokens * kPrices < total_ * static_cast<int64_t>(run_.prices.size())) return;
    moebius_switch_estimate estimate{};
    estimate.struct_size = sizeof estimate;
    const moebius_layout other = choice_.start == MOEBIUS_LAYOUT_TP ? MOEBIUS_LAYOUT_EP : MOEBIUS_LAYOUT_TP;
    moebius_cpp::check([&](moebius_error** err) { return moebius_engine_estimate_switch(engine_.get(), other, &estimate, err); });
    run_.prices.emplace_back(run_.tokens, estimate.fits ? estimate.seconds : INFINITY);
  }

  moebius_cpp::Engine& engine_;
  const Load& load_;
  const Choice& choice_;
  const int32_t salt_, vocab_ = engine_.model().vocab_size;
  std::vector<uint64_t> id_;  // of what was submitted
  std::vector<moebius_event> events_;
  int64_t total_ = 0;
  size_t submitted_ = 0, ended_ = 0;
  Clock::time_point begin_{};
  Run run_;
};

}  // namespace

Run serve(moebius_cpp::Engine& engine, const Load& load, const Choice& choice, int32_t salt) {
  Run run = Server(engine, load, choice, salt).serve();
  for (std::vector<moebius_event> events; engine.stats().running + engine.stats().waiting > 0;) {  // the last cancels
    engine.step();
    engine.poll(events);
  }
  return run;
}

}  // namespace moebius_examples
