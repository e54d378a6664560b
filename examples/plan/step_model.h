// Seconds of a step: a roofline for every product (bytes over memory rate or operations over matrix rate, whichever is more), the exchanges of
// the layout, and a launch for each kernel. What a step holds is the engine's StepPlan, or an even load of so many requests.
#pragma once

#include <vector>

#include "examples/plan/cluster.h"
#include "examples/plan/model.h"
#include "examples/plan/routing.h"
#include "lib/runtime/step_costs.h"
#include "lib/runtime/step_plan.h"

namespace moebius::plan {

// Of the requests of one home, or of all: what the engine's curves see, and what kernels need besides.
struct Work : StepLoad {
  double logit_rows = 0;
  double window_kv_tokens = 0, window_attended = 0;  // in a layer that sees a window
  Work& operator+=(const Work& o);
};
Work operator*(double n, const Work& w);
using StepWork = std::vector<Work>;  // [homes]; what layouts divide differently

struct StepSeconds {
  double attention = 0, experts = 0, exchange = 0, head = 0, launches = 0;
  double total() const { return attention + experts + exchange + head + launches; }
};

class StepModel {
 public:
  StepModel(const Model& model, const Cluster& cluster, int ranks, int slices_per_expert, const Routing& routing);

  StepSeconds step(Layout layout, const StepWork& work) const;
  double seconds(Layout layout, const StepWork& work) const { return step(layout, work).total(); }

  // So many requests on homes as even as can be: each decodes a token after `context` others, or goes on with a prompt of which `first` are done.
  StepWork decode(double requests, double context) const { return evenly(requests, context, 1); }
  StepWork prompts(double requests, double tokens, double first) const { return evenly(requests, first, tokens); }
  StepWork prefill(double first, double tokens) const;  // of one prompt, after so many
  // Of a plan before it is committed: sequences have `computed` tokens. In pure TP nobody has a home; dealt: as if homes had been given in turn.
  StepWork of(const StepPlan& plan, bool dealt) const;

  const Cluster& cluster() const { return cluster_; }
  int ranks() const { return ranks_; }

 private:
  StepWork evenly(double requests, double first, double rows) const;
  void add_rows(Work& work, double first, double rows) const;
  double product(double bytes, double products) const;
  double attention(const Work& work, double heads_share, double keys_share, bool windowed) const;
  StepSeconds layer(Layout layout, bool sparse, bool windowed, const Work& all, const Work& most) const;

  Model model_;
  Cluster cluster_;
  int ranks_;
  const Routing& routing_;
  Exchanges exchanges_;
  double heads_share_ = 1, keys_share_ = 1, cuts_share_ = 1;  // of the fullest rank in TP
  int window_ = 0;
  int layers_[2][2] = {};  // [sparse][windowed]
};

}  // namespace moebius::plan
