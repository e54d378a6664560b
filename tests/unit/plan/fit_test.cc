// Fitting efficiencies to rows as moebius-bench prints them: of a machine that is known, because it is the model.
#include "examples/plan/fit.h"

#include <fstream>
#include <iterator>
#include <random>

#include "lib/base/error.h"
#include "tests/catch.h"

namespace moebius::plan {
namespace {

// Rows of a machine with such efficiencies; each step is off by a few percent.
std::string rows_of(Cluster machine, double noise) {
  std::mt19937_64 random(7);
  std::normal_distribution<double> gauss;
  std::string text = "{\"what\": \"profile\", \"op\": \"linear\"}\n";
  MeasuredModels models;
  for (const char* shape : {"s", "m"})
    for (int ranks : {1, 2, 4})
      for (const char* layout : {"tp", "ep"}) {
        const auto add = [&](const char* what, double batch, double tokens, double context) {
          Measured m{shape, layout, ranks, 0, batch, context, tokens, true, 60e9 * (1 + 0.2 * std::abs(gauss(random))), 1.1e12, 0};
          m.seconds = predicted_seconds(m, machine, models) * std::exp(noise * gauss(random));
          text += nlohmann::json{{"what", what},
                                 {"shape", shape},
                                 {"batch", batch},
                                 {"tokens", tokens},
                                 {"context", context},
                                 {"ranks", ranks},
                                 {"layout", layout},
                                 {"mode", "exact"},
                                 {"tokens_per_second", (tokens > 0 ? tokens : batch) / m.seconds},
                                 {"read_bytes_per_second", m.read_rate},
                                 {"bf16_flops", m.matrix_rate}}
                      .dump() +
                  "\n";
        };
        for (double batch : {1, 4, 16, 64, 256})
          for (double context : {64, 1024}) add("decode", batch, 0, context);
        for (double tokens : {64, 512, 1024}) add("prefill", 1, tokens, 0);
      }
  return text;
}

}  // namespace

TEST_CASE("the efficiencies of a known machine are found from half of its rows, and predict the other half and the faster layout") {
  Cluster machine = read_cluster("2xcpu");
  machine.efficiency = {0.72, 0.55, 0.4};
  const auto points = parse_measured(rows_of(machine, 0.03), "rows.jsonl");
  machine.efficiency = {1, 1, 1};
  for (const char* shape : {"", "s"}) {  // every other group; or one model judged by the other
    const auto result = fit(points, machine, shape);
    INFO(result.dump());
    CHECK(result["simulated"] == true);
    CHECK(result["efficiency"]["memory"].get<double>() == Approx(0.72).epsilon(0.1));
    CHECK(result["efficiency"]["matrix"].get<double>() == Approx(0.55).epsilon(0.1));
    CHECK(result["efficiency"]["link"].get<double>() == Approx(0.4).epsilon(0.25));
    CHECK(result["judged_median_error"].get<double>() < 0.05);
    CHECK(result["sides"]["of"].get<int>() >= 10);
    CHECK(result["sides"]["right"].get<int>() >= 0.9 * result["sides"]["of"].get<int>());
    CHECK(table_of_fit(result).find("SIMULATED") == 0);
  }
}

// Steps of models m and s, one and two ranks, both layouts: of docs/performance.md (Zen 5), and of moebius-bench with several contexts (Zen 4).
TEST_CASE("real machines: half of the points predict the other half within 15 % at the median, and the faster layout") {
  const auto [file, count] = GENERATE(table<const char*, size_t>({{"performance-2026-11-25.jsonl", 20}, {"bench-2026-11-29.jsonl", 90}}));
  std::ifstream in(MOEBIUS_TEST_DATA "/plan/" + std::string(file));
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  const auto points = parse_measured(text, file);
  REQUIRE(points.size() == count);
  for (const char* shape : {"", "s", "m"}) {
    const auto result = fit(points, read_cluster("2core-zen5"), shape);
    INFO(table_of_fit(result));
    CHECK(result["judged_median_error"].get<double>() < 0.15);
    CHECK(result["sides"]["right"].get<int>() >= 0.8 * result["sides"]["of"].get<int>());
  }
}

TEST_CASE("equal rows count once, by their median; what cannot be a row is named by its line") {
  const std::string row =
      R"({"what":"decode","shape":"s","batch":8,"context":64,"ranks":2,"layout":"tp","read_bytes_per_second":1e10,"bf16_flops":1e12,"tokens_per_second":)";
  const auto points = parse_measured(row + "100}\n" + row + "200}\n" + row + "400}\n", "rows.jsonl");
  REQUIRE(points.size() == 1);
  CHECK(points[0].seconds == 8 / 200.0);
  CHECK_THROWS_WITH(parse_measured(row + "100}\n" + row + "0}\n", "rows.jsonl"),
                    Catch::Contains("rows.jsonl:2") && Catch::Contains("tokens_per_second"));
  CHECK_THROWS_WITH(parse_measured("{\"what\": \"load\"}\n", "rows.jsonl"),
                    Catch::Contains("rows.jsonl") && Catch::Contains("no decode or prefill row"));
  CHECK_THROWS_WITH(parse_measured("nonsense\n", "rows.jsonl"), Catch::Contains("rows.jsonl:1"));
  CHECK_THROWS_WITH(fit(points, read_cluster("2xcpu"), ""), Catch::Contains("1 points to fit and 0 to judge"));
}

}  // namespace moebius::plan
