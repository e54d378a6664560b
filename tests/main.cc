// The one translation unit that compiles Catch2's runner.
#define CATCH_CONFIG_RUNNER
#include "tests/catch.h"

#include <cstdio>

// Why this program's tests cannot run here; null when they can. A program without such a reason has no such function.
[[gnu::weak]] const char* why_skipped();
// What must go before the process's own ending; a program without it has no such function.
[[gnu::weak]] void after_tests();

int main(int argc, char** argv) {
  if (why_skipped != nullptr)
    if (const char* why = why_skipped(); why != nullptr) {
      std::fprintf(stderr, "skipped: %s\n", why);
      return 77;  // SKIP_RETURN_CODE
    }
  const int result = Catch::Session().run(argc, argv);
  if (after_tests != nullptr) after_tests();
  return result;
}
