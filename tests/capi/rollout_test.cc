// moebius-rollout: its loads and statistics by hand, and the program on the shipped model.
#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <nlohmann/json.hpp>

#include "examples/common/statistics.h"
#include "examples/rollout/compare.h"
#include "tests/capi/program.h"

using namespace moebius_examples;
using nlohmann::json;

namespace {

// A run that gets one token at each of these times, and is told these prices.
Run run_of(const std::vector<double>& times, std::vector<std::pair<int64_t, double>> prices = {}) {
  Run r;
  for (double t : times) r.steps.push_back({t, 1, 0, 0, ++r.tokens, 0});
  r.seconds = times.back();
  r.prices = std::move(prices);
  return r;
}

// 64 tokens, the first half of which takes `early` each and the others `late`; a switch away takes `price` at any time.
Run halves(double early, double late, double price) {
  std::vector<double> times;
  std::vector<std::pair<int64_t, double>> prices;
  for (int i = 0; i < 64; ++i) {
    times.push_back((times.empty() ? 0 : times.back()) + (i < 32 ? early : late));
    prices.emplace_back(i, price);
  }
  return run_of(times, prices);
}

Output program(const std::string& arguments, bool with_errors = false) { return output_of(MOEBIUS_ROLLOUT, arguments, with_errors); }

}  // namespace

TEST_CASE("a load is its seed's: rates, bursts, lengths and shared prompts") {
  LoadOptions o;
  o.arrivals = Arrivals::kRandom;
  o.prompts = 20000;
  o.samples = 2;
  o.rate = 50;
  o.prompt = {3, 8, 0};
  o.answer = {100, 400, 1};
  const auto moments = [&](double variation) {
    o.variation = variation;
    const Load load = make_load(o, 100);
    REQUIRE(load.asked.size() == 40000);
    double before = 0, sum = 0, squares = 0;
    for (size_t i = 0; i < load.asked.size(); i += 2) {
      CHECK(load.asked[i].prompt == load.asked[i + 1].prompt);
      const double gap = load.asked[i].at_s - before;
      before = load.asked[i].at_s;
      sum += gap, squares += gap * gap;
    }
    const double mean = sum / 20000;
    return std::pair(mean, std::sqrt(squares / 20000 - mean * mean) / mean);
  };
  for (double variation : {1.0, 4.0}) {
    const auto [mean, cv] = moments(variation);
    CHECK(mean == Approx(0.04).epsilon(0.03 * variation));  // two samples a prompt; the mean of n gaps is off by cv / √n = 0.7 % and 2.8 %
    CHECK(cv == Approx(variation).epsilon(0.1));
  }
  const Load a = make_load(o, 100), b = make_load(o, 100);
  std::vector<double> lengths;
  for (size_t i = 0; i < a.asked.size(); ++i) {
    REQUIRE((a.asked[i].tokens == b.asked[i].tokens && a.asked[i].at_s == b.asked[i].at_s));
    REQUIRE((a.asked[i].tokens >= 1 && a.asked[i].tokens <= 400));
    lengths.push_back(static_cast<double>(a.asked[i].tokens));
  }
  CHECK(a.prompts == b.prompts);
  CHECK(median(lengths) == Approx(100).epsilon(0.03));
  CHECK(percentile(lengths, 0.8413) == Approx(100 * std::exp(1)).epsilon(0.05));  // one sigma above the median
  o.seed = 2;
  CHECK(make_load(o, 100).prompts != a.prompts);
}

TEST_CASE("steps have many arrivals in one period and few in the next") {
  LoadOptions o;
  o.arrivals = Arrivals::kSteps;
  o.prompts = 2000;
  o.samples = 1;
  o.rate = 100, o.low_rate = 10, o.period_s = 1;
  int high = 0, low = 0;
  const Load load = make_load(o, 100);
  for (const Asked& a : load.asked) ++(std::fmod(a.at_s, 2) < 1 ? high : low);
  CHECK(high > 5 * low);
  CHECK(low > 20);
  CHECK(load.asked.back().at_s == Approx(2000 / 55.0).epsilon(0.2));
  // A gap that begins in a slow period ends with it: slow ones do not swallow what follows them.
  o.low_rate = 0.01;
  const double end_s = make_load(o, 100).asked.back().at_s;
  CHECK(end_s == Approx(2 * 2000 / 100.0).epsilon(0.15));
  o.low_rate = 1e-6, o.rate = 1e-6, o.period_s = 1e-3;  // many periods lie between two arrivals
  CHECK(make_load(o, 100).asked.back().at_s == Approx(2000e6).epsilon(0.15));
}

TEST_CASE("the median's interval holds the true median of 95 of 100 samples, and of few values is all of them") {
  CHECK(median_with_interval({3, 1, 2}).low == 1);
  CHECK(median_with_interval({3, 1, 2}).value == 2);
  CHECK(median_with_interval({3, 1, 2}).high == 3);
  CHECK(median_with_interval({4, 1}).value == 2.5);
  const Median nine = median_with_interval({9, 8, 7, 6, 5, 4, 3, 2, 1});  // P(fewer than 2 of 9 below the median) = 10/512
  CHECK((nine.low == 2 && nine.value == 5 && nine.high == 8));
  const Median eight = median_with_interval({1, 2, 3, 4, 5, 6, 7, 8});  // P(none) = 1/256, P(at most one) = 9/256
  CHECK((eight.low == 1 && eight.high == 8));
}

TEST_CASE("figures of a run: times to the first token, gaps, and answers that met both targets") {
  Run r = run_of({1, 2, 3, 4});
  r.answers = {{0, 1, 2, 2}, {1, 3, 4, 2}, {3.5, 4, 4, 1}};
  r.gaps = {1, 1};
  Moment moved;
  moved.moved = true, moved.seconds = 0.25;
  r.moments = {moved, Moment{}};
  const Figures f = figures_of(r, {1.5, 1});
  CHECK(f.tokens_per_second == 1);
  CHECK(f.first_mean_s == Approx((1 + 2 + 0.5) / 3));
  CHECK(f.first_p50_s == 1);
  CHECK(f.first_p99_s == 2);
  CHECK(f.goodput == 2 / 4.0);
  CHECK(figures_of(r, {1.5, 0.5}).goodput == 1 / 4.0);
  CHECK((f.switches == 1 && f.switch_s == 0.25));
}

TEST_CASE("the best schedule in hindsight takes each stretch where it is cheaper, if the switch pays") {
  const Run tp = halves(2, 1, 10), ep = halves(1, 2, 10);
  const auto best = [&](const Run& a, const Run& b, moebius_layout start) { return *hindsight_seconds({&a}, {&b}, start); };
  CHECK(best(tp, ep, MOEBIUS_LAYOUT_EP) == Approx(32 + 10 + 32));
  CHECK(best(tp, ep, MOEBIUS_LAYOUT_TP) == Approx(10 + 32 + 10 + 32));
  const Run dear_tp = halves(2, 1, 40), dear_ep = halves(1, 2, 40);
  CHECK(best(dear_tp, dear_ep, MOEBIUS_LAYOUT_TP) == Approx(96));
  const Run never = halves(2, 1, INFINITY);
  CHECK(best(never, ep, MOEBIUS_LAYOUT_TP) == Approx(96));
  CHECK_FALSE(hindsight_seconds({}, {&ep}, MOEBIUS_LAYOUT_TP));
}

TEST_CASE("the program serves every load under every choice") {
  const std::string model =
      "--model '" + std::string(MOEBIUS_SHIPPED_MODELS) + "/shakespeare-moe' --ranks 2 --threads 1 --rounds 1 --format json ";
  const std::string small = "--prompts 3 --samples 2 --prompt-tokens 9 --answer-tokens 6 --max-tokens 20 ";
  const std::string html = (std::filesystem::temp_directory_path() / ("moebius-rollout-" + std::to_string(getpid()) + ".html")).string();
  for (const std::string load : {"rollout", "points --concurrency 1,3 --seconds 0.02", "poisson --rate 200", "bursty --rate 200",
                                 "steps --rate 300 --low-rate 60 --period-s 0.02"}) {
    INFO(load);
    const Output p = program(model + small + "--load " + load +
                             " --choices tp,ep,measured,threshold --policy-variant rollout --policy-threshold 4 --html " + html);
    REQUIRE(p.status == 0);
    std::istringstream lines(p.out);
    std::map<std::string, int> rows;
    for (std::string line; std::getline(lines, line);) {
      const json row = json::parse(line);
      ++rows[row.at("what").get<std::string>() + " " + row.at("choice").get<std::string>()];
      if (row["what"] == "run")
        CHECK((row.at("tokens_per_second") > 0 && row.at("first_token_p99_seconds") >= row.at("first_token_p50_seconds")));
      else
        CHECK(row.at("ratio_to_better").at("median") > 0);
    }
    const int points = load.rfind("points", 0) == 0 ? 2 : 1;
    for (const char* choice : {"tp", "ep", "measured", "threshold"})
      for (const char* what : {"run ", "summary "}) CHECK(rows[std::string(what) + choice] == points);
    std::ifstream in(html);
    const std::string page((std::istreambuf_iterator<char>(in)), {});
    CHECK(page.find("<svg") != std::string::npos);
    CHECK(page.find("http") == std::string::npos);  // nothing is fetched
    CHECK(page.find("nan") == std::string::npos);
    std::filesystem::remove(html);
  }
}

TEST_CASE("bad usage is said before anything runs") {
  const auto said = [](const std::string& arguments, const std::string& text) {
    const Output p = program(arguments, true);
    INFO(arguments << ": " << p.out);
    CHECK(p.status == 2);
    CHECK_THAT(p.out, Catch::Contains(text));
  };
  said("", "one of --model and --shape is needed");
  said("--model x --shape s", "one of --model and --shape is needed");
  said("--model /nowhere", "/nowhere");
  said("--shape s --load storm", "storm");
  said("--shape s --choices tp,both", "both");
  said("--shape s --choices tp,ep,tp", "tp is given twice");
  said("--shape s --rounds 0", "rounds");
  said("--shape s --threads x", "threads");
  said("--shape s --rate nan", "--rate");
  said("--shape s --prompt-tokens 9223372036854775807", "--prompt-tokens");
  said("--shape s --html /no/such/page.html", "/no/such/page.html");
  const std::string model = "--model '" + std::string(MOEBIUS_SHIPPED_MODELS) + "/shakespeare-moe' --ranks 2 --prompts 10 --samples 1 ";
  said(model + "--max-tokens 5000", "2048");
  said(model + "--choices threshold", "max_batch is 10");
  const Output waits = program(model + "--rounds 1 --threads 1 --max-queue 4 --choices tp --max-tokens 8");
  CHECK((waits.status == 0 && !waits.out.empty()));
  CHECK(program("--help").status == 0);
}
