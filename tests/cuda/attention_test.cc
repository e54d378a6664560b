#include <algorithm>
#include <cmath>
#include <numeric>

#include "lib/tensor/packed.h"
#include "tests/cuda/harness.h"

namespace moebius {
namespace {

struct Shape {
  int head_dim, kv_heads, heads_per_kv, page_tokens;
};

// Sequences with KV at hand: pages are shuffled, slots behind a sequence's end hold NaN.
struct Sequences {
  Sequences(Random& random, const Shape& s, const std::vector<int>& lengths) : shape(s), slice{s.page_tokens, s.head_dim} {
    int pages = 0;
    for (int n : lengths) pages += static_cast<int>(div_up(n, s.page_tokens));
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random.engine);
    kv.assign(static_cast<size_t>(pages * s.kv_heads * slice.bytes() / 2), 0x7fff);  // NaN in bf16 and in f16
    auto next = order.begin();
    for (int n : lengths) {
      tables.emplace_back(next, next + div_up(n, s.page_tokens));
      next += div_up(n, s.page_tokens);
      for (int t = 0; t < n; ++t)
        for (int j = 0; j < s.kv_heads; ++j) {
          bf16* page = kv.data() + (tables.back()[static_cast<size_t>(t / s.page_tokens)] * s.kv_heads + j) * slice.bytes() / 2;
          for (int d = 0; d < s.head_dim; ++d) {
            page[slice.k_index(t % s.page_tokens, d)] = to_bf16(random.normal());
            page[slice.v_index(t % s.page_tokens, d)] = to_half(2 * random.normal());
          }
        }
    }
  }
  float k(int sequence, int head, int token, int d) const { return to_float(page(sequence, head, token)[slice.k_index(token % shape.page_tokens, d)]); }
  float v(int sequence, int head, int token, int d) const { return half_to_float(page(sequence, head, token)[slice.v_index(token % shape.page_tokens, d)]); }
  const bf16* page(int sequence, int head, int token) const {
    const int32_t p = tables[static_cast<size_t>(sequence)][static_cast<size_t>(token / shape.page_tokens)];
    return kv.data() + (p * shape.kv_heads + head) * slice.bytes() / 2;
  }
  Shape shape;
  KvSlice slice;
  std::vector<bf16> kv;
  std::vector<std::vector<int32_t>> tables;
};

struct Chunk {
  int sequence, first, rows;
};

// Rows of chunks laid end to end; returns out [rows, heads · head_dim].
std::vector<bf16> run(const Sequences& s, const std::vector<Chunk>& chunks, const std::vector<std::vector<bf16>>& queries) {
  const int heads = s.shape.kv_heads * s.shape.heads_per_kv, width = heads * s.shape.head_dim;
  const Array<bf16> kv(s.kv);
  std::vector<Array<int32_t>> tables;
  for (const auto& t : s.tables) tables.emplace_back(t);
  std::vector<bf16> q;
  std::vector<SequenceChunk> list;
  AttentionArgs args;
  for (const Chunk& c : chunks) {
    list.push_back({static_cast<int32_t>(q.size() / static_cast<size_t>(width)), c.rows, c.first, tables[static_cast<size_t>(c.sequence)].get()});
    const std::vector<bf16>& of = queries[static_cast<size_t>(c.sequence)];
    q.insert(q.end(), of.begin() + c.first * width, of.begin() + (c.first + c.rows) * width);
    args.num_rows += c.rows;
    args.max_tokens = std::max<int64_t>(args.max_tokens, c.first + c.rows);
  }
  const Array<bf16> q_there(q), out(q.size());
  const Array<SequenceChunk> list_there(list);
  std::vector<Range> heads_of_kv;
  for (int j = 0; j < s.shape.kv_heads; ++j) heads_of_kv.push_back({j * s.shape.heads_per_kv, (j + 1) * s.shape.heads_per_kv});
  args.num_chunks = static_cast<int>(list.size());
  args.chunks = list_there.get();
  args.num_heads = heads;
  args.heads_of_kv = heads_of_kv.data();
  args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(s.shape.head_dim));
  args.value_scale = 2;
  args.q = q_there.get();
  args.out = out.get();
  args.kv = {reinterpret_cast<std::byte*>(kv.get()), s.shape.kv_heads, s.shape.page_tokens, s.shape.head_dim};
  Lanes lanes({args.num_rows, 1, s.shape.head_dim, heads, 1, 1});
  test_device().ops().attention(args, lanes.device);
  return out.values();
}

}  // namespace

TEST_CASE("attention: against the plain sum in double, at every edge of tiles, pages and splits") {
  Random random(4);
  for (const Shape& shape : {Shape{64, 2, 4, 16}, Shape{16, 1, 1, 32}, Shape{80, 1, 5, 48}, Shape{128, 2, 8, 64}, Shape{256, 1, 2, 16}, Shape{24, 3, 1, 256}}) {
    const std::vector<int> lengths = {1, 15, 16, 17, 257, 600};
    const Sequences s(random, shape, lengths);
    const int heads = shape.kv_heads * shape.heads_per_kv, width = heads * shape.head_dim;
    std::vector<std::vector<bf16>> queries;
    for (int n : lengths) queries.push_back(random.bf16s(static_cast<size_t>(n * width)));
    const std::vector<Chunk> chunks = {{0, 0, 1}, {1, 0, 15}, {2, 15, 1}, {3, 0, 0}, {3, 16, 1}, {4, 254, 3}, {5, 599, 1}, {5, 510, 6}};
    const std::vector<bf16> out = run(s, chunks, queries);
    int64_t row = 0;
    for (const Chunk& c : chunks)
      for (int i = 0; i < c.rows; ++i, ++row)
        for (int h = 0; h < heads; ++h) {
          const int position = c.first + i, j = h / shape.heads_per_kv;
          const bf16* q = queries[static_cast<size_t>(c.sequence)].data() + position * width + h * shape.head_dim;
          std::vector<double> p(static_cast<size_t>(position + 1));
          double most = -1e300, sum = 0;
          for (int t = 0; t <= position; ++t) {
            double score = 0;
            for (int d = 0; d < shape.head_dim; ++d) score += static_cast<double>(to_float(q[d])) * s.k(c.sequence, j, t, d);
            p[static_cast<size_t>(t)] = score / std::sqrt(static_cast<double>(shape.head_dim));
            most = std::max(most, p[static_cast<size_t>(t)]);
          }
          for (double& v : p) v = std::exp(v - most), sum += v;
          for (int d = 0; d < shape.head_dim; ++d) {
            double value = 0, size = 0;
            for (int t = 0; t <= position; ++t) {
              const double term = p[static_cast<size_t>(t)] / sum * s.v(c.sequence, j, t, d) / 2;
              value += term, size += std::fabs(term);
            }
            // P is rounded to f16 (2^−11 of each term), the result to bf16 (2^−9 of it), scores by some 2^−20 of sizes up to 8.
            REQUIRE(std::fabs(to_float(out[static_cast<size_t>((row * heads + h) * shape.head_dim + d)]) - value) <=
                    0x1p-10 * size + 0x1p-8 * std::fabs(value) + 1e-6);
          }
        }
    REQUIRE(static_cast<size_t>(row * width) == out.size());
  }
}

TEST_CASE("attention: a row's bits depend on its position alone") {
  Random random(5);
  for (const Shape& shape : {Shape{64, 1, 4, 16}, Shape{128, 2, 3, 32}, Shape{80, 1, 5, 48}, Shape{256, 1, 2, 16}}) {
    const std::vector<int> lengths = {530, 40};
    const Sequences s(random, shape, lengths);
    const int width = shape.kv_heads * shape.heads_per_kv * shape.head_dim;
    std::vector<std::vector<bf16>> queries;
    for (int n : lengths) queries.push_back(random.bf16s(static_cast<size_t>(n * width)));
    const auto rows_of = [&](const std::vector<bf16>& out, int first, int rows) {
      return std::vector<bf16>(out.begin() + first * width, out.begin() + (first + rows) * width);
    };
    // So many rows that one warp walks all splits of its rows, and few, whose splits are apart and merged later.
    const std::vector<Chunk> many(kEmulated ? 1 : 64, Chunk{0, 400, 130});
    const std::vector<bf16> whole = rows_of(run(s, many, queries), 100, 30);
    CHECK(same_bytes(run(s, {{0, 500, 30}}, queries), whole));
    for (int i = 0; i < 30; i += 3) CHECK(same_bytes(run(s, {{0, 500 + i, 1}}, queries), rows_of(whole, i, 1)));
    std::vector<bf16> pieces;
    for (int i = 0; i < 30; i += 7) {
      const std::vector<bf16> piece = run(s, {{1, 3, 9}, {0, 500 + i, std::min(7, 30 - i)}, {1, 39, 1}}, queries);
      pieces.insert(pieces.end(), piece.begin() + 9 * width, piece.end() - width);
    }
    CHECK(same_bytes(pieces, whole));
  }
}

TEST_CASE("rope_attention: the bits of rope_store and attention one after the other, of rows and of K and V, with norms and biases or without") {
  Random random(6);
  struct Trial {
    Shape shape;
    std::vector<int> lengths;
  };
  std::vector<Trial> trials;
  for (const Shape& shape : {Shape{64, 2, 4, 16}, Shape{128, 2, 8, 32}, Shape{128, 1, 16, 16}, Shape{192, 2, 3, 48}, Shape{256, 1, 2, 16}})
    trials.push_back({shape, {1, 16, 17, 128, 129, 300, 600}});
  trials.push_back({{64, 2, 4, 16}, std::vector<int>(kEmulated ? 17 : 1030, 129)});  // so many that one warp walks both splits of a row
  trials.push_back({{80, 1, 5, 48}, {17, 300}});                                     // whose halves are no lane's dimensions
  trials.push_back({{128, 1, 17, 16}, {17, 300}});                                   // more heads than a warp has rows
  for (const auto& [shape, lengths] : trials)
    for (const bool norms : {false, true}) {
      const Sequences s(random, shape, lengths);
      const int heads = shape.kv_heads * shape.heads_per_kv, dim = shape.head_dim;
      const size_t rows = lengths.size() + 1;  // one fills the step up
      const int longest = *std::max_element(lengths.begin(), lengths.end());
      const auto width = static_cast<size_t>(heads * dim), kv_width = static_cast<size_t>(shape.kv_heads * dim);
      std::vector<float> q_values = random.floats(rows * width), v_values = random.floats(rows * kv_width);
      q_values[3 * width + 1] = NAN, v_values[1] = NAN;
      const Array<float> q(q_values), k(random.floats(rows * kv_width)), v(v_values), norm(random.floats(static_cast<size_t>(2 * dim + 2))),
          bias(random.floats(width + 2 * kv_width));
      const Array<float> table(random.floats(static_cast<size_t>(longest * dim)));
      std::vector<Array<int32_t>> pages;
      std::vector<RowPlace> places(rows);
      std::vector<SequenceChunk> chunks(rows);
      for (size_t i = 0; i < lengths.size(); ++i) {
        pages.emplace_back(s.tables[i]);
        const size_t row = i + (i > 0);  // the second fills up
        places[row] = {lengths[i] - 1, pages.back().get()};
        chunks[row] = {static_cast<int32_t>(row), 1, lengths[i] - 1, pages.back().get()};
      }
      const Array<RowPlace> places_there(places);
      const Array<SequenceChunk> chunks_there(chunks);
      std::vector<Range> heads_of_kv;
      for (int j = 0; j < shape.kv_heads; ++j) heads_of_kv.push_back({j * shape.heads_per_kv, (j + 1) * shape.heads_per_kv});
      Lanes lanes({static_cast<int64_t>(rows), 1, dim, heads, 1, 1});
      const auto run = [&](bool together) {
        const Array<bf16> kv(s.kv), q_out(q.size()), out(q.size());
        const KvView view{reinterpret_cast<std::byte*>(kv.get()), shape.kv_heads, shape.page_tokens, dim};
        const float* const no_norm = nullptr;
        RopeAttentionArgs args;
        args.rope = {{0, static_cast<int64_t>(rows)}, places_there.get(), heads, q.get(), k.get(), v.get(), norms ? norm.get() + 2 : no_norm,
                     norms ? norm.get() + 2 + dim : no_norm, 1e-6f, table.get(), q_out.get(), 0.5f, view};
        if (norms) args.rope.q_bias = bias.get(), args.rope.k_bias = bias.get() + width, args.rope.v_bias = bias.get() + width + kv_width;
        args.attention = {static_cast<int>(rows), chunks_there.get(), static_cast<int64_t>(rows), longest, heads, heads_of_kv.data(),
                          1.0f / std::sqrt(static_cast<float>(dim)), 0.5f, q_out.get(), out.get(), view};
        const Ops& ops = test_device().ops();
        if (together) {
          ops.rope_attention(args, lanes.device);
        } else {
          ops.rope_store(args.rope, lanes.device);
          ops.attention(args.attention, lanes.device);
        }
        const std::vector<bf16> queries = q_out.values();
        const bool fused = together && (dim == 64 || dim == 128) && shape.heads_per_kv <= 16;
        CHECK(std::all_of(queries.begin(), queries.end(), [](bf16 x) { return x == 0xffff; }) == fused);  // then they are nowhere but in registers
        return std::pair(out.values(), kv.values());
      };
      const auto apart = run(false), together = run(true);
      INFO("head_dim " << dim << ", heads " << heads << ", sequences " << lengths.size() << ", norms " << norms);
      CHECK(same_bytes(together.first, apart.first));
      CHECK(same_bytes(together.second, apart.second));
      CHECK_FALSE(same_bytes(apart.second, s.kv));
    }
}

}  // namespace moebius
