#include <cmath>

#include "lib/tensor/packed.h"
#include "tests/cuda/harness.h"

namespace moebius {

TEST_CASE("embed, pick_rows and clear move what the CPU's do") {
  Random random(6);
  for (const int64_t hidden : {2, 64, 100}) {
    constexpr int kVocab = 50, kRows = 21;
    std::vector<int32_t> tokens;
    for (int r = 0; r < kRows; ++r) tokens.push_back(r == 7 ? -1 : random.below(kVocab));
    const std::vector<bf16> table = random.bf16s(static_cast<size_t>(kVocab * hidden));
    const std::vector<bf16> packed = random.bf16s(static_cast<size_t>(PackedMatrix{kVocab, hidden}.elements()));
    const Array<int32_t> tokens_there(tokens);
    const Array<bf16> table_there(table), packed_there(packed);
    Lanes lanes({kRows, hidden, 16, 1, 1, 1});
    for (const bool tied : {false, true}) {
      std::vector<float> mine(static_cast<size_t>(kRows * hidden), NAN);
      const Array<float> there(mine);
      const Range rows{3, 20};
      reference().embed({rows, tokens.data(), hidden, tied ? nullptr : table.data(), packed.data(), mine.data()}, lanes.host);
      test_device().ops().embed({rows, tokens_there.get(), hidden, tied ? nullptr : table_there.get(), packed_there.get(), there.get()}, lanes.device);
      CHECK(same_bytes(there.values(), mine));
    }
    const std::vector<int32_t> picked = {5, 0, 20, 5};
    const Array<int32_t> picked_there(picked);
    const Array<bf16> out(picked.size() * static_cast<size_t>(hidden));
    std::vector<bf16> mine(out.size());
    reference().pick_rows({4, picked.data(), hidden, table.data(), mine.data()}, lanes.host);
    test_device().ops().pick_rows({4, picked_there.get(), hidden, table_there.get(), out.get()}, lanes.device);
    CHECK(same_bytes(out.values(), mine));
    test_device().ops().clear(out.get(), 3 * sizeof(bf16), lanes.device);
    mine[0] = mine[1] = mine[2] = 0;
    CHECK(same_bytes(out.values(), mine));
  }
}

TEST_CASE("fetch_rows brings the rows of every other home, and leaves the own and all others as they are") {
  Random random(12);
  for (const auto& [hidden, top_k] : {std::pair<int64_t, int64_t>{64, 4}, {100, 3}, {6, 1}})
    for (const bool choices : {true, false}) {
      constexpr int kRows = 19, kOwn = 2;
      const std::vector<Range> homes = {{0, 5}, {5, 5}, {5, 11}, {11, 17}};  // the last two rows are of no home
      std::vector<std::vector<bf16>> x;
      std::vector<std::vector<int32_t>> ids;
      std::vector<Array<bf16>> x_there;
      std::vector<Array<int32_t>> ids_there;
      std::vector<Array<float>> weights_there;
      std::vector<bf16*> x_pointers;
      std::vector<int32_t*> ids_pointers;
      std::vector<float*> weights_pointers;
      for (int r = 0; r < 4; ++r) {
        x.push_back(random.bf16s(static_cast<size_t>(kRows * hidden)));
        ids.emplace_back(static_cast<size_t>(kRows * top_k));
        for (int32_t& v : ids.back()) v = random.below(1 << 20);
        x_there.emplace_back(x.back(), r);
        ids_there.emplace_back(ids.back(), r);
        weights_there.emplace_back(std::vector<float>(ids.back().begin(), ids.back().end()), r);
        x_pointers.push_back(x_there.back().get());
        ids_pointers.push_back(ids_there.back().get());
        weights_pointers.push_back(weights_there.back().get());
        finish(r);
      }
      Lanes lanes({kRows, hidden, 16, 1, 1, 1});
      test_device().ops().fetch_rows({4, kOwn, homes.data(), hidden, top_k, x_pointers.data(), choices ? ids_pointers.data() : nullptr,
                                      choices ? weights_pointers.data() : nullptr},
                                     lanes.device);
      finish(0);  // whose queue it went to
      for (int h : {0, 1, 3})
        for (int64_t r = homes[static_cast<size_t>(h)].begin; r < homes[static_cast<size_t>(h)].end; ++r) {
          std::copy_n(x[static_cast<size_t>(h)].begin() + r * hidden, hidden, x[kOwn].begin() + r * hidden);
          if (choices) std::copy_n(ids[static_cast<size_t>(h)].begin() + r * top_k, top_k, ids[kOwn].begin() + r * top_k);
        }
      for (size_t r = 0; r < 4; ++r) {
        CHECK(same_bytes(x_there[r].values(), x[r]));
        CHECK(same_bytes(ids_there[r].values(), ids[r]));
        CHECK(same_bytes(weights_there[r].values(), std::vector<float>(ids[r].begin(), ids[r].end())));
      }
    }
}

TEST_CASE("add_norm: the sum is the CPU's to the bit, the norm to a few roundings, and rows do not depend on one another") {
  Random random(7);
  for (const int64_t hidden : {2, 8, 100, 102, 256, 700, 2048, 2100, 4100}) {
    constexpr int kRows = 9;
    for (const int num : {0, 1, 3, 4}) {
      const std::vector<float> h = random.floats(static_cast<size_t>(kRows * hidden)), weight = random.floats(static_cast<size_t>(hidden));
      std::vector<std::vector<int64_t>> sums;
      std::vector<std::vector<uint8_t>> flags;
      std::vector<Array<int64_t>> sums_there;
      std::vector<Array<uint8_t>> flags_there;
      std::vector<const int64_t*> sum_pointers, sum_pointers_there;
      std::vector<const uint8_t*> flag_pointers, flag_pointers_there;
      for (int p = 0; p < num; ++p) {
        sums.emplace_back(static_cast<size_t>(kRows * hidden));
        for (int64_t& v : sums.back()) v = static_cast<int64_t>(random.normal() * 0x1p27f) + (p == 0 ? int64_t{1} << 62 : p == 1 ? -(int64_t{1} << 62) : 0);
        flags.emplace_back(static_cast<size_t>(kRows), 0);
        flags.back()[static_cast<size_t>(p)] = 1;
        sums_there.emplace_back(sums.back());
        flags_there.emplace_back(flags.back());
      }
      for (int p = 0; p < num; ++p) {
        sum_pointers.push_back(sums[static_cast<size_t>(p)].data()), sum_pointers_there.push_back(sums_there[static_cast<size_t>(p)].get());
        flag_pointers.push_back(flags[static_cast<size_t>(p)].data()), flag_pointers_there.push_back(flags_there[static_cast<size_t>(p)].get());
      }
      std::vector<float> behind_others{1, 2};  // norms of a layer lie end to end: aligned to 8 bytes only
      behind_others.insert(behind_others.end(), weight.begin(), weight.end());
      const Array<float> weight_there(behind_others);
      Lanes lanes({kRows, hidden, 16, 1, 1, 1});
      struct Out {
        std::vector<float> h, x_float;
        std::vector<bf16> x;
      };
      const auto on_device = [&](Range rows, bool with_weight, int64_t whole_rows = 0, bool elsewhere = false) {
        const Array<float> h_there(h), x_float(h.size()), h_out(h.size());
        const Array<bf16> x(h.size());
        test_device().ops().add_norm({rows, hidden, h_there.get(), num, sum_pointers_there.data(), flag_pointers_there.data(), 0x1p-28f, false,
                                      whole_rows, with_weight ? weight_there.get() + 2 : nullptr, 1e-6f, x.get(), x_float.get(),
                                      elsewhere ? h_out.get() : nullptr},
                                     lanes.device);
        if (elsewhere) CHECK(same_bytes(h_there.values(), h));
        return Out{(elsewhere ? h_out : h_there).values(), x_float.values(), x.values()};
      };
      Out mine{h, std::vector<float>(h.size()), std::vector<bf16>(h.size())};
      reference().add_norm({{0, kRows}, hidden, mine.h.data(), num, sum_pointers.data(), flag_pointers.data(), 0x1p-28f, false, 0, weight.data(), 1e-6f,
                            mine.x.data(), mine.x_float.data()},
                           lanes.host);
      const Out all = on_device({0, kRows}, true);
      CHECK(same_bytes(on_device({0, kRows}, false).h, all.h));
      if (num > 0) CHECK(same_bytes(on_device({0, kRows}, true, 0, true).h, all.h));
      for (size_t i = 0; i < h.size(); ++i) {
        if (std::isnan(mine.h[i])) {
          REQUIRE(std::isnan(all.h[i]));
          REQUIRE(std::isnan(all.x_float[i]));
          continue;
        }
        REQUIRE(all.h[i] == mine.h[i]);
        // The sum of squares is of positive terms: its orders differ by hidden · 2^−24 at most, its root by half of that.
        const double close = static_cast<double>(hidden) * 0x1p-24;
        REQUIRE(std::fabs(all.x_float[i] - mine.x_float[i]) <= close * std::fabs(mine.x_float[i]));
        REQUIRE(std::fabs(to_float(all.x[i]) - all.x_float[i]) <= 0x1p-8 * std::fabs(all.x_float[i]));
      }
      const Out one = on_device({4, 5}, true);
      for (int64_t i = 4 * hidden; i < 5 * hidden; ++i) REQUIRE(one.x[static_cast<size_t>(i)] == all.x[static_cast<size_t>(i)]);
      // In two shots: each adds up its share of the rows.
      for (int p = 0; p < num; ++p)
        test_device().ops().add_partials({share_of(kRows, p, num), hidden, num, p, sum_pointers_there.data(), flag_pointers_there.data(), false}, lanes.device);
      CHECK(same_bytes(on_device({0, kRows}, true, num > 0 ? kRows : 0).h, all.h));
    }
  }
}

TEST_CASE("rope_store: q, and the KV as the CPU stores it, to a rounding") {
  Random random(8);
  for (const int dim : {8, 16, 64, 80, 128, 192, 256}) {
    for (const bool norms : {false, true}) {
      constexpr int kRows = 7, kHeads = 3, kKvHeads = 2, kPage = 16, kPages = 5;
      const KvSlice slice{kPage, dim};
      std::vector<float> v = random.floats(kRows * kKvHeads * dim);
      v[1] = NAN;  // of the first row's first head: stored as 0
      const std::vector<float> q = random.floats(kRows * kHeads * dim), k = random.floats(kRows * kKvHeads * dim),
                               q_norm = random.floats(dim), k_norm = random.floats(dim), rope = random.floats(static_cast<size_t>(kPages * kPage * dim));
      const std::vector<int32_t> pages = {3, 0, 4, 1, 2};
      const Array<int32_t> pages_there(pages);
      std::vector<RowPlace> places, places_there;
      for (int r = 0; r < kRows; ++r) {
        const int32_t position = r * 11;
        places.push_back({position, pages.data()});
        places_there.push_back({position, pages_there.get()});
      }
      std::vector<bf16> kv(static_cast<size_t>(kPages * kKvHeads * slice.bytes() / 2), 0x7fff), q_out(q.size());
      const Array<bf16> kv_there(kv), q_out_there(q.size());
      std::vector<float> all_norms{1, 2};  // norms of a layer lie end to end: aligned to 8 bytes only
      for (const auto* norm : {&q_norm, &k_norm}) all_norms.insert(all_norms.end(), norm->begin(), norm->end());
      const Array<float> q_there(q), k_there(k), v_there(v), norms_there(all_norms), rope_there(rope);
      const float *const q_norm_there = norms_there.get() + 2, *const k_norm_there = q_norm_there + dim;
      const Array<RowPlace> list(places_there);
      Lanes lanes({kRows, 1, dim, kHeads, 1, 1});
      const auto bytes = [](const bf16* p) { return reinterpret_cast<std::byte*>(const_cast<bf16*>(p)); };
      reference().rope_store({{0, kRows}, places.data(), kHeads, q.data(), k.data(), v.data(), norms ? q_norm.data() : nullptr, norms ? k_norm.data() : nullptr,
                              1e-6f, rope.data(), q_out.data(), 0.5f, {bytes(kv.data()), kKvHeads, kPage, dim}},
                             lanes.host);
      test_device().ops().rope_store({{0, kRows}, list.get(), kHeads, q_there.get(), k_there.get(), v_there.get(), norms ? q_norm_there : nullptr,
                                      norms ? k_norm_there : nullptr, 1e-6f, rope_there.get(), q_out_there.get(), 0.5f,
                                      {bytes(kv_there.get()), kKvHeads, kPage, dim}},
                                     lanes.device);
      // A rounding to bf16 may fall the other way where the two arithmetics differ in their last bits: one step of 2^−7 at most, plus
      // what cancels in a·cos − b·sin (terms of up to some 20).
      const auto near = [](bf16 a, bf16 b) { return a == b || std::fabs(to_float(a) - to_float(b)) <= 0x1p-7 * std::fabs(to_float(a)) + 1e-5; };
      const std::vector<bf16> q_values = q_out_there.values(), kv_values = kv_there.values();
      for (size_t i = 0; i < q_out.size(); ++i) REQUIRE(near(q_values[i], q_out[i]));
      for (int page = 0; page < kPages; ++page)
        for (int j = 0; j < kKvHeads; ++j)
          for (int slot = 0; slot < kPage; ++slot)
            for (int d = 0; d < dim; ++d) {
              const size_t base = static_cast<size_t>((page * kKvHeads + j) * slice.bytes() / 2);
              REQUIRE(near(kv_values[base + static_cast<size_t>(slice.k_index(slot, d))], kv[base + static_cast<size_t>(slice.k_index(slot, d))]));
              const bf16 value = kv[base + static_cast<size_t>(slice.v_index(slot, d))];
              const bool is_nan = page == pages[0] && j == 0 && slot == 0 && d == 1;
              REQUIRE(kv_values[base + static_cast<size_t>(slice.v_index(slot, d))] == (is_nan ? 0 : value));
            }
      // Biases are what they would be in the projection.
      const std::vector<float> biases = random.floats(static_cast<size_t>((kHeads + 2 * kKvHeads) * dim));
      const auto biased_run = [&](bool added) {
        std::vector<float> inputs[] = {q, k, v};
        size_t first = 0;
        for (size_t n = 0; n < 3; ++n) {
          const size_t width = static_cast<size_t>((n == 0 ? kHeads : kKvHeads) * dim);
          for (size_t i = 0; added && i < inputs[n].size(); ++i) inputs[n][i] += biases[first + i % width];
          first += width;
        }
        const Array<float> there[] = {Array<float>(inputs[0]), Array<float>(inputs[1]), Array<float>(inputs[2])}, bias_there(biases);
        const Array<bf16> pool(kv), out(q.size());
        RopeStoreArgs args{{0, kRows}, list.get(), kHeads, there[0].get(), there[1].get(), there[2].get(), norms ? q_norm_there : nullptr,
                           norms ? k_norm_there : nullptr, 1e-6f, rope_there.get(), out.get(), 0.5f, {bytes(pool.get()), kKvHeads, kPage, dim}};
        if (!added) args.q_bias = bias_there.get(), args.k_bias = args.q_bias + kHeads * dim, args.v_bias = args.k_bias + kKvHeads * dim;
        test_device().ops().rope_store(args, lanes.device);
        std::vector<bf16> all = out.values(), stored = pool.values();
        all.insert(all.end(), stored.begin(), stored.end());
        return all;
      };
      CHECK(same_bytes(biased_run(false), biased_run(true)));
      // A row that fills a step up has no pages and stores nothing.
      std::vector<RowPlace> none(1, RowPlace{0, nullptr});
      const Array<RowPlace> none_there(none);
      test_device().ops().rope_store({{0, 1}, none_there.get(), kHeads, q_there.get(), k_there.get(), v_there.get(), nullptr, nullptr, 1e-6f, rope_there.get(),
                                      q_out_there.get(), 0.5f, {bytes(kv_there.get()), kKvHeads, kPage, dim}},
                                     lanes.device);
      CHECK(same_bytes(kv_there.values(), kv_values));
    }
  }
}

}  // namespace moebius
