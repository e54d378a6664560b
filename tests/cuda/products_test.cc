#include <bit>
#include <cmath>
#include <string_view>
#include <tuple>

#include "lib/tensor/packed.h"
#include "tests/cuda/harness.h"

namespace moebius {
namespace {

// A packed matrix and its plain values [n][k].
struct Matrix {
  Matrix(Random& random, int64_t n, int64_t k, float scale) : form{n, k}, plain(static_cast<size_t>(n * k)), packed(static_cast<size_t>(form.elements()), 0) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const bf16 v = to_bf16(scale * random.normal());
        plain[static_cast<size_t>(i * k + j)] = v;
        packed[static_cast<size_t>(form.index(i, j))] = v;
      }
  }
  float at(int64_t i, int64_t j) const { return to_float(plain[static_cast<size_t>(i * form.k + j)]); }
  PackedMatrix form;
  std::vector<bf16> plain, packed;
};


// The sums of mode fast: floats in the same memory.
std::vector<float> as_floats(const std::vector<int64_t>& sums) {
  std::vector<float> out(sums.size());
  std::memcpy(out.data(), sums.data(), sums.size() * sizeof(float));
  return out;
}

// The products of float sums of k terms: error ≤ k · 2^−24 · Σ|terms| in any order (a tensor core's internal sums may drop bits: twice that).
double bound(int64_t k, double sum_of_sizes) { return 2.0 * static_cast<double>(k) * 0x1p-24 * sum_of_sizes; }

}  // namespace

TEST_CASE("linear: every shape against the plain product, and a row's bits do not depend on the others") {
  Random random(1);
  for (const auto& [k, sizes] : std::vector<std::pair<int64_t, std::vector<int64_t>>>{
           {64, {16}}, {72, {16, 40, 1}}, {100, {33}}, {2, {5}}, {256, {17, 64}}, {30, {32, 32, 32}}}) {
    constexpr int kMostRows = 130;
    std::vector<Matrix> matrices;
    for (int64_t n : sizes) matrices.emplace_back(random, n, k, 1.0f);
    const std::vector<bf16> x = random.bf16s(static_cast<size_t>(kMostRows * k));
    const Array<bf16> there(x);
    std::vector<Array<bf16>> weights;
    for (const Matrix& m : matrices) weights.emplace_back(m.packed);
    Lanes lanes({kMostRows, k, 16, 1, 1, 1});
    const auto run = [&](Range rows) {
      std::vector<Array<float>> y;
      std::vector<LinearPart> parts;
      for (size_t p = 0; p < matrices.size(); ++p) {
        const int64_t ldy = matrices[p].form.n + 3;
        y.emplace_back(static_cast<size_t>(kMostRows * ldy));
        parts.push_back({weights[p].get(), matrices[p].form.n, y.back().get(), ldy});
      }
      test_device().ops().linear({rows, there.get(), k, k, static_cast<int>(parts.size()), parts.data()}, lanes.device);
      std::vector<std::vector<float>> out;
      for (const Array<float>& a : y) out.push_back(a.values());
      return out;
    };
    const auto all = run({0, kMostRows});
    for (size_t p = 0; p < matrices.size(); ++p) {
      const Matrix& m = matrices[p];
      const int64_t ldy = m.form.n + 3;
      for (int64_t r = 0; r < kMostRows; r += 7)
        for (int64_t n = 0; n < m.form.n; ++n) {
          double sum = 0, size = 0;
          for (int64_t i = 0; i < k; ++i) {
            const double term = static_cast<double>(m.at(n, i)) * to_float(x[static_cast<size_t>(r * k + i)]);
            sum += term, size += std::fabs(term);
          }
          REQUIRE(std::fabs(all[p][static_cast<size_t>(r * ldy + n)] - sum) <= bound(k, size));
        }
    }
    for (const Range rows : {Range{5, 6}, Range{0, 8}, Range{3, 12}, Range{100, 116}, Range{7, 39}, Range{1, 66}, Range{0, 0}}) {
      const auto some = run(rows);
      for (size_t p = 0; p < matrices.size(); ++p) {
        const int64_t n = matrices[p].form.n, ldy = n + 3;
        for (int64_t r = 0; r < kMostRows; ++r) {
          const bool in = r >= rows.begin && r < rows.end;
          for (int64_t i = 0; i < ldy; ++i) {
            const float v = some[p][static_cast<size_t>(r * ldy + i)];
            if (in && i < n) REQUIRE(v == all[p][static_cast<size_t>(r * ldy + i)]);
            else REQUIRE(std::isnan(v));  // untouched
          }
        }
      }
    }
  }
}

TEST_CASE("norm_linear: the bits of add_norm and linear one after the other, of one row and of several, of rows of any length") {
  Random random(13);
  for (const int64_t k : {8, 64, 104, 2048, 2056, 4096, 4104, 70})
    for (const bool plain : {false, true}) {
      constexpr int kRows = 5, kParts = 3;
      const NormThere norm(random, kRows, k, plain);
      std::vector<Array<bf16>> weights;
      const int64_t sizes[kParts] = {48, 16, 33};
      Lanes lanes({kRows, k, 16, 1, 1, 1});
      // Weights that bring the norm of row 3 to where bf16 rounds up or down: the last bit of the sum of squares shows.
      test_device().ops().add_norm(norm.args({3, 4}), lanes.device);
      std::vector<float> sharp = norm.weight.values();
      const std::vector<float> normed = norm.x_float.values();
      for (int64_t i = 0; i < k; ++i) {
        const float v = normed[static_cast<size_t>(3 * k + i)];
        sharp[static_cast<size_t>(i)] *= std::bit_cast<float>((std::bit_cast<uint32_t>(v) & 0xffff0000) | 0x8000) / v;
      }
      const Array<float> sharp_there(sharp);
      for (const int64_t n : sizes) weights.emplace_back(Matrix(random, n, k, 1.0f).packed);
      for (const Range rows : {Range{0, kRows}, Range{3, 4}, Range{2, 3}, Range{1, 3}, Range{1, 1}}) {
        INFO("hidden " << k << ", rows " << rows.begin << " to " << rows.end << ", plain " << plain);
        const auto run = [&](bool together, bool sums) {
          std::vector<Array<float>> y;
          std::vector<LinearPart> parts;
          for (size_t p = 0; p < kParts; ++p) {
            y.emplace_back(static_cast<size_t>(kRows * sizes[p]));
            parts.push_back({weights[p].get(), sizes[p], y.back().get(), sizes[p]});
          }
          const Array<float> h_out(norm.h.size());
          const Array<bf16> x(norm.h.size());
          NormLinearArgs args{norm.args(rows), {rows, x.get(), k, k, kParts, parts.data(), false, plain}};
          args.norm.h_out = h_out.get();
          args.norm.x = x.get();
          args.norm.x_float = nullptr;
          args.norm.weight = sharp_there.get();
          if (!sums) args.norm.num_partials = 0;
          const Ops& ops = test_device().ops();
          if (together) {
            ops.norm_linear(args, lanes.device);
          } else {
            ops.add_norm(args.norm, lanes.device);
            ops.linear(args.linear, lanes.device);
          }
          std::vector<std::vector<float>> out{h_out.values()};
          for (const Array<float>& a : y) out.push_back(a.values());
          return out;
        };
        for (const bool sums : {true, false}) {
          const auto together = run(true, sums), apart = run(false, sums);
          for (size_t i = 0; i < together.size(); ++i) REQUIRE(same_bytes(together[i], apart[i]));
          for (int64_t i = rows.begin * k; i < rows.end * k; ++i) REQUIRE(std::isnan(apart[0][static_cast<size_t>(i)]) == (!sums || i / k == 2));  // 2: flagged
        }
      }
    }
}

TEST_CASE("row-major weights: against the plain sum, rows and columns beside them untouched") {
  Random random(9);
  constexpr int64_t kHidden = 96, kColumns = 80, kRows = 33, kStride = 96;
  const std::vector<bf16> w = random.bf16s(kColumns * kHidden), x = random.bf16s(kRows * kHidden);
  const Array<bf16> w_there(w), x_there(x);
  OpLimits limits{kRows, kHidden, 16, 1, 1, 1};
  limits.row_major = true;
  Lanes lanes(limits);
  for (const Range rows : {Range{0, kRows}, Range{4, 5}, Range{8, 24}}) {
    const Array<float> y(kRows * kStride);
    const LinearPart part{w_there.get(), kColumns, y.get(), kStride};
    LinearArgs args;
    args.rows = rows;
    args.x = x_there.get();
    args.ldx = args.k = kHidden;
    args.num_parts = 1;
    args.parts = &part;
    args.row_major = true;
    test_device().ops().linear(args, lanes.device);
    const std::vector<float> got = y.values();
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t n = 0; n < kStride; ++n) {
        const float v = got[static_cast<size_t>(r * kStride + n)];
        if (r < rows.begin || r >= rows.end || n >= kColumns) {
          REQUIRE(std::isnan(v));
          continue;
        }
        double sum = 0, size = 0;
        for (int64_t i = 0; i < kHidden; ++i) {
          const double term = static_cast<double>(to_float(w[static_cast<size_t>(n * kHidden + i)])) * to_float(x[static_cast<size_t>(r * kHidden + i)]);
          sum += term, size += std::fabs(term);
        }
        REQUIRE(std::fabs(v - sum) <= bound(kHidden, size));
      }
  }
}

TEST_CASE("the O projection's sums are the integers of each group's contributions") {
  Random random(2);
  constexpr int64_t kHidden = 72;
  const int64_t rows = kEmulated ? 70 : 11000;  // so many units that a warp has one by itself; elsewhere that is the case from 4 on
  for (const int64_t k : {16, 40, 64}) {
    constexpr int kGroups = 3;
    std::vector<Matrix> groups;
    std::vector<Array<bf16>> weights;
    for (int g = 0; g < kGroups; ++g) groups.emplace_back(random, kHidden, k, 0.5f), weights.emplace_back(groups.back().packed);
    std::vector<bf16> x = random.bf16s(static_cast<size_t>(rows * k * kGroups));
    x[static_cast<size_t>(9 * k * kGroups)] = to_bf16(3e37f);           // too large a contribution
    x[static_cast<size_t>(20 * k * kGroups + 1)] = 0x7fc0;              // NaN
    const Array<bf16> there(x);
    Lanes lanes({rows, kHidden, 16, 1, 1, 1});
    std::vector<ExactLinearPart> parts;
    for (int g = 0; g < kGroups; ++g) parts.push_back({weights[static_cast<size_t>(g)].get(), g * k});
    const auto run = [&](Range some, std::vector<uint8_t>& flags, bool plain = false) {
      const Array<int64_t> sum(static_cast<size_t>(rows * kHidden));
      const Array<uint8_t> flags_there(std::vector<uint8_t>(static_cast<size_t>(rows), 0));
      test_device().ops().exact_linear({some, there.get(), k * kGroups, kHidden, k, kGroups, parts.data(), {sum.get(), flags_there.get(), 0x1p28f, 0x1p60f, plain}},
                                       lanes.device);
      flags = flags_there.values();
      return sum.values();
    };
    std::vector<uint8_t> flags, some_flags;
    const std::vector<float> plain = as_floats(run({0, rows}, flags, true));
    CHECK(std::count(flags.begin(), flags.end(), 0) == rows);
    CHECK(std::isnan(plain[static_cast<size_t>(20 * kHidden)]));
    const std::vector<int64_t> all = run({0, rows}, flags);
    for (int64_t r = 0; r < rows; ++r) {
      if (r >= 70 && r % 97 != 0) continue;
      CHECK(flags[static_cast<size_t>(r)] == (r == 9 || r == 20));
      if (flags[static_cast<size_t>(r)] != 0) continue;
      for (int64_t h = 0; h < kHidden; ++h) {
        double sum = 0, size = 0;
        for (int g = 0; g < kGroups; ++g)
          for (int64_t i = 0; i < k; ++i) {
            const double term = static_cast<double>(groups[static_cast<size_t>(g)].at(h, i)) * to_float(x[static_cast<size_t>((r * kGroups + g) * k + i)]);
            sum += term, size += std::fabs(term);
          }
        REQUIRE(std::fabs(static_cast<double>(all[static_cast<size_t>(r * kHidden + h)]) * 0x1p-28 - sum) <= bound(k, size) + kGroups * 0x1p-28);
        REQUIRE(std::fabs(plain[static_cast<size_t>(r * kHidden + h)] - sum) <= bound(k, size) + kGroups * 0x1p-24 * size);
      }
    }
    for (const Range part : {Range{4, 5}, Range{8, 21}, Range{30, 62}}) {
      const std::vector<int64_t> some = run(part, some_flags);
      for (int64_t r = part.begin; r < part.end; ++r) {
        CHECK(some_flags[static_cast<size_t>(r)] == flags[static_cast<size_t>(r)]);
        for (int64_t h = 0; h < kHidden && flags[static_cast<size_t>(r)] == 0; ++h)
          REQUIRE(some[static_cast<size_t>(r * kHidden + h)] == all[static_cast<size_t>(r * kHidden + h)]);
      }
    }
  }
}

// Where rows and outputs fill the device, in mode fast: shapes with a last block of k32 alone, tiles without a partner, rows past the last whole block.
TEST_CASE("many rows in mode fast: projections and O against the plain sum, rows and columns beside them untouched") {
  Random random(4);
  const int64_t rows = kEmulated ? 200 : 8500;  // blocks of 128 rows and 256 outputs, two a row: 4 multiprocessors, or 132
  const int64_t first = 3, last = rows - 2;
  const auto check = [&](const std::vector<float>& y, int64_t ldy, int64_t n, const auto& sum_of) {
    for (int64_t r = 0; r < rows; ++r) {
      if (r >= first && r < last && r % (rows / 25) > 1) continue;
      for (int64_t i = 0; i < ldy; ++i) {
        const float v = y[static_cast<size_t>(r * ldy + i)];
        if (r < first || r >= last || i >= n) {
          REQUIRE(std::isnan(v));
          continue;
        }
        const auto [sum, size, k] = sum_of(r, i);
        REQUIRE(std::fabs(v - sum) <= bound(k, size));
      }
    }
  };
  for (const int64_t k : {32, 96, 128, 544}) {
    const std::vector<bf16> x = random.bf16s(static_cast<size_t>(rows * k));
    const Array<bf16> there(x);
    Lanes lanes({rows, k, 16, 1, 1, 1});
    std::vector<Matrix> matrices;
    std::vector<Array<bf16>> weights;
    std::vector<Array<float>> y;
    std::vector<LinearPart> parts;
    for (const int64_t n : {96, 272, 17}) {
      matrices.emplace_back(random, n, k, 1.0f);
      weights.emplace_back(matrices.back().packed);
      y.emplace_back(static_cast<size_t>(rows * (n + 3)));
      parts.push_back({weights.back().get(), n, y.back().get(), n + 3});
    }
    LinearArgs args{{first, last}, there.get(), k, k, static_cast<int>(parts.size()), parts.data()};
    args.plain = true;
    test_device().ops().linear(args, lanes.device);
    for (size_t p = 0; p < parts.size(); ++p)
      check(y[p].values(), parts[p].ldy, parts[p].n, [&](int64_t r, int64_t n) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < k; ++i) {
          const double term = static_cast<double>(matrices[p].at(n, i)) * to_float(x[static_cast<size_t>(r * k + i)]);
          sum += term, size += std::fabs(term);
        }
        return std::tuple(sum, size, k);
      });
    // Mode exact takes the same way for so many rows as for one.
    args.plain = false;
    test_device().ops().linear(args, lanes.device);
    const std::vector<float> all = y[1].values();
    args.rows = {first + 4, first + 5};
    y[1] = Array<float>(all.size());
    parts[1].y = y[1].get();
    test_device().ops().linear(args, lanes.device);
    const std::vector<float> one = y[1].values();
    for (int64_t i = 0; i < parts[1].n; ++i) {
      const auto at = static_cast<size_t>((first + 4) * parts[1].ldy + i);
      REQUIRE(one[at] == all[at]);
    }
  }
  constexpr int64_t kHidden = 280;
  constexpr int kGroups = 3;
  for (const int64_t k : {32, 96}) {
    std::vector<Matrix> groups;
    std::vector<Array<bf16>> weights;
    std::vector<ExactLinearPart> parts;
    for (int g = 0; g < kGroups; ++g) {
      groups.emplace_back(random, kHidden, k, 0.5f);
      weights.emplace_back(groups.back().packed);
      parts.push_back({weights.back().get(), g * k});
    }
    const std::vector<bf16> x = random.bf16s(static_cast<size_t>(rows * k * kGroups));
    const Array<bf16> there(x);
    const Array<float> sum(static_cast<size_t>(rows * kHidden));
    const Array<uint8_t> flags(std::vector<uint8_t>(static_cast<size_t>(rows), 0));
    Lanes lanes({rows, kHidden, 16, 1, 1, 1});
    test_device().ops().exact_linear({{first, last}, there.get(), k * kGroups, kHidden, k, kGroups, parts.data(),
                                      {reinterpret_cast<int64_t*>(sum.get()), flags.get(), 0x1p28f, 0x1p60f, true}}, lanes.device);
    check(sum.values(), kHidden, kHidden, [&](int64_t r, int64_t n) {
      double total = 0, size = 0;
      for (int g = 0; g < kGroups; ++g)
        for (int64_t i = 0; i < k; ++i) {
          const double term = static_cast<double>(groups[static_cast<size_t>(g)].at(n, i)) *
                              to_float(x[static_cast<size_t>(r * k * kGroups + parts[static_cast<size_t>(g)].column + i)]);
          total += term, size += std::fabs(term);
        }
      return std::tuple(total, size, kGroups * k);
    });
  }
}

TEST_CASE("experts: against the plain sum, one hot expert, empty ones, and a row's bits do not depend on the others") {
  Random random(3);
  struct Shape {
    int64_t hidden, neurons;
    int cuts, experts, rows;
  };
  // The last has experts of many rows, and enough of them, which mode fast multiplies in another way.
  for (const Shape& s : {Shape{64, 16, 2, 4, 20}, Shape{72, 24, 1, 5, 75}, Shape{100, 64, 2, 3, 150}, Shape{64, 16, 1, 6, 100}, Shape{64, 16, 2, 10, 75},
                         Shape{96, 32, 1, 3, 49}, Shape{320, 96, 3, 4, kEmulated ? 200 : 4300}}) {
    const bool wide = s.hidden == 320;
    const MlpCut cut{s.neurons, s.hidden};
    std::vector<Matrix> gate, up, down;
    std::vector<Array<bf16>> slices;
    std::vector<const bf16*> pointers;
    for (int i = 0; i < s.experts * s.cuts; ++i) {
      gate.emplace_back(random, s.neurons, s.hidden, 0.2f);
      up.emplace_back(random, s.neurons, s.hidden, 0.2f);
      down.emplace_back(random, s.hidden, s.neurons, 0.2f);
      std::vector<bf16> packed(static_cast<size_t>(cut.bytes() / 2), 0);
      for (int64_t n = 0; n < s.neurons; ++n)
        for (int64_t k = 0; k < s.hidden; ++k) {
          packed[static_cast<size_t>(cut.gate_index(n, k))] = to_bf16(gate.back().at(n, k));
          packed[static_cast<size_t>(cut.up_index(n, k))] = to_bf16(up.back().at(n, k));
          packed[static_cast<size_t>(cut.gate_up_elements() + cut.down().index(k, n))] = to_bf16(down.back().at(k, n));
        }
      slices.emplace_back(packed);
      pointers.push_back(slices.back().get());
    }
    const Array<const bf16*> cuts(pointers);
    const std::vector<bf16> x = random.bf16s(static_cast<size_t>(s.rows * s.hidden));
    const Array<bf16> x_there(x);
    // Every row chooses expert 0; some choose others too; the last expert has none.
    std::vector<std::vector<std::pair<int, float>>> chosen(static_cast<size_t>(s.experts));
    for (int r = 0; r < s.rows; ++r) {
      chosen[0].emplace_back(r, 0.6f);
      if (s.experts > 2) chosen[static_cast<size_t>(1 + r % (s.experts - 2))].emplace_back(r, 0.4f);
    }
    Lanes lanes({s.rows, s.hidden, 16, 1, s.experts, 2});
    const auto run = [&](Range rows, bool plain = false) {
      std::vector<int32_t> begins{0}, pair_rows;
      std::vector<float> pair_weights;
      for (const auto& of_expert : chosen) {
        for (const auto& [row, weight] : of_expert)
          if (row >= rows.begin && row < rows.end) pair_rows.push_back(row), pair_weights.push_back(weight);
        begins.push_back(static_cast<int32_t>(pair_rows.size()));
      }
      const Array<int32_t> begins_there(begins), rows_there(pair_rows);
      const Array<float> weights_there(pair_weights);
      const Array<bf16> act(pair_rows.size() * static_cast<size_t>(s.cuts * cut.padded()));
      const Array<int64_t> sum(static_cast<size_t>(s.rows * s.hidden));
      const Array<uint8_t> flags(std::vector<uint8_t>(static_cast<size_t>(s.rows), 0));
      ExpertsArgs args;
      args.hidden = s.hidden;
      args.neurons_per_cut = s.neurons;
      args.num_cuts = s.cuts;
      args.num_experts = s.experts;
      args.begins = begins_there.get();
      args.cuts = cuts.get();
      args.max_pairs = rows.size() * 2;
      args.pair_rows = rows_there.get();
      args.pair_weights = weights_there.get();
      args.x = x_there.get();
      args.act = act.get();
      args.rows = rows;
      args.out = {sum.get(), flags.get(), 0x1p28f, 0x1p58f, plain};
      test_device().ops().experts_gate_up(args, lanes.device);
      test_device().ops().experts_down(args, lanes.device);
      for (uint8_t f : flags.values()) REQUIRE(f == 0);
      return sum.values();
    };
    const std::vector<int64_t> all = run({0, s.rows});
    const std::vector<float> plain = as_floats(run({0, s.rows}, true));
    for (int r = 0; r < s.rows; r += 3) {
      std::vector<double> exact(static_cast<size_t>(s.hidden), 0), size(exact);
      for (int e = 0; e < s.experts; ++e)
        for (const auto& [row, weight] : chosen[static_cast<size_t>(e)]) {
          if (row != r) continue;
          for (int c = 0; c < s.cuts; ++c) {
            const auto i = static_cast<size_t>(e * s.cuts + c);
            for (int64_t n = 0; n < s.neurons; ++n) {
              double g = 0, u = 0;
              for (int64_t k = 0; k < s.hidden; ++k) {
                const double v = to_float(x[static_cast<size_t>(r * s.hidden + k)]);
                g += gate[i].at(n, k) * v, u += up[i].at(n, k) * v;
              }
              const double act = g / (1 + std::exp(-g)) * u;
              for (int64_t h = 0; h < s.hidden; ++h) {
                const double term = weight * act * down[i].at(h, n);
                exact[static_cast<size_t>(h)] += term, size[static_cast<size_t>(h)] += std::fabs(term);
              }
            }
          }
        }
      // The activations are rounded to bf16: 2^−9 of each term, twice that with what gate and up lose before.
      for (int64_t h = 0; h < s.hidden; ++h) {
        const double fixed = static_cast<double>(all[static_cast<size_t>(r * s.hidden + h)]) * 0x1p-28;
        REQUIRE(std::fabs(fixed - exact[static_cast<size_t>(h)]) <= 0x1p-8 * size[static_cast<size_t>(h)] + 0x1p-20);
        // The same contributions: six sums in float are apart from it. In another order along k an activation may be rounded the other way.
        const double apart = wide ? 0x1p-8 : 6 * 0x1p-24;
        REQUIRE(std::fabs(plain[static_cast<size_t>(r * s.hidden + h)] - fixed) <= apart * size[static_cast<size_t>(h)] + 6 * 0x1p-28);
      }
    }
    for (const Range rows : {Range{5, 6}, Range{0, 8}, Range{2, 19}, Range{3, std::min(s.rows, 40)}}) {
      const std::vector<int64_t> some = run(rows);
      for (int64_t r = rows.begin; r < rows.end; ++r)
        for (int64_t h = 0; h < s.hidden; ++h) REQUIRE(some[static_cast<size_t>(r * s.hidden + h)] == all[static_cast<size_t>(r * s.hidden + h)]);
    }
  }
}

}  // namespace moebius
