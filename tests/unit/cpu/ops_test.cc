// Every op on every path this machine has: against a slow reference in double, and against itself, bit for bit, whatever the
// number of rows, lanes, page size or chunking.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "lib/cpu/cpu_ops.h"
#include "lib/tensor/packed.h"
#include "tests/catch.h"

namespace moebius {

namespace plain_matrix { const Ops& ops(); }

namespace {

// The machine's, and that of matrix registers without them (plain_matrix.cc).
std::vector<const Ops*> paths() {
  std::vector<const Ops*> out;
  for (const Isa isa : available_isas()) out.push_back(&cpu_ops(isa));
  out.push_back(&plain_matrix::ops());
  return out;
}

// Under a sanitizer the largest sizes, whose slow references take nearly all of the time, are left to one path.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAllSizes = false;
#else
constexpr bool kAllSizes = true;
#endif

struct Random {
  std::mt19937 engine{12345};
  float normal() { return std::normal_distribution<float>()(engine); }
  std::vector<bf16> bf16s(int64_t n, float scale = 1) {
    std::vector<bf16> v(static_cast<size_t>(n));
    for (bf16& x : v) x = to_bf16(normal() * scale);
    return v;
  }
  std::vector<float> floats(int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = normal();
    return v;
  }
};

// w[n][k] row-major → packed, padding zero.
std::vector<bf16> pack(const std::vector<bf16>& w, int64_t n, int64_t k) {
  const PackedMatrix m{n, k};
  std::vector<bf16> out(static_cast<size_t>(m.elements()), 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) out[static_cast<size_t>(m.index(i, j))] = w[static_cast<size_t>(i * k + j)];
  return out;
}

constexpr float kPoison = -12345.0f;

template <class Op, class Args>
void on_lanes(const Op& op, const Args& args, int lanes, std::vector<std::byte>& scratch) {
  for (int t = 0; t < lanes; ++t) op(args, Lane{t, lanes, scratch.data()});
}

std::vector<std::byte> scratch_for(const Ops& ops, const OpLimits& limits = {64, 4096, 256, 16, 256}) {
  return std::vector<std::byte>(ops.scratch_bytes(limits), std::byte{0xff});
}

bool same(const std::vector<float>& a, const std::vector<float>& b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0; }

}  // namespace

TEST_CASE("linear is right for odd sizes, and the same bits for any rows and lanes") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    Random random;
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{16, 32}, {17, 96}, {48, 100}, {389, 128}, {1, 2}}) {
      const int64_t rows = 40;
      auto scratch = scratch_for(ops, {rows, k, 2, 1, 1});
      const auto w = random.bf16s(n * k), x = random.bf16s(rows * k), packed = pack(w, n, k);
      const auto run = [&](Range range, int lanes) {
        std::vector<float> y(static_cast<size_t>(rows * n), kPoison);
        const LinearPart part{packed.data(), n, y.data(), n};
        LinearArgs args;
        args.rows = range;
        args.x = x.data();
        args.ldx = args.k = k;
        args.num_parts = 1;
        args.parts = &part;
        on_lanes(ops.linear, args, lanes, scratch);
        return y;
      };
      const auto y = run({0, rows}, 1);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; ++i) {
          double exact = 0, size = 0;
          for (int64_t j = 0; j < k; ++j) {
            const double p = static_cast<double>(to_float(w[static_cast<size_t>(i * k + j)])) * to_float(x[static_cast<size_t>(r * k + j)]);
            exact += p, size += std::fabs(p);
          }
          REQUIRE(std::fabs(y[static_cast<size_t>(r * n + i)] - exact) <= size * static_cast<double>(k) * 0x1p-24 + 1e-30);
        }
      for (int lanes : {2, 3, 7}) CHECK(same(y, run({0, rows}, lanes)));
      std::vector<float> pieces(static_cast<size_t>(rows * n));
      for (int64_t at = 0, size = 1; at < rows; at += size, size = size % 13 + 1) {  // blocks of 1, 2, … 13 rows
        const Range range{at, std::min(rows, at + size)};
        const auto part = run(range, 2);
        std::copy(part.begin() + range.begin * n, part.begin() + range.end * n, pieces.begin() + range.begin * n);
      }
      CHECK(same(y, pieces));
    }
  }
}

TEST_CASE("experts are right, and the same bits for any rows, lanes and cuts' places") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    auto scratch = scratch_for(ops);
    Random random;
    for (const auto& [hidden, neurons] : {std::pair<int64_t, int64_t>{96, 20}, {128, 16}, {100, 44}, {256, 128}, {1032, 16}}) {
      if (!kAllSizes && hidden >= 256 && path != paths().front()) continue;
      const int cuts = 2, rows = hidden < 128 ? 71 : 23, experts = 3;  // of 71 more than 32 go to each expert: several blocks on every path
      const MlpCut cut{neurons, hidden};
      std::vector<std::vector<bf16>> gate, up, down, packed;
      for (int i = 0; i < experts * cuts; ++i) {
        gate.push_back(random.bf16s(neurons * hidden, 0.1f)), up.push_back(random.bf16s(neurons * hidden, 0.1f)), down.push_back(random.bf16s(hidden * neurons, 0.1f));
        packed.emplace_back(static_cast<size_t>(cut.bytes() / 2), 0);
        for (int64_t n = 0; n < neurons; ++n)
          for (int64_t k = 0; k < hidden; ++k) {
            packed[i][static_cast<size_t>(cut.gate_index(n, k))] = gate[i][static_cast<size_t>(n * hidden + k)];
            packed[i][static_cast<size_t>(cut.up_index(n, k))] = up[i][static_cast<size_t>(n * hidden + k)];
            packed[i][static_cast<size_t>(cut.gate_up_elements() + cut.down().index(k, n))] = down[i][static_cast<size_t>(k * neurons + n)];
          }
      }
      auto x = random.bf16s(rows * hidden);
      std::vector<const bf16*> pointers;
      for (const auto& p : packed) pointers.push_back(p.data());
      // Row r goes to expert r % 3 and, for some, to the next one too; expert 0 is the hot one.
      std::vector<std::vector<std::pair<int32_t, float>>> chosen(experts);
      for (int r = 0; r < rows; ++r) {
        chosen[r % experts].emplace_back(r, 0.7f);
        chosen[(r + 1) % experts].emplace_back(r, 0.3f);
      }
      const auto run = [&](Range range, int lanes, uint8_t* flags, bool plain = false) {
        std::vector<int64_t> sum(static_cast<size_t>(rows * hidden), 0x5555);
        std::vector<int32_t> begins{0}, pair_rows;
        std::vector<float> pair_weights;
        for (int e = 0; e < experts; ++e) {
          for (const auto& [row, weight] : chosen[static_cast<size_t>(e)])
            if (row >= range.begin && row < range.end) pair_rows.push_back(row), pair_weights.push_back(weight);
          begins.push_back(static_cast<int32_t>(pair_rows.size()));
        }
        std::vector<bf16> act(static_cast<size_t>(ops.act_bytes(static_cast<int64_t>(pair_rows.size()), cuts * cut.padded())) / sizeof(bf16) + 1, 0x7fc0);
        ExpertsArgs args;
        args.hidden = hidden;
        args.neurons_per_cut = neurons;
        args.num_cuts = cuts;
        args.num_experts = experts;
        args.begins = begins.data();
        args.cuts = pointers.data();
        args.max_pairs = static_cast<int64_t>(pair_rows.size());
        args.pair_rows = pair_rows.data();
        args.pair_weights = pair_weights.data();
        args.x = x.data();
        args.act = act.data();
        args.rows = range;
        args.out = {sum.data(), flags, 0x1p28f, 0x1p50f, plain};
        on_lanes(ops.experts_gate_up, args, lanes, scratch);
        on_lanes(ops.experts_down, args, lanes, scratch);
        return sum;
      };
      std::vector<uint8_t> flags(rows, 0);
      const auto sum = run({0, rows}, 1, flags.data());
      CHECK(std::count(flags.begin(), flags.end(), 0) == rows);
      const auto plain = run({0, rows}, 3, flags.data(), true);  // floats
      const auto plain_at = [&](int64_t i) {
        float v;
        std::memcpy(&v, reinterpret_cast<const char*>(plain.data()) + i * int64_t{sizeof(v)}, sizeof(v));
        return static_cast<double>(v);
      };
      for (int r = 0; r < rows; ++r)
        for (int64_t h = 0; h < hidden; h += 17) {
          double exact = 0, size = 0;
          for (int e = 0; e < experts; ++e)
            for (const auto& [row, weight] : chosen[static_cast<size_t>(e)])
              for (int c = 0; c < cuts && row == r; ++c)
                for (int64_t n = 0; n < neurons; ++n) {
                  double g = 0, u = 0;
                  const int i = e * cuts + c;
                  for (int64_t k = 0; k < hidden; ++k) {
                    const double xv = to_float(x[static_cast<size_t>(r * hidden + k)]);
                    g += to_float(gate[i][static_cast<size_t>(n * hidden + k)]) * xv;
                    u += to_float(up[i][static_cast<size_t>(n * hidden + k)]) * xv;
                  }
                  const double term = weight * to_float(down[i][static_cast<size_t>(h * neurons + n)]) * (g / (1 + std::exp(-g))) * u;
                  exact += term, size += std::fabs(term);
                }
          // act is rounded to bf16: 2^−9 relative, and the sums' float error
          REQUIRE(std::fabs(static_cast<double>(sum[static_cast<size_t>(r * hidden + h)]) * 0x1p-28 - exact) <= size * 0x1p-8 + 1e-6);
          REQUIRE(std::fabs(plain_at(r * hidden + h) - exact) <= size * 0x1p-8 + 1e-6);
        }
      for (int lanes : {2, 3, 5}) CHECK(sum == run({0, rows}, lanes, flags.data()));
      for (int r = 0; r < rows; ++r) {
        const auto alone = run({r, r + 1}, 2, flags.data());
        REQUIRE(std::equal(alone.begin() + r * hidden, alone.begin() + (r + 1) * hidden, sum.begin() + r * hidden));
      }
      for (int n : {5, 8, 12, 16}) {  // up to 11 rows an expert: one block, which walks the tiles in groups
        const auto few = run({0, n}, 2, flags.data());
        REQUIRE(std::equal(few.begin(), few.begin() + n * hidden, sum.begin()));
      }

      // Rows that leave the range are flagged, whatever the lanes; the rows beside them keep their bits.
      x[1 * hidden] = to_bf16(std::nanf("")), x[2 * hidden] = to_bf16(INFINITY), x[3 * hidden] = to_bf16(1e30f);
      for (const auto& [lanes, n] : {std::pair{1, rows}, {3, rows}, {2, 16}}) {
        std::fill(flags.begin(), flags.end(), uint8_t{0});
        const auto beside = run({0, n}, lanes, flags.data());
        for (int r = 0; r < n; ++r) {
          CHECK(flags[static_cast<size_t>(r)] == (r >= 1 && r <= 3));
          if (r < 1 || r > 3) CHECK(std::equal(beside.begin() + r * hidden, beside.begin() + (r + 1) * hidden, sum.begin() + r * hidden));
        }
      }
    }
  }
}

TEST_CASE("sums that cross slices: any order gives the same bits, and what is no number surfaces") {
  for (const Ops* path : paths())
    for (const int64_t k : {2, 40}) {
      const Ops& ops = *path;
      const int64_t hidden = 40, rows = 4;  // hidden is no multiple of the tile
      auto scratch = scratch_for(ops, {rows, 3 * k, 2, 1, 1});
      const float huge = 0x1p40f, infinity = std::numeric_limits<float>::infinity();
      // Row 0 is harmless; a contribution of row 1 is too large, of row 2 infinite, of row 3 not a number.
      std::vector<bf16> x(static_cast<size_t>(rows * 3 * k), to_bf16(1));
      x[1 * 3 * k] = to_bf16(huge), x[2 * 3 * k + k] = to_bf16(infinity), x[3 * 3 * k + 2 * k] = to_bf16(std::nanf(""));
      Random random;
      std::vector<std::vector<bf16>> parts;
      for (int p = 0; p < 3; ++p) parts.push_back(pack(random.bf16s(hidden * k), hidden, k));
      std::vector<int64_t> first;
      std::vector<uint8_t> first_flags;
      std::vector<int> order = {0, 1, 2};
      do {
        std::vector<ExactLinearPart> list;
        for (int p : order) list.push_back({parts[p].data(), p * k});
        std::vector<int64_t> sum(static_cast<size_t>(rows * hidden), 77);
        std::vector<uint8_t> flags(rows, 0);
        ExactLinearArgs args;
        args.rows = {0, rows};
        args.x = x.data();
        args.ldx = 3 * k;
        args.hidden = hidden;
        args.k = k;
        args.num_parts = 3;
        args.parts = list.data();
        args.out = {sum.data(), flags.data(), 0x1p28f, 0x1p60f, false};
        on_lanes(ops.exact_linear, args, 2, scratch);
        CHECK(flags == std::vector<uint8_t>{0, 1, 1, 1});
        if (first.empty()) first = sum, first_flags = flags;
        CHECK(sum == first);

        // Beside the others row 0 is added up lane by lane, alone it is not.
        std::vector<int64_t> alone(static_cast<size_t>(rows * hidden), 77);
        args.rows = {0, 1};
        args.out.sum = alone.data();
        on_lanes(ops.exact_linear, args, 2, scratch);
        CHECK(std::equal(alone.begin(), alone.begin() + hidden, first.begin()));
      } while (std::next_permutation(order.begin(), order.end()));

      // Conversion back: the flagged rows become NaN, the other is the sum; partial sums wrap freely.
      std::vector<int64_t> near_top(static_cast<size_t>(rows * hidden), INT64_MAX - 5), far_down(near_top.size(), INT64_MIN + 9);
      const int64_t* partials[] = {first.data(), near_top.data(), far_down.data()};
      const std::vector<uint8_t> none(rows, 0);
      const uint8_t* flag_lists[] = {first_flags.data(), none.data(), none.data()};
      std::vector<float> h(static_cast<size_t>(rows * hidden), 1.0f), weight(static_cast<size_t>(hidden), 1.0f);
      std::vector<bf16> out(h.size());
      AddNormArgs norm;
      norm.rows = {0, rows};
      norm.hidden = hidden;
      norm.h = h.data();
      norm.num_partials = 3;
      norm.partials = partials;
      norm.flags = flag_lists;
      norm.factor = 0x1p-28f;
      norm.weight = weight.data();
      norm.eps = 1e-6f;
      norm.x = out.data();
      on_lanes(ops.add_norm, norm, 2, scratch);
      for (int64_t i = 0; i < hidden; ++i) {
        CHECK(h[static_cast<size_t>(i)] == 1.0f + static_cast<float>(static_cast<double>(first[static_cast<size_t>(i)] + 3) * 0x1p-28));
        for (int64_t r = 1; r < rows; ++r) CHECK(std::isnan(h[static_cast<size_t>(r * hidden + i)]));
      }
    }
}

TEST_CASE("conversion to fixed point is to nearest even over the whole range") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    auto scratch = scratch_for(ops);
    for (float v : {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 0x1p31f, -0x1p31f, 0x1.fffffep52f, 0x1.234568p59f, -0x1.fffffep59f}) {
      std::vector<bf16> w(16 * 2, 0), x(2, 0);
      // c·scale = v exactly: v = m·2^e with m a float of 24 bits does not fit bf16, so the scale carries a power and bf16 the rest.
      const float rounded = to_float(to_bf16(v));
      w[0] = to_bf16(rounded);
      x[0] = to_bf16(1.0f);
      std::vector<int64_t> sum(16, 0);
      uint8_t flag = 0;
      const ExactLinearPart part{w.data(), 0};
      ExactLinearArgs args;
      args.rows = {0, 1};
      args.x = x.data();
      args.ldx = 2;
      args.hidden = 16;
      args.k = 2;
      args.num_parts = 1;
      args.parts = &part;
      args.out = {sum.data(), &flag, 1.0f, 0x1p62f, false};
      on_lanes(ops.exact_linear, args, 1, scratch);
      CHECK(sum[0] == static_cast<int64_t>(std::nearbyint(static_cast<double>(rounded))));
      CHECK(flag == 0);
    }
  }
}

namespace {

// A sequence of `length` tokens with random K and V in pages of `page_tokens`, spread over a pool filled with NaN.
struct PagedKv {
  PagedKv(int64_t length, int page_tokens, int dim, int kv_heads)
      : slice{page_tokens, dim}, pages(static_cast<size_t>(div_up(length, page_tokens))),
        pool(pages.size() * 3 * static_cast<size_t>(kv_heads * slice.bytes() / 2), 0x7fc0) {
    for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>((i * 2 + 1) % (pages.size() * 3));
    view = {reinterpret_cast<std::byte*>(pool.data()), kv_heads, page_tokens, dim};
    Random random;
    for (int64_t t = 0; t < length; ++t)
      for (int j = 0; j < kv_heads; ++j)
        for (int d = 0; d < dim; ++d) {
          bf16* kv = pool.data() + (pages[static_cast<size_t>(t / page_tokens)] * int64_t{kv_heads} + j) * (slice.bytes() / 2);
          keys.push_back(to_bf16(random.normal())), values.push_back(to_half(random.normal()));
          kv[slice.k_index(t % page_tokens, d)] = keys.back();
          kv[slice.v_index(t % page_tokens, d)] = values.back();
        }
  }
  KvSlice slice;
  std::vector<int32_t> pages;
  std::vector<bf16> pool, keys, values;  // keys, values: [token][head][dim]
  KvView view;
};

}  // namespace

TEST_CASE("attention is right, and the same bits for any pages, chunks and lanes, beside slots that hold NaN") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    for (const auto& [dim, heads, kv_heads] : {std::array<int, 3>{16, 4, 2}, {64, 8, 2}, {80, 3, 3}, {128, 2, 1}, {24, 26, 1}}) {
      if ((kSanitized || path == paths().back()) && dim != 24 && dim != 80) continue;  // what is slow takes blocks and tails of all kinds
      const int64_t length = 600;  // three splits
      auto scratch = scratch_for(ops, {1, 1, dim, 1, 1});
      Random random;
      const auto q = random.bf16s(length * heads * dim);
      std::vector<Range> heads_of_kv;
      for (int j = 0; j < kv_heads; ++j) heads_of_kv.push_back({j * heads / kv_heads, (j + 1) * heads / kv_heads});
      const auto run = [&](int page_tokens, const std::vector<std::pair<int, int>>& chunks, int lanes) {  // (first row, rows)
        PagedKv kv(length, page_tokens, dim, kv_heads);
        std::vector<bf16> out(q.size(), 0x7fc0);
        std::vector<SequenceChunk> list;
        for (const auto& [first, n] : chunks) list.push_back({first, n, first, kv.pages.data()});
        AttentionArgs args;
        args.num_chunks = static_cast<int>(list.size());
        args.chunks = list.data();
        args.num_heads = heads;
        args.heads_of_kv = heads_of_kv.data();
        args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim));
        args.q = q.data();
        args.value_scale = 4;
        args.out = out.data();
        args.kv = kv.view;
        on_lanes(ops.attention, args, lanes, scratch);
        return out;
      };
      const auto whole = run(16, {{0, 600}}, 1);
      const PagedKv kv(length, 16, dim, kv_heads);
      for (int64_t row : {0, 1, 15, 16, 255, 256, 257, 511, 599})
        for (int h : {0, heads - 1}) {
          const int j = h * kv_heads / heads;
          std::vector<double> p;
          double most = -1e300, sum = 0;
          for (int64_t t = 0; t <= row; ++t) {
            double s = 0;
            for (int d = 0; d < dim; ++d)
              s += static_cast<double>(to_float(q[static_cast<size_t>((row * heads + h) * dim + d)])) * to_float(kv.keys[static_cast<size_t>((t * kv_heads + j) * dim + d)]);
            p.push_back(s / std::sqrt(static_cast<double>(dim)));
            most = std::max(most, p.back());
          }
          for (double& x : p) sum += x = std::exp(x - most);
          for (int d = 0; d < dim; ++d) {
            double exact = 0, size = 0;
            for (int64_t t = 0; t <= row; ++t) {
              const double term = 0.25 * p[static_cast<size_t>(t)] / sum * half_to_float(kv.values[static_cast<size_t>((t * kv_heads + j) * dim + d)]);
              exact += term, size += std::fabs(term);
            }
            REQUIRE(std::fabs(to_float(whole[static_cast<size_t>((row * heads + h) * dim + d)]) - exact) <= std::fabs(exact) * 0x1p-8 + size * 1e-5);
          }
        }
      for (int page : {32, 64, 256, 512, 1024})
        if (!kSanitized || page == 256) CHECK(whole == run(page, {{0, 600}}, 2));
      CHECK(whole == run(16, {{0, 600}}, 3));
      CHECK(whole == run(32, {{0, 1}, {1, 6}, {7, 250}, {257, 1}, {258, 342}}, 2));
      std::vector<std::pair<int, int>> one_by_one;
      for (int i = 0; i < 600; ++i) one_by_one.emplace_back(i, 1);
      CHECK(whole == run(16, one_by_one, 4));
    }
  }
}

TEST_CASE("halves convert to nearest, ties to even, and back") {
  for (uint32_t h = 0; h < 0x7c00; ++h) {  // finite, not negative
    const float v = half_to_float(static_cast<f16>(h)), next = half_to_float(static_cast<f16>(h + 1));
    const float middle = h == 0x7bff ? 65520.0f : 0.5f * (v + next);
    for (uint32_t sign : {0u, 0x8000u}) {
      const float s = sign != 0 ? -1.0f : 1.0f;
      REQUIRE(to_half(s * v) == (h | sign));
      REQUIRE(to_half(s * middle) == ((h + (h & 1)) | sign));
      REQUIRE(to_half(s * std::nextafter(middle, 0.0f)) == (h | sign));
      REQUIRE(to_half(s * std::nextafter(middle, 1e9f)) == ((h + 1) | sign));
    }
  }
  CHECK(to_half(1e9f) == 0x7c00);
  CHECK(std::isnan(half_to_float(to_half(std::nanf("")))));
}

TEST_CASE("the router picks the likeliest experts, the lower index at a tie, and valid ones from NaN") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    auto scratch = scratch_for(ops);
    Random random;
    for (int experts : {8, 10, 64, 100}) {
      const int64_t hidden = 64, rows = 6;
      const int top_k = 4;
      auto w = random.bf16s(experts * hidden);
      for (int64_t k = 0; k < hidden; ++k) w[static_cast<size_t>(5 * hidden + k)] = w[static_cast<size_t>(2 * hidden + k)];  // a tie
      auto x = random.floats(rows * hidden);
      x[5 * hidden + 3] = std::nanf("");
      const auto packed = pack(w, experts, hidden);
      std::vector<int32_t> ids(static_cast<size_t>(rows * top_k), -7);
      std::vector<float> weights(ids.size(), kPoison);
      RouteArgs args;
      args.rows = {0, rows};
      args.x = x.data();
      args.w = packed.data();
      args.hidden = hidden;
      args.rule.num_experts = experts;
      args.rule.top_k = top_k;
      args.rule.renormalise = true;
      args.ids = ids.data();
      args.weights = weights.data();
      on_lanes(ops.route, args, 2, scratch);
      for (int64_t r = 0; r + 1 < rows; ++r) {
        std::vector<std::pair<double, int>> logits;
        for (int e = 0; e < experts; ++e) {
          double s = 0;
          for (int64_t k = 0; k < hidden; ++k) s += static_cast<double>(to_float(w[static_cast<size_t>(e * hidden + k)])) * x[static_cast<size_t>(r * hidden + k)];
          logits.emplace_back(-s, e);
        }
        std::stable_sort(logits.begin(), logits.end(), [](auto& a, auto& b) { return a.first < b.first; });
        double sum = 0, total = 0;
        for (int i = 0; i < top_k; ++i) sum += std::exp(-logits[static_cast<size_t>(i)].first + logits[0].first);
        for (int i = 0; i < top_k; ++i) {
          CHECK(ids[static_cast<size_t>(r * top_k + i)] == logits[static_cast<size_t>(i)].second);
          CHECK(weights[static_cast<size_t>(r * top_k + i)] == Approx(std::exp(-logits[static_cast<size_t>(i)].first + logits[0].first) / sum).epsilon(1e-4));
          total += weights[static_cast<size_t>(r * top_k + i)];
        }
        CHECK(total == Approx(1.0).epsilon(1e-6));
      }
      CHECK(std::vector<int32_t>(ids.end() - top_k, ids.end()) == std::vector<int32_t>{0, 1, 2, 3});
    }
  }
}

TEST_CASE("sampling helpers: arg max takes the lowest of equals and passes over NaN; exp_sum has one order") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    Random random;
    for (int64_t n : {1, 15, 16, 17, 1000, 151936}) {
      auto x = random.floats(n);
      const auto best = std::max_element(x.begin(), x.end()) - x.begin();
      CHECK(ops.arg_max(x.data(), n) == best);
      if (n > 20) {
        x[3] = x[static_cast<size_t>(n - 1)] = 100;
        x[1] = std::nanf("");
        CHECK(ops.arg_max(x.data(), n) == 3);
        CHECK(std::isnan(ops.exp_sum(x.data(), n, 100, 1, nullptr)));
        x[1] = 0;
      }
      std::vector<float> e(static_cast<size_t>(n) + 1, kPoison);
      const float sum = ops.exp_sum(x.data(), n, 1.5f, 0.5f, e.data());
      double exact = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double v = std::exp((static_cast<double>(x[static_cast<size_t>(i)]) - 1.5) * 0.5);
        exact += v;
        REQUIRE(e[static_cast<size_t>(i)] == Approx(v).epsilon(1e-6));
      }
      CHECK(sum == Approx(exact).epsilon(1e-5));
      CHECK(e[static_cast<size_t>(n)] == kPoison);
    }
    const std::vector<float> none(20, std::nanf(""));
    CHECK(ops.arg_max(none.data(), 20) == -1);
  }
}

TEST_CASE("rotary embedding and KV store put every row where its page table says") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    auto scratch = scratch_for(ops);
    Random random;
    const int heads = 3, kv_heads = 2, dim = 20, page = 16, rows = 5;
    const int32_t pages[] = {2, 0};
    const RowPlace places[rows] = {{0, pages}, {1, pages}, {15, pages}, {16, pages}, {31, pages}};
    const auto q = random.floats(rows * heads * dim), k = random.floats(rows * kv_heads * dim), v = random.floats(rows * kv_heads * dim),
               norm = random.floats(dim);
    std::vector<float> rope(32 * dim);
    for (int p = 0; p < 32; ++p)
      for (int i = 0; i < dim / 2; ++i) {
        rope[static_cast<size_t>(p * dim + i)] = std::cos(static_cast<float>(p) / static_cast<float>(i + 1));
        rope[static_cast<size_t>(p * dim + dim / 2 + i)] = std::sin(static_cast<float>(p) / static_cast<float>(i + 1));
      }
    const KvSlice slice{page, dim};
    std::vector<bf16> pool(static_cast<size_t>(3 * kv_heads * slice.bytes() / 2), 0x7fc0), out(q.size());
    RopeStoreArgs args;
    args.rows = {0, rows};
    args.places = places;
    args.num_heads = heads;
    args.q = q.data();
    args.k = k.data();
    args.v = v.data();
    args.k_norm = norm.data();
    args.eps = 1e-6f;
    args.rope = rope.data();
    args.q_out = out.data();
    args.value_scale = 0.25f;
    args.kv = {reinterpret_cast<std::byte*>(pool.data()), kv_heads, page, dim};
    on_lanes(ops.rope_store, args, 3, scratch);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < dim / 2; ++i) {
        const int p = places[r].position;
        const float c = rope[static_cast<size_t>(p * dim + i)], s = rope[static_cast<size_t>(p * dim + dim / 2 + i)];
        const float* qr = q.data() + r * heads * dim;
        CHECK(to_float(out[static_cast<size_t>(r * heads * dim + i)]) == Approx(qr[i] * c - qr[i + dim / 2] * s).epsilon(0.005).margin(1e-3));
        const bf16* kv = pool.data() + (pages[p / page] * kv_heads + 1) * slice.bytes() / 2;
        const float* kr = k.data() + (r * kv_heads + 1) * dim;
        double mean = 0;
        for (int d = 0; d < dim; ++d) mean += static_cast<double>(kr[d]) * kr[d] / dim;
        const double f = 1 / std::sqrt(mean + 1e-6);
        const double a = kr[i] * f * norm[static_cast<size_t>(i)], b = kr[i + dim / 2] * f * norm[static_cast<size_t>(i + dim / 2)];
        CHECK(to_float(kv[slice.k_index(p % page, i + dim / 2)]) == Approx(b * c + a * s).epsilon(0.005).margin(1e-3));
        CHECK(kv[slice.v_index(p % page, i)] == to_half(0.25f * v[static_cast<size_t>((r * kv_heads + 1) * dim + i)]));
      }
  }
}

TEST_CASE("biases of q, k and v are what they would be in the projection") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    auto scratch = scratch_for(ops);
    Random random;
    const int heads = 3, kv_heads = 2, dim = 20, page = 16, rows = 3;
    const int32_t pages[] = {0};
    const RowPlace places[rows] = {{0, pages}, {1, pages}, {15, pages}};
    auto q = random.floats(rows * heads * dim), k = random.floats(rows * kv_heads * dim), v = random.floats(rows * kv_heads * dim);
    const auto norm = random.floats(dim), rope = random.floats(page * dim), q_bias = random.floats(heads * dim), k_bias = random.floats(kv_heads * dim),
               v_bias = random.floats(kv_heads * dim);
    const auto run = [&](bool biased) {
      std::vector<bf16> all(q.size(), 0), pool(static_cast<size_t>(kv_heads * KvSlice{page, dim}.bytes() / 2), 0);
      RopeStoreArgs args{{0, rows}, places, heads, q.data(), k.data(), v.data(), norm.data(), norm.data(), 1e-6f, rope.data(), all.data(), 0.25f,
                         {reinterpret_cast<std::byte*>(pool.data()), kv_heads, page, dim}};
      if (biased) args.q_bias = q_bias.data(), args.k_bias = k_bias.data(), args.v_bias = v_bias.data();
      on_lanes(ops.rope_store, args, 3, scratch);
      all.insert(all.end(), pool.begin(), pool.end());
      return all;
    };
    const auto biased = run(true), without = run(false);
    for (auto [values, bias] : {std::pair{&q, &q_bias}, {&k, &k_bias}, {&v, &v_bias}})
      for (size_t i = 0; i < values->size(); ++i) (*values)[i] += (*bias)[i % bias->size()];
    CHECK(biased == run(false));
    CHECK(biased != without);
  }
}

TEST_CASE("a router of sigmoids chooses by score and bias, weighs by score, and adds the shared experts") {
  for (const Ops* path : paths()) {
    const Ops& ops = *path;
    Random random;
    for (int experts : {6, 16, 40}) {
      const int64_t hidden = 32, rows = 5;
      const int top_k = 3;
      auto scratch = scratch_for(ops, {rows, hidden, 2, 1, experts + 2, top_k + 2});  // no more than that
      const auto w = random.bf16s(experts * hidden), gate = random.bf16s(hidden);
      const auto x = random.floats(rows * hidden), bias = random.floats(experts);
      auto packed = pack(w, experts, hidden);
      const auto packed_gate = pack(gate, 1, hidden);
      packed.insert(packed.end(), packed_gate.begin(), packed_gate.end());
      for (const bool gated : {false, true}) {
        RouteArgs args;
        args.rows = {0, rows};
        args.x = x.data();
        args.w = packed.data();
        args.hidden = hidden;
        args.rule = {experts, top_k, 2, gated, true, true, 2.5f};
        args.bias = bias.data();
        std::vector<int32_t> ids(static_cast<size_t>(rows * args.rule.choices()), -7);
        std::vector<float> weights(ids.size(), kPoison);
        args.ids = ids.data();
        args.weights = weights.data();
        on_lanes(ops.route, args, 2, scratch);
        for (int64_t r = 0; r < rows; ++r) {
          const auto score = [&](const bf16* row) {
            double logit = 0;
            for (int64_t k = 0; k < hidden; ++k) logit += static_cast<double>(to_float(row[k])) * x[static_cast<size_t>(r * hidden + k)];
            return 1 / (1 + std::exp(-logit));
          };
          std::vector<std::pair<double, int>> order;
          for (int e = 0; e < experts; ++e) order.emplace_back(-score(w.data() + e * hidden) - bias[static_cast<size_t>(e)], e);
          std::stable_sort(order.begin(), order.end());
          double sum = 0;
          for (int i = 0; i < top_k; ++i) sum += score(w.data() + order[static_cast<size_t>(i)].second * hidden);
          const int32_t* const id = ids.data() + r * args.rule.choices();
          const float* const weight = weights.data() + r * args.rule.choices();
          for (int i = 0; i < top_k; ++i) {
            CHECK(id[i] == order[static_cast<size_t>(i)].second);
            CHECK(weight[i] == Approx(2.5 * score(w.data() + id[i] * hidden) / sum).epsilon(1e-4));
          }
          for (int i = 0; i < 2; ++i) {
            CHECK(id[top_k + i] == experts + i);
            CHECK(weight[top_k + i] == Approx(gated ? score(gate.data()) : 1).epsilon(1e-5));
          }
        }
        // A number that is none is every row's, though such an expert is not chosen; scores that are all 0 have weights of 0.
        std::vector<float> broken = bias;
        broken[static_cast<size_t>(experts - 1)] = NAN;
        args.bias = broken.data();
        on_lanes(ops.route, args, 2, scratch);
        for (int64_t r = 0; r < rows; ++r) {
          CHECK(std::isnan(weights[static_cast<size_t>(r * args.rule.choices())]));
          CHECK(ids[static_cast<size_t>(r * args.rule.choices())] < experts - 1);
        }
        const std::vector<float> ones(static_cast<size_t>(rows * hidden), 1);
        const auto far_below = pack(std::vector<bf16>(static_cast<size_t>(experts * hidden), to_bf16(-100.0f)), experts, hidden);
        std::copy(far_below.begin(), far_below.end(), packed.begin());
        args.x = ones.data();
        args.bias = bias.data();
        on_lanes(ops.route, args, 2, scratch);
        for (int i = 0; i < top_k; ++i) CHECK(weights[static_cast<size_t>(i)] == 0);
        packed = pack(w, experts, hidden);
        packed.insert(packed.end(), packed_gate.begin(), packed_gate.end());
      }
    }
  }
}

TEST_CASE("AMX adds as plain_matrix.cc says, bit for bit") {
  if (!isa_available(Isa::kAmx)) return;
  Random random;
  const int64_t rows = 33, n = 48, k = 200;
  for (const float scale : {1.0f, 0x1p-70f}) {  // products that normal floats hold, and smaller ones
    const auto x = random.bf16s(rows * k, scale), packed = pack(random.bf16s(n * k, scale), n, k);
    const auto run = [&](const Ops& ops) {
      std::vector<float> y(static_cast<size_t>(rows * n));
      const LinearPart part{packed.data(), n, y.data(), n};
      LinearArgs args;
      args.rows = {0, rows};
      args.x = x.data();
      args.ldx = args.k = k;
      args.num_parts = 1;
      args.parts = &part;
      auto scratch = scratch_for(ops);
      on_lanes(ops.linear, args, 1, scratch);
      return y;
    };
    CHECK(same(run(cpu_ops(Isa::kAmx)), run(plain_matrix::ops())));
  }
}

TEST_CASE("paths are known by name, and the best one is available") {
  CHECK(parse_isa("avx2") == Isa::kAvx2);
  CHECK_FALSE(parse_isa("sse9"));
  CHECK(isa_available(best_isa()));
  CHECK(isa_available(Isa::kPortable));
  for (Isa isa : available_isas()) CHECK(cpu_ops(isa).name == std::string(isa_name(isa)));
}

}  // namespace moebius
