// moebius-demo: a burst of requests that decays to stragglers, served three times: in TP, in EP, and switching between them
// while requests run. Uses the public headers only.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "examples/common/options.h"
#include "examples/common/statistics.h"

namespace moebius_examples {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  EngineOptions engine;
  int64_t requests = 48;
  int64_t few = 12;  // at or below so many running requests TP is better: the switching run goes there, and above it to EP
  bool live = isatty(STDERR_FILENO);
};

const char* const kPrompts[] = {"ROMEO:\n", "JULIET:\n", "First Citizen:\n", "KING RICHARD III:\n", "MENENIUS:\n", "What say you to ",
                                "The queen, my lord, ", "O, that I were ", "Good night, good ", "Now is the winter of "};

struct Result {
  std::map<int, std::vector<int32_t>> tokens;  // by request
  std::vector<double> gaps;                    // seconds between a request's tokens
  double seconds = 0;
  int64_t generated = 0;
};

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// Heavy-tailed lengths: most requests are short, a few are stragglers.
int64_t tokens_of(int i) {
  constexpr int64_t kLengths[] = {24, 32, 20, 40, 28, 48, 36, 160, 24, 64, 30, 320};
  return kLengths[static_cast<size_t>(i) % std::size(kLengths)];
}

class Run {
 public:
  Run(const Options& o, const moebius_cpp::Tokenizer& tokenizer, const std::string& name, const std::string& layout, bool switches)
      : o_(o), tokenizer_(tokenizer), name_(name), start_(layout == "tp" ? MOEBIUS_LAYOUT_TP : MOEBIUS_LAYOUT_EP), switches_(switches) {
    EngineOptions e = o.engine;
    e.layout = layout;
    moebius_cpp::Config config = e.config();
    engine_.emplace(load(e, config));
    layers_ = engine_->model().num_layers;
    submit();
  }

  Result serve() {
    begin_ = Clock::now();
    Clock::time_point shown{};
    for (moebius_layout wished = start_; finished_ < o_.requests;) {
      submit();
      engine_->step();
      take_events();
      const moebius_stats s = engine_->stats();
      // Many at once are served sooner by expert parallelism, a few stragglers by tensor parallelism.
      const moebius_layout better =
          submitted_ == o_.requests && s.waiting == 0 && s.running <= o_.few ? MOEBIUS_LAYOUT_TP : MOEBIUS_LAYOUT_EP;
      if (switches_ && better != wished) engine_->request_switch(wished = better);
      if (seconds_since(shown) > (o_.live ? 0.1 : 1.0)) show(s), shown = Clock::now();
    }
    show(engine_->stats());
    if (o_.live) complain("\n");
    result_.seconds = seconds_since(begin_);
    return std::move(result_);
  }

 private:
  // As many as the queue has room for; the others wait for the next step.
  void submit() {
    for (; submitted_ < o_.requests; ++submitted_) {
      const auto i = static_cast<int>(submitted_);
      moebius_cpp::Request r(tokenizer_.encode(kPrompts[static_cast<size_t>(i) % std::size(kPrompts)]));
      r.set("id", "demo-" + std::to_string(i)).set("max_tokens", tokens_of(i)).set_real("temperature", 0.8).set("top_k", int64_t{40});
      r.set("ignore_eos", int64_t{1});
      const auto number = submit_if_room(*engine_, r);
      if (!number) return;
      number_[*number] = i;
    }
  }

  void take_events() {
    do {
      engine_->poll(events_);
      for (const moebius_event& e : events_) {
        if (e.type == MOEBIUS_EVENT_TOKEN) {
          const int i = number_.at(e.request);
          result_.tokens[i].push_back(e.token);
          ++result_.generated;
          const Clock::time_point now = Clock::now();
          if (last_.count(i)) result_.gaps.push_back(std::chrono::duration<double>(now - last_[i]).count());
          last_[i] = now;
        }
        if (e.type == MOEBIUS_EVENT_FINISHED) ++finished_;
        if (e.type == MOEBIUS_EVENT_SWITCH_FINISHED)
          note(fmt::format("{}: {} → {} under load: {:.2f} MiB in {:.2f} ms, {} requests running", name_, layout_name(e.from),
                           layout_name(e.to), static_cast<double>(e.bytes) / 1048576, e.seconds * 1e3, engine_->stats().running));
        if (e.type == MOEBIUS_EVENT_SWITCH_REFUSED) note(name_ + ": switch refused: " + e.reason);
      }
    } while (!events_.empty());
  }

  static const char* layout_name(int32_t layout) { return layout == MOEBIUS_LAYOUT_TP ? "TP" : "EP"; }

  void note(const std::string& text) { complain("{}  * {}{}\n", o_.live ? "\r" : "", text, o_.live ? std::string(30, ' ') : ""); }

  // One line: the seam as a picture (layers in TP, then in EP), load and speed.
  void show(const moebius_stats& s) {
    std::string seam(static_cast<size_t>(s.seam), 'T');
    seam.resize(static_cast<size_t>(layers_), 'E');
    const double rate = static_cast<double>(result_.generated) / seconds_since(begin_);
    complain("{}  {:10} running {:3}  waiting {:3}  layers {}  {:8.0f} tokens/s{}", o_.live ? "\r" : "", name_, s.running, s.waiting, seam,
             rate, o_.live ? "   " : "\n");
  }

  const Options& o_;
  const moebius_cpp::Tokenizer& tokenizer_;
  std::string name_;
  moebius_layout start_;
  bool switches_;
  std::optional<moebius_cpp::Engine> engine_;
  int32_t layers_ = 0;
  std::map<uint64_t, int> number_;
  std::map<int, Clock::time_point> last_;
  std::vector<moebius_event> events_;
  Result result_;
  Clock::time_point begin_{};
  int64_t submitted_ = 0, finished_ = 0;
};

void demo(const Options& o) {
  const moebius_cpp::Tokenizer tokenizer = before_running([&] { return moebius_cpp::Tokenizer(o.engine.model); });
  complain("{} requests arrive at once, most short, a few long; {} ranks; sampled at temperature 0.8 with a seed of its own each.\n\n",
           o.requests, o.engine.ranks);
  struct Kind {
    const char* name;
    std::string layout;
    bool switches;
  };
  std::vector<std::pair<std::string, Result>> results;
  for (const Kind& k : {Kind{"TP only", "tp", false}, Kind{"EP only", "ep", false}, Kind{"switching", o.engine.layout, true}}) {
    const auto make = [&] { return std::make_unique<Run>(o, tokenizer, k.name, k.layout, k.switches); };
    const std::unique_ptr<Run> run = results.empty() ? before_running(make) : make();
    results.emplace_back(k.name, run->serve());
  }

  fmt::print("  {:10} {:>9} {:>12} {:>12} {:>12}\n", "", "total s", "tokens/s", "p50 gap ms", "p99 gap ms");
  for (const auto& [name, r] : results)
    fmt::print("  {:10} {:9.2f} {:12.0f} {:12.2f} {:12.2f}\n", name, r.seconds, static_cast<double>(r.generated) / r.seconds,
               percentile(r.gaps, 0.5) * 1e3, percentile(r.gaps, 0.99) * 1e3);

  fmt::print("\nWhat it wrote (the model is small, trained on Shakespeare):\n");
  for (int i = 0; i < std::min<int64_t>(o.requests, 8); i += 7) {
    std::string text = kPrompts[static_cast<size_t>(i) % std::size(kPrompts)] + tokenizer.decode(results[2].second.tokens.at(i), true);
    if (text.size() > 240) text = text.substr(0, text.rfind(' ', 240)) + " …";
    fmt::print("  | ");
    for (char c : text) fmt::print("{}", c == '\n' ? "\n  | " : std::string(1, c));
    fmt::print("\n\n");
  }

  int same = 1;
  for (size_t k = 1; k < results.size(); ++k) {
    if (results[k].second.tokens == results[0].second.tokens) {
      ++same;
      continue;
    }
    for (const auto& [i, tokens] : results[0].second.tokens)
      if (results[k].second.tokens[i] != tokens) fmt::print("request {} differs between '{}' and '{}'\n", i, results[0].first, results[k].first);
  }
  if (same != 3) throw std::runtime_error(fmt::format("tokens: identical in {} of 3 runs", same));
  fmt::print("tokens: identical in 3 of 3 runs\n");
}

// The shipped model: beside the programs when installed, else in the source tree.
std::string shipped_model() {
  char self[4096];
  const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
  if (n > 0) {
    const std::string dir(self, static_cast<size_t>(n));
    const std::string installed = dir.substr(0, dir.rfind('/')) + "/../share/moebius/models/shakespeare-moe";
    struct stat s;
    if (stat((installed + "/config.json").c_str(), &s) == 0) return installed;
  }
  return MOEBIUS_SHIPPED_MODELS "/shakespeare-moe";
}

}  // namespace
}  // namespace moebius_examples

int main(int argc, char** argv) {
  using namespace moebius_examples;
  return run_program("moebius-demo", [&] {
    Options o;
    o.engine.ranks = 2;
    o.engine.model = shipped_model();
    o.engine.mode = "exact";  // on devices too: what it shows is that the tokens are the same
    CLI::App app{"Serves a burst of requests three times (TP only, EP only, switching while they run) and checks that all three gave the same tokens."};
    o.engine.add_to(app, false);
    app.get_option("--model")->default_str("the shipped one");
    app.get_option("--mode")->description("exact: equal bits whatever the layout; fast: sums in any order")->default_str("exact");
    app.get_option("--layout")->description("layout in which the switching run starts: tp or ep");
    app.add_option("--seed", o.engine.seed, "seed of the engine")->check(fits_int64())->capture_default_str();
    app.add_option("--requests", o.requests, "requests of the burst")->check(CLI::Range(1, 100000))->capture_default_str();
    app.add_option("--few", o.few, "the switching run goes to TP when no more are running, and to EP before")
        ->check(at_least(0))
        ->capture_default_str();
    parse_or_exit(app, argc, argv);
    demo(o);
  });
}
