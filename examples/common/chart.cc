#include "examples/common/chart.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

namespace moebius_examples {
namespace {

constexpr double kWidth = 960, kLeft = 58, kRight = 12, kTop = 16, kBottom = 24;

constexpr char kStyle[] = R"css(
  :root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --line: #d9dde2; --grid: #eceef1; --text: #1b2026; --soft: #626b76;
          --tp: #2f6bd8; --ep: #e0821b; --second: #8a5cc7; --good: #1f9d61; --bad: #c8392f; }
  @media (prefers-color-scheme: dark) {
    :root { --ground: #12151a; --card: #1a1f26; --line: #39414c; --grid: #252b34; --text: #e6e9ee; --soft: #949eab;
            --tp: #6ea2ff; --ep: #f2a14b; --second: #b996ec; --good: #4cc38a; --bad: #f0736a; }
  }
  body { margin: 0; background: var(--ground); color: var(--text); font: 14px/1.5 system-ui, "Segoe UI", Roboto, Arial, sans-serif; }
  main { max-width: 1010px; margin: 0 auto; padding: 20px 24px 40px; }
  h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 26px 0 8px; } p { margin: 4px 0 12px; color: var(--soft); }
  figure { margin: 0 0 12px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
  figcaption { font-weight: 600; } figcaption span { font-weight: 400; font-size: 12.5px; color: var(--soft); margin-left: 16px; }
  figcaption span::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; background: var(--c); }
  svg { display: block; width: 100%; } svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
  .grid { stroke: var(--grid); } .axis { stroke: var(--line); } .mark { stroke: var(--soft); stroke-dasharray: 3 3; }
  .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
  .scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
  th { text-align: left; font-weight: 500; font-size: 12px; color: var(--soft); }
  th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
)css";

// The least round step that divides v into at most so many parts.
double round_step(double v, int parts) {
  const double unit = std::pow(10, std::floor(std::log10(v / parts)));
  for (double m : {1.0, 2.0, 2.5, 5.0})
    if (m * unit * parts >= v * 0.999) return m * unit;
  return 10 * unit;
}

std::string number(double v) { return fmt::format("{:.6g}", v); }

// Where values lie in the picture.
class Scales {
 public:
  explicit Scales(const Chart& c) : log_x_(c.log_x), height_(c.height) {
    bool any = false;
    double most = 0;
    for (const Series& s : c.series)
      for (const auto& [x, y] : s.points) {
        x_least_ = any ? std::min(x_least_, x) : x;
        x_most_ = any ? std::max(x_most_, x) : x;
        most = std::max(most, y);
        any = true;
      }
    if (!log_x_) x_least_ = std::min(x_least_, 0.0);
    if (x_most_ <= x_least_) x_most_ = x_least_ + 1;
    if (c.y_most > 0) most = c.y_most;
    if (most <= 0) most = 1;
    y_step = round_step(most, 4);
    y_most = std::ceil(most / y_step - 1e-9) * y_step;
  }
  double x(double v) const { return kLeft + (kWidth - kLeft - kRight) * (axis(v) - axis(x_least_)) / (axis(x_most_) - axis(x_least_)); }
  double y(double v) const { return height_ - kBottom - (height_ - kBottom - kTop) * std::min(v / y_most, 1.0); }
  std::vector<double> x_ticks() const {
    std::vector<double> ticks;
    if (log_x_)
      for (double v = std::exp2(std::ceil(std::log2(x_least_) - 1e-9)); v <= x_most_ * 1.001; v *= 2) ticks.push_back(v);
    else
      for (double step = round_step(x_most_ - x_least_, 10), v = std::ceil(x_least_ / step) * step; v <= x_most_ * 1.0001; v += step)
        ticks.push_back(v);
    return ticks;
  }
  double y_step = 1, y_most = 1;

 private:
  double axis(double v) const { return log_x_ ? std::log2(std::max(v, 1e-9)) : v; }
  bool log_x_;
  double height_, x_least_ = 0, x_most_ = 0;
};

std::string axes(const Chart& c, const Scales& s) {
  const double bottom = c.height - kBottom;
  std::string out;
  for (double v = 0; v <= s.y_most + s.y_step / 2; v += s.y_step) {
    out += fmt::format(R"svg(<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>)svg", v > 0 ? "grid" : "axis", kLeft,
                       kWidth - kRight, s.y(v), s.y(v));
    out += fmt::format(R"svg(<text x="{}" y="{:.1f}" text-anchor="end">{}</text>)svg", kLeft - 8, s.y(v) + 4, number(v));
  }
  for (double v : s.x_ticks()) {
    out += fmt::format(R"svg(<line class="axis" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>)svg", s.x(v), bottom, bottom + 4);
    out += fmt::format(R"svg(<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>)svg", s.x(v), bottom + 16, number(v));
  }
  out += fmt::format(R"svg(<text x="{}" y="10">{}</text>)svg", kLeft, escaped(c.y_unit));
  return out + fmt::format(R"svg(<text x="{}" y="10" text-anchor="end">{}</text>)svg", kWidth - kRight, escaped(c.x_unit));
}

std::string drawn(const Series& series, const Scales& s) {
  if (series.points.empty()) return "";
  std::string d, dots;
  for (size_t i = 0; i < series.points.size(); ++i) {
    const double x = s.x(series.points[i].first), y = s.y(series.points[i].second);
    if (i > 0 && series.stairs) d += fmt::format("H{:.1f}", x);
    d += fmt::format("{}{:.1f} {:.1f}", i > 0 ? 'L' : 'M', x, y);
    if (series.dots) dots += fmt::format(R"svg(<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="var(--{})"/>)svg", x, y, series.color);
  }
  std::string out;
  if (series.filled)
    out += fmt::format(R"svg(<path d="{}L{:.1f} {:.1f}L{:.1f} {:.1f}Z" fill="var(--{})" opacity=".14"/>)svg", d,
                       s.x(series.points.back().first), s.y(0), s.x(series.points.front().first), s.y(0), series.color);
  return out + fmt::format(R"svg(<path class="line" d="{}" stroke="var(--{})"/>)svg", d, series.color) + dots;
}

}  // namespace

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string figure(const Chart& c) {
  const Scales s(c);
  std::string out = "<figure><figcaption>" + escaped(c.title);
  for (const Series& series : c.series)
    out += fmt::format(R"svg(<span style="--c:var(--{})">{}</span>)svg", series.color, escaped(series.name));
  out += fmt::format(R"svg(</figcaption><svg viewBox="0 0 {} {}" role="img">)svg", kWidth, c.height) + axes(c, s);
  for (const Series& series : c.series) out += drawn(series, s);
  double last = -100;
  for (const Mark& m : c.marks) {
    const double x = s.x(m.x);
    out += fmt::format(R"svg(<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>)svg", x, kTop - 2, c.height - kBottom);
    if (x - last < 44) continue;
    out += fmt::format(R"svg(<text x="{:.1f}" y="{}">{}</text>)svg", x + 3, kTop + 8, escaped(m.label));
    last = x;
  }
  return out + "</svg></figure>\n";
}

std::string page(const std::string& title, const std::string& body) {
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, "
      "initial-scale=1\">"
      "<title>{}</title><link rel=\"icon\" href=\"data:,\"><style>{}</style></head>\n<body><main>\n{}</main></body></html>\n",
      escaped(title), kStyle, body);
}

}  // namespace moebius_examples
