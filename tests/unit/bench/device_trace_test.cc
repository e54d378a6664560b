// What a profile of a GPU adds up: the profiler's records to shares of a step.
#include "examples/common/device_trace.h"

#include "tests/catch.h"

using namespace moebius_examples;

TEST_CASE("a run adds what it ends later than all before it") {
  // b begins early and waits for a; c lies inside b; a again after a gap of 50.
  const auto out = shares_of({{"b", 80, 150}, {"a", 0, 100}, {"c", 110, 140}, {"a", 200, 230}});
  REQUIRE(out.size() == 3);
  CHECK(out[0].name == "a");
  CHECK(out[0].runs == 2);
  CHECK(out[0].seconds == Approx(130e-9));
  CHECK(out[0].added == Approx(130e-9));
  CHECK(out[1].name == "b");
  CHECK(out[1].seconds == Approx(70e-9));
  CHECK(out[1].added == Approx(50e-9));
  CHECK(out[2].added == 0);
  CHECK(shares_of({}).empty());
}

TEST_CASE("kernels go by their own names") {
  CHECK(short_kernel_name("void moebius::cuda::(anonymous namespace)::route_kernel<1, 4>(moebius::RouteArgs, float*, long, unsigned int*)") == "route_kernel<1, 4>");
  CHECK(short_kernel_name("moebius::cuda::(anonymous namespace)::add_norm_kernel(moebius::AddNormArgs, moebius::cuda::(anonymous namespace)::Partials)") ==
        "add_norm_kernel");
  CHECK(short_kernel_name("void cub::detail::radix::sort<cub::policy<int, unsigned int>, true, (cub::Order)0, a::very_long_one>(int const*)") == "sort");
  CHECK(short_kernel_name("sm90_xmma_gemm") == "sm90_xmma_gemm");
  CHECK(short_kernel_name("_Z3") == "_Z3");
}
