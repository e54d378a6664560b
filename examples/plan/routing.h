// How evenly rows hit experts: drawn, not assumed. An expert's weight in a layer is log-normal; a row takes top_k experts without putting
// back. What a step needs of it, by the number of rows: experts that any row reaches, and of the ranks of EP the fullest one's.
#pragma once

#include <cstdint>
#include <vector>

namespace moebius::plan {

struct Reached {
  double experts = 0;       // of all
  double busiest = 0;       // on the rank with most of them
  double busiest_rows = 0;  // (row, expert) pairs on the rank with most of these
};

class Routing {
 public:
  // skew: standard deviation of the logarithm of the weights; 0: all alike. Owners as in EP: expert e is with rank ⌊e·P/E⌋.
  Routing(int experts, int top_k, int ranks, double skew, uint64_t seed = 1);
  Reached at(double rows) const;

 private:
  std::vector<Reached> at_power_;  // [log2 rows]
};

}  // namespace moebius::plan
