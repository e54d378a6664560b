#include "examples/rollout/report.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "examples/common/chart.h"
#include "examples/common/statistics.h"

namespace moebius_examples {
namespace {

using nlohmann::json;

const char* color_of(const std::string& choice) {
  if (choice == "tp" || choice == "ep") return choice.c_str();
  return choice == "measured" ? "good" : "second";
}

template <class T>
std::vector<double> of_rounds(const Comparison& c, const std::string& choice, T Figures::*figure) {
  std::vector<double> x;
  for (const Figures& f : c.figures.at(choice)) x.push_back(static_cast<double>(f.*figure));
  return x;
}

// Of a table: a figure's median, but for the one that compares.
struct Column {
  const char* name;
  double Figures::*figure;  // null: the ratio to the better layout
  double unit;
  int digits;
};
const Column kColumns[] = {
    {"seconds", &Figures::seconds, 1, 2},           {"tokens/s", &Figures::tokens_per_second, 1, 1},
    {"of the better [95 %]", nullptr, 1, 3},        {"first ms: mean", &Figures::first_mean_s, 1e3, 1},
    {"p50", &Figures::first_p50_s, 1e3, 1},         {"p99", &Figures::first_p99_s, 1e3, 1},
    {"gap ms: mean", &Figures::gap_mean_s, 1e3, 1}, {"p50", &Figures::gap_p50_s, 1e3, 1},
    {"p99", &Figures::gap_p99_s, 1e3, 1},           {"most", &Figures::gap_max_s, 1e3, 1},
    {"goodput/s", &Figures::goodput, 1, 2},         {"switches", &Figures::switches, 1, 0},
};

std::string cell(const Column& column, const Comparison& c, const std::string& choice) {
  if (column.figure != nullptr) return fmt::format("{:.{}f}", column.unit * median(of_rounds(c, choice, column.figure)), column.digits);
  if (c.better.empty()) return "";
  const Median m = ratio_to_better(c, choice);
  return fmt::format("{:.{}f} [{:.{}f}, {:.{}f}]", m.value, column.digits, m.low, column.digits, m.high, column.digits);
}

std::string hindsight_text(const Comparison& c) {
  if (!c.hindsight_s) return "";
  std::string text = fmt::format("best schedule in hindsight: {:.3f} s", *c.hindsight_s);
  for (const std::string& name : c.choices)
    text += fmt::format("; {} {:.3f} of it", name, median(of_rounds(c, name, &Figures::seconds)) / *c.hindsight_s);
  return text;
}

// A chart shows one value of each stretch, which holds some steps.
std::string timelines(const Run& run) {
  const size_t stretches = std::clamp<size_t>(run.steps.size() / 4, 1, 300);
  const double width = std::max(run.seconds, 1e-9) / static_cast<double>(stretches);
  Series running{"running", "tp", {}, false, true}, waiting{"waiting", "second", {}}, rate{"generated", "good", {}, false, true},
      gap{"longest", "bad", {}}, seam{"layers in tensor parallelism", "tp", {}, true, true};
  StepSample last = run.steps.front();
  last.tokens = 0;
  int64_t tokens = 0;
  size_t next = 0;
  for (size_t k = 0; k < stretches; ++k) {
    const double end = width * static_cast<double>(k + 1);
    StepSample shown = last;
    shown.gap_s = 0;
    for (; next < run.steps.size() && (run.steps[next].at_s <= end || k + 1 == stretches); ++next) {
      const double longest = std::max(shown.gap_s, run.steps[next].gap_s);
      shown = run.steps[next];
      shown.gap_s = longest;
    }
    running.points.emplace_back(end, shown.running);
    waiting.points.emplace_back(end, shown.waiting);
    rate.points.emplace_back(end, static_cast<double>(shown.tokens - tokens) / width);
    gap.points.emplace_back(end, 1e3 * shown.gap_s);
    seam.points.emplace_back(end, shown.seam);
    tokens = shown.tokens;
    last = shown;
  }
  std::vector<Mark> marks;
  for (const Moment& m : run.moments)
    if (m.moved) marks.push_back({m.at_s, m.to == MOEBIUS_LAYOUT_TP ? "→ TP" : "→ EP"});
  std::string out = figure({"Requests", "s", "requests", {running, waiting}, marks});
  out += figure({"Throughput", "s", "tokens/s", {rate}, marks});
  out += figure({"Seam", "s", "layers", {seam}, marks, false, static_cast<double>(run.num_layers), 110});
  return out + figure({"Time between a request's tokens", "s", "ms", {gap}, marks, false, 0, 130});
}

std::string moments_of(const Run& run) {
  if (run.moments.empty()) return "";
  std::string out = "<div class=\"scroll\"><table><tr><th>at</th><th>what</th><th>said</th></tr>\n";
  const size_t shown = std::min<size_t>(run.moments.size(), 200);
  for (size_t i = 0; i < shown; ++i) {
    const Moment& m = run.moments[i];
    const std::string what = m.refused ? "refused" : m.rolled_back ? "rolled back" : m.moved ? fmt::format("switched in {:.2f} ms", 1e3 * m.seconds) : "decided";
    out += fmt::format("<tr><td>{:.3f} s</td><td>{}</td><td>{}</td></tr>\n", m.at_s, what, escaped(m.text));
  }
  return out + "</table></div>\n" + (run.moments.size() > shown ? fmt::format("<p>and {} more</p>\n", run.moments.size() - shown) : "");
}

std::string html_table(const Comparison& c) {
  std::string out = "<div class=\"scroll\"><table><tr><th></th>";
  for (const Column& column : kColumns) out += "<th>" + std::string(column.name) + "</th>";
  for (const std::string& choice : c.choices) {
    out += "</tr>\n<tr><td>" + escaped(choice) + "</td>";
    for (const Column& column : kColumns) out += "<td>" + cell(column, c, choice) + "</td>";
  }
  return out + "</tr></table></div>\n<p>" + hindsight_text(c) + "</p>\n";
}

std::string curves(const std::vector<Comparison>& points) {
  Chart speed{"Tokens per second", "requests at a time", "tokens/s", {}, {}, true, 0, 260},
      ratio{"Of the better layout", "requests at a time", "ratio", {}, {}, true, 0, 200};
  for (const std::string& choice : points.front().choices) {
    Series s{choice, color_of(choice), {}, false, false, true}, r = s;
    for (const Comparison& c : points) {
      const double x = static_cast<double>(c.concurrency);
      s.points.emplace_back(x, median(of_rounds(c, choice, &Figures::tokens_per_second)));
      r.points.emplace_back(x, ratio_to_better(c, choice).value);
    }
    speed.series.push_back(s);
    if (!points.front().better.empty()) ratio.series.push_back(r);
  }
  return figure(speed) + (ratio.series.empty() ? "" : figure(ratio));
}

}  // namespace

std::string better_layout(const Comparison& c) {
  if (c.figures.count("tp") + c.figures.count("ep") < 2) return "";
  const auto speed = [&](const char* layout) { return median(of_rounds(c, layout, &Figures::tokens_per_second)); };
  return speed("tp") >= speed("ep") ? "tp" : "ep";
}

Median ratio_to_better(const Comparison& c, const std::string& choice) {
  if (c.better.empty()) return {1, 1, 1};
  std::vector<double> ratios;
  const std::vector<Figures>&own = c.figures.at(choice), &better = c.figures.at(c.better);
  for (size_t i = 0; i < own.size(); ++i) ratios.push_back(own[i].tokens_per_second / better[i].tokens_per_second);
  return median_with_interval(ratios);
}

std::string table_of(const Comparison& c) {
  std::string out = c.concurrency > 0 ? fmt::format("{} at a time\n", c.concurrency) : "";
  out += fmt::format("  {:10}", "");
  for (const Column& column : kColumns)
    out += fmt::format(" {:>{}}", column.name, std::max<size_t>(std::string_view(column.name).size(), 10));
  for (const std::string& choice : c.choices) {
    out += fmt::format("\n  {:10}", choice);
    for (const Column& column : kColumns)
      out += fmt::format(" {:>{}}", cell(column, c, choice), std::max<size_t>(std::string_view(column.name).size(), 10));
  }
  const std::string hindsight = hindsight_text(c);
  return out + "\n" + (hindsight.empty() ? "" : "  " + hindsight + "\n");
}

json row_of(const Figures& f) {
  return {{"seconds", f.seconds},
          {"tokens_per_second", f.tokens_per_second},
          {"first_token_mean_seconds", f.first_mean_s},
          {"first_token_p50_seconds", f.first_p50_s},
          {"first_token_p99_seconds", f.first_p99_s},
          {"gap_mean_seconds", f.gap_mean_s},
          {"gap_p50_seconds", f.gap_p50_s},
          {"gap_p99_seconds", f.gap_p99_s},
          {"gap_max_seconds", f.gap_max_s},
          {"goodput", f.goodput},
          {"switches", static_cast<int>(f.switches)},
          {"switch_seconds", f.switch_s}};
}

json summary_of(const Comparison& c, const std::string& choice) {
  json row = {{"what", "summary"}, {"choice", choice}, {"rounds", c.figures.at(choice).size()}};
  if (c.concurrency > 0) row["concurrency"] = c.concurrency;
  const Median speed = median_with_interval(of_rounds(c, choice, &Figures::tokens_per_second));
  row["tokens_per_second"] = {{"median", speed.value}, {"low", speed.low}, {"high", speed.high}};
  if (!c.better.empty()) {
    const Median ratio = ratio_to_better(c, choice);
    row["better"] = c.better;
    row["ratio_to_better"] = {{"median", ratio.value}, {"low", ratio.low}, {"high", ratio.high}};
  }
  if (c.hindsight_s) row["hindsight_seconds"] = *c.hindsight_s;
  return row;
}

std::string page_of(const std::string& title, const std::string& said, const std::vector<Comparison>& comparisons) {
  std::string body = "<h1>" + escaped(title) + "</h1>\n<p>" + escaped(said) + "</p>\n";
  const bool points = comparisons.front().concurrency > 0;
  if (points && comparisons.size() > 1) body += curves(comparisons);
  for (const Comparison& c : comparisons) {
    if (points) body += fmt::format("<h2>{} at a time</h2>\n", c.concurrency);
    body += html_table(c);
    if (points) continue;
    for (const std::string& choice : c.choices) {
      const Run& run = c.runs.at(choice).back();
      body += "<h2>" + escaped(choice) + ", last round</h2>\n" + timelines(run) + moments_of(run);
    }
  }
  return page(title, body);
}

}  // namespace moebius_examples
