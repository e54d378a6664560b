// moebius-rollout: one load served under each choice of layout (TP, EP, a policy), the choices in turn, in one engine. Uses the public
// headers only.
#include <algorithm>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "examples/common/options.h"
#include "examples/common/output_file.h"
#include "examples/common/shapes.h"
#include "examples/common/strict_json.h"
#include "examples/rollout/report.h"

namespace moebius_examples {
namespace {

using nlohmann::json;

struct Options {
  EngineOptions engine;
  std::string shape, kind = "rollout", format = "table", html;
  LoadOptions load;
  std::vector<int64_t> concurrency = {1, 4, 16, 64};
  std::vector<std::string> choices = {"tp", "ep", "measured"};
  double seconds = 1;  // of a run at an operating point
  int64_t rounds = 3;
  double target_first_ms = 1000, target_gap_ms = 100;
  bool dummy = false;
};

class Study {
 public:
  Study(const Options& o, moebius_cpp::Engine engine) : o_(o), engine_(std::move(engine)) {
    for (const std::string& name : o.choices) {
      Choice& c = choices_.emplace_back();
      c.name = name;
      c.fixed = name == "tp" || name == "ep";
      EngineOptions e = o.engine;
      e.policy = c.fixed ? "manual" : name;
      c.policy = e.config();
      if (c.fixed) c.start = layout_of(name);
      engine_.set_policy(c.policy);  // refuses a bad one; each run sets its own
    }
    // The longest request too; one whose prompt fills the context has no room for an answer already.
    const int64_t longest =
        std::min<int64_t>(o.load.prompt.sigma > 0 ? o.load.prompt.most : o.load.prompt.median, engine_.model().max_context);
    moebius_cpp::Request r(std::vector<int32_t>(static_cast<size_t>(longest)));
    r.set("max_tokens", o.load.answer.most);
    engine_.validate(r);
  }

  void run(OutputFile& page) {
    if (o_.kind == "points")
      for (int64_t c : o_.concurrency) finish(compare(point(c), c));
    else
      finish(compare(make_load(o_.load, vocab_), 0));
    if (page)
      page.fill(page_of(fmt::format("Moebius: {}", o_.kind),
                        fmt::format("{}, {} ranks; {} rounds, choices in turn; medians of them.", base()["model"].get<std::string>(),
                                    o_.engine.ranks, o_.rounds),
                        done_));
  }

 private:
  // So many requests at a time, all of one length: what runs for about the seconds asked for.
  Load point(int64_t concurrency) {
    LoadOptions l = o_.load;
    l.arrivals = Arrivals::kOnce;
    l.prompts = concurrency;
    l.samples = 1;
    l.answer = {16, l.answer.most, 0};
    const Run trial = serve(engine_, make_load(l, vocab_), choices_.front(), ++salt_);
    const double tokens = static_cast<double>(trial.tokens) / trial.seconds * o_.seconds / static_cast<double>(concurrency);
    l.answer.median = static_cast<int64_t>(std::clamp(tokens, 16.0, static_cast<double>(l.answer.most)));
    return make_load(l, vocab_);
  }

  static moebius_layout layout_of(const std::string& name) { return name == "tp" ? MOEBIUS_LAYOUT_TP : MOEBIUS_LAYOUT_EP; }

  // Where a policy is at an operating point after a while: a run is shorter than it may need to decide.
  void find_place(Choice& choice, const Load& load) {
    constexpr int kRuns = 10;
    for (int i = 0; i < kRuns; ++i) {
      choice.goes_on = i > 0;
      choice.start = serve(engine_, load, choice, ++salt_).end;
    }
    choice.goes_on = false;
  }

  // At an operating point a policy goes on from where its last run ended, as in a server that has been there for a while.
  Comparison compare(const Load& load, int64_t concurrency) {
    Comparison c;
    c.concurrency = concurrency;
    c.choices = o_.choices;
    for (Choice& choice : choices_)
      if (!choice.fixed) choice.start = layout_of(o_.engine.layout);
    for (int64_t round = 0; round <= o_.rounds; ++round) {  // the first is not counted: it warms up, and teaches the costs of both layouts
      for (Choice& choice : choices_)
        if (!choice.fixed && concurrency > 0 && round == 1) find_place(choice, load);
      for (size_t i = 0; i < choices_.size(); ++i) {
        Choice& choice = choices_[(static_cast<size_t>(round) + i) % choices_.size()];  // none is always the first
        Run run = serve(engine_, load, choice, ++salt_);
        const Figures f = figures_of(run, {1e-3 * o_.target_first_ms, 1e-3 * o_.target_gap_ms});
        complain("{}round {} of {}, {}: {} tokens in {:.2f} s, {} switches\n",
                 concurrency > 0 ? fmt::format("{} at a time, ", concurrency) : "", round, o_.rounds, choice.name, run.tokens, run.seconds,
                 f.switches);
        if (!choice.fixed && concurrency > 0) choice.start = run.end;
        if (round == 0) continue;
        if (o_.format == "json") print_run(f, choice.name, round, concurrency);
        c.figures[choice.name].push_back(f);
        c.runs[choice.name].push_back(std::move(run));
      }
    }
    c.better = better_layout(c);
    if (o_.kind == "rollout") c.hindsight_s = hindsight_seconds(runs_of(c, "tp"), runs_of(c, "ep"), layout_of(o_.engine.layout));
    return c;
  }

  static std::vector<const Run*> runs_of(const Comparison& c, const std::string& choice) {
    std::vector<const Run*> runs;
    if (const auto found = c.runs.find(choice); found != c.runs.end())
      for (const Run& r : found->second) runs.push_back(&r);
    return runs;
  }

  json base() const {
    return {{"load", o_.kind},
            {"model", o_.shape.empty() ? folder_name(o_.engine.model) : o_.shape},
            {"ranks", o_.engine.ranks},
            {"threads", o_.engine.threads}};
  }

  void print_run(const Figures& f, const std::string& choice, int64_t round, int64_t concurrency) const {
    json row = base();
    row["what"] = "run", row["choice"] = choice, row["round"] = round;
    if (concurrency > 0) row["concurrency"] = concurrency;
    row.update(row_of(f));
    fmt::print("{}\n", line_of(row));
    std::fflush(stdout);
  }

  void finish(Comparison c) {
    if (o_.format == "table")
      fmt::print("{}\n", table_of(c));
    else
      for (const std::string& choice : c.choices) {
        json row = base();
        row.update(summary_of(c, choice));
        fmt::print("{}\n", line_of(row));
      }
    std::fflush(stdout);
    for (auto& [choice, runs] : c.runs) runs.erase(runs.begin(), runs.end() - 1);
    done_.push_back(std::move(c));
  }

  const Options& o_;
  moebius_cpp::Engine engine_;
  const int32_t vocab_ = engine_.model().vocab_size;
  std::vector<Choice> choices_;
  std::vector<Comparison> done_;
  int32_t salt_ = 0;
};

void add_flags(CLI::App& app, Options& o) {
  const CLI::Range tokens(1, 1 << 30);
  o.engine.add_to(app, false);
  app.remove_option(app.get_option("--policy"));
  app.get_option("--layout")->description("layout in which policies start: tp or ep");
  app.get_option("--max-batch")->default_str("what the load has at a time, at most 256");
  app.get_option("--kv-tokens")->default_str("the longest prompt and answer for each of max-batch; 0 with --memory-bytes");
  app.add_option("--shape", o.shape, "a shape with seeded random weights instead of a model")
      ->check(CLI::IsMember(shape_names()))
      ->default_str("none");
  app.add_flag("--dummy", o.dummy, "seeded random weights; of the model's folder only config.json is read");
  app.add_option("--load", o.kind,
                 "rollout (all at once), points (so many at a time), poisson, bursty, steps (a high and a low rate in turn)")
      ->check(CLI::IsMember({"rollout", "points", "poisson", "bursty", "steps"}))
      ->capture_default_str();
  app.add_option("--choices", o.choices, "who decides on the layout: tp, ep (which stay), measured, threshold")
      ->check(CLI::IsMember({"tp", "ep", "measured", "threshold"}))
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--rounds", o.rounds, "rounds that count, after one that does not")->check(CLI::Range(1, 1000))->capture_default_str();
  app.add_option("--prompts", o.load.prompts, "prompts")->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--samples", o.load.samples, "samples of each prompt, which share it")->check(CLI::Range(1, 10000))->capture_default_str();
  app.add_option("--prompt-tokens", o.load.prompt.median, "median of prompts' lengths")->check(tokens)->capture_default_str();
  app.add_option("--prompt-sigma", o.load.prompt.sigma, "of the log-normal distribution of prompts' lengths")
      ->check(within(0, 5))
      ->capture_default_str();
  app.add_option("--max-prompt-tokens", o.load.prompt.most, "longest prompt")->check(tokens)->capture_default_str();
  app.add_option("--answer-tokens", o.load.answer.median, "median of answers' lengths")->check(tokens)->capture_default_str();
  app.add_option("--answer-sigma", o.load.answer.sigma, "of the log-normal distribution of answers' lengths")
      ->check(within(0, 5))
      ->capture_default_str();
  app.add_option("--max-tokens", o.load.answer.most, "longest answer: what the engine is told of each")
      ->check(tokens)
      ->capture_default_str();
  app.add_option("--concurrency", o.concurrency, "points: requests at a time")
      ->check(CLI::Range(1, 100000))
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--seconds", o.seconds, "points: about how long a run takes")->check(within(0.01, 3600))->capture_default_str();
  app.add_option("--rate", o.load.rate, "requests a second that arrive")->check(within(1e-3, 1e6))->capture_default_str();
  app.add_option("--low-rate", o.load.low_rate, "steps: in every other period")->check(within(1e-3, 1e6))->capture_default_str();
  app.add_option("--period-s", o.load.period_s, "steps: seconds of a period")->check(within(1e-3, 1e6))->capture_default_str();
  app.add_option("--variation", o.load.variation, "bursty: coefficient of variation of the gaps between arrivals")
      ->check(within(0.1, 100))
      ->default_str("4");
  app.add_option("--target-first-ms", o.target_first_ms, "goodput: to the first token at most")->check(at_least(0))->capture_default_str();
  app.add_option("--target-gap-ms", o.target_gap_ms, "goodput: a token at most, on average over an answer")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--load-seed", o.load.seed, "seed of the load")->check(fits_int64())->capture_default_str();
  app.add_option("--seed", o.engine.seed, "seed of the engine")->check(fits_int64())->capture_default_str();
  app.add_option("--format", o.format, "table or json (a row a run, then a summary)")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  app.add_option("--html", o.html, "writes a page with charts of the last round to this file")->default_str("none");
}

// What flags leave open.
void complete(CLI::App& app, Options& o) {
  if (o.engine.model.empty() == o.shape.empty()) throw BadInput("one of --model and --shape is needed");
  for (const std::string& choice : o.choices)
    if (std::count(o.choices.begin(), o.choices.end(), choice) > 1) throw BadInput("--choices: " + choice + " is given twice");
  if (o.kind == "rollout" || o.kind == "points") o.load.arrivals = Arrivals::kOnce;
  if (o.kind == "poisson" || o.kind == "bursty") o.load.arrivals = Arrivals::kRandom;
  if (o.kind == "steps") o.load.arrivals = Arrivals::kSteps;
  if (o.kind == "bursty" && app.count("--variation") == 0) o.load.variation = 4;
  if (o.kind == "poisson") o.load.variation = 1;
  if (o.load.prompt.most < o.load.prompt.median) o.load.prompt.most = o.load.prompt.median;
  int64_t together = o.load.prompts * o.load.samples;
  if (o.kind == "points") together = *std::max_element(o.concurrency.begin(), o.concurrency.end());
  if (app.count("--max-batch") == 0) o.engine.max_batch = std::min<int64_t>(together, 256);
  if (app.count("--kv-tokens") == 0 && app.count("--memory-bytes") == 0)
    o.engine.kv_tokens = (o.engine.max_batch + o.engine.ranks) * (o.load.prompt.most + o.load.answer.most + 2 * o.engine.page_tokens);
}

}  // namespace
}  // namespace moebius_examples

int main(int argc, char** argv) {
  using namespace moebius_examples;
  return run_program("moebius-rollout", [&] {
    Options o;
    CLI::App app{
        "Serves one load under each choice of layout, in turn and in one engine, and compares them. Results go to stdout, progress to "
        "stderr."};
    add_flags(app, o);
    parse_or_exit(app, argc, argv);
    complete(app, o);
    OutputFile page(o.html, "--html");
    std::optional<ShapeFolder> folder;
    if (!o.shape.empty()) {
      folder.emplace(o.shape);
      o.engine.model = folder->path();
    }
    std::optional<Study> study;
    before_running([&] {
      moebius_cpp::Config config = o.engine.config();
      config.set("dummy_weights", int64_t{o.dummy || folder});
      study.emplace(o, load(o.engine, config));
    });
    study->run(page);
  });
}
