#include "examples/bench/profile.h"

#include <array>
#include <atomic>
#include <chrono>

namespace moebius::bench {
namespace {

constexpr std::array<const char*, 9> kNames = {"embed",        "add_norm", "linear",          "rope_store",  "attention",
                                               "exact_linear", "route",    "experts_gate_up", "experts_down"};
const Ops* base_ops = nullptr;
std::array<std::atomic<int64_t>, kNames.size()> nanoseconds{};

// The member of Ops number I, as a function that calls the base's and adds its time.
template <size_t I, auto Member, class Args>
void timed(const Args& args, const Lane& lane) {
  const auto begin = std::chrono::steady_clock::now();
  (base_ops->*Member)(args, lane);
  nanoseconds[I].fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count(),
                           std::memory_order_relaxed);
}

}  // namespace

const Ops& profiled(const Ops& base) {
  static Ops table;
  base_ops = &base;
  table = base;
  table.embed = timed<0, &Ops::embed, EmbedArgs>;
  table.add_norm = timed<1, &Ops::add_norm, AddNormArgs>;
  table.linear = timed<2, &Ops::linear, LinearArgs>;
  table.rope_store = timed<3, &Ops::rope_store, RopeStoreArgs>;
  table.attention = timed<4, &Ops::attention, AttentionArgs>;
  table.exact_linear = timed<5, &Ops::exact_linear, ExactLinearArgs>;
  table.route = timed<6, &Ops::route, RouteArgs>;
  table.experts_gate_up = timed<7, &Ops::experts_gate_up, ExpertsArgs>;
  table.experts_down = timed<8, &Ops::experts_down, ExpertsArgs>;
  return table;
}

void reset_profile() {
  for (auto& n : nanoseconds) n = 0;
}

std::vector<OpTime> profile() {
  std::vector<OpTime> out;
  for (size_t i = 0; i < kNames.size(); ++i) out.push_back({kNames[i], static_cast<double>(nanoseconds[i]) * 1e-9});
  return out;
}

}  // namespace moebius::bench
