// The end of a program over the library's inner parts, where bad input is a moebius::Error: exit status 2; 1 for any other failure.
// Programs over the public headers end by run_program (options.h).
#pragma once

#include <csignal>
#include <cstdio>
#include <exception>
#include <stdexcept>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "lib/base/error.h"

namespace moebius_examples {

// `run` gives the exit status where nothing is thrown.
template <class Run>
int inner_main(const char* name, Run&& run) {
  const auto failed = [name](const std::exception& e, int status) {
    fmt::print(stderr, "{}: {}\n", name, e.what());
    return status;
  };
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is an error of ours, never a signal
  try {
    const int status = run();
    if (std::fflush(stdout) != 0 || std::ferror(stdout)) throw std::runtime_error("cannot write to standard output");
    return status;
  } catch (const CLI::Error& e) {
    return failed(e, 2);
  } catch (const moebius::Error& e) {
    return failed(e, 2);
  } catch (const std::exception& e) {
    return failed(e, 1);
  }
}

}  // namespace moebius_examples
