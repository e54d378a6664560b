// The one translation unit that compiles Catch2's runner.
#define CATCH_CONFIG_RUNNER
#include "tests/catch.h"

#include <cstdio>

// Why this program's tests cannot run here; null when they can. A program without such a reason has no such function.
[[gnu::weak]] const char* why_skipped();

int main(int argc, char** argv) {
  if (why_skipped != nullptr)
    if (const char* why = why_skipped(); why != nullptr) {
      std::fprintf(stderr, "skipped: %s\n", why);
      return 77;  // SKIP_RETURN_CODE
    }
  return Catch::Session().run(argc, argv);
}
