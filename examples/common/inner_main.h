// The end of a program over the library's inner parts, where bad input is a moebius::Error too.
// Programs over the public headers end by run_program (options.h).
#pragma once

#include <CLI/CLI.hpp>

#include "examples/common/program.h"
#include "lib/base/error.h"

namespace moebius_examples {

// `run` gives the exit status where nothing is thrown.
template <class Run>
int inner_main(const char* name, Run&& run) {
  return exit_status_of<CLI::Error, moebius::Error>(name, run);
}

}  // namespace moebius_examples
