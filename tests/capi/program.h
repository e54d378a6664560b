// Runs a bundled program, and a folder for what it is given.
#pragma once

#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "tests/catch.h"

struct Output {
  int status = -1;
  std::string out;  // with stderr where it is asked for
};

inline Output output_of(const std::string& program, const std::string& arguments, bool with_errors = false) {
  FILE* pipe = popen(("'" + program + "' " + arguments + (with_errors ? " 2>&1" : " 2>/dev/null")).c_str(), "r");
  REQUIRE(pipe != nullptr);
  Output result;
  char text[4096];
  for (size_t n; (n = fread(text, 1, sizeof text, pipe)) > 0;) result.out.append(text, n);
  result.status = WEXITSTATUS(pclose(pipe));
  return result;
}

// Removed at the end.
class Folder {
 public:
  Folder() {
    char name[] = "/tmp/moebius-test-XXXXXX";
    REQUIRE(mkdtemp(name) != nullptr);
    path = name;
  }
  ~Folder() { std::filesystem::remove_all(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string path;
};
