// Charts as SVG: no script, no network, light and dark. For pages that the programs write.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace moebius_examples {

struct Series {
  std::string name, color;  // "tp", "ep", "good", "second", "bad": of the page's palette
  std::vector<std::pair<double, double>> points;
  bool stairs = false, filled = false, dots = false;
};

struct Mark {
  double x = 0;
  std::string label;
};

struct Chart {
  std::string title, x_unit, y_unit;
  std::vector<Series> series;
  std::vector<Mark> marks;  // upright lines
  bool log_x = false;       // x in powers of two
  double y_most = 0;        // 0: the largest value
  int height = 170;
};

// A <figure> for a page.
std::string figure(const Chart& chart);
// A whole page around what is between its <main> tags.
std::string page(const std::string& title, const std::string& body);
// Text for HTML.
std::string escaped(const std::string& text);

}  // namespace moebius_examples
