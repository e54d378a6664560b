// What every program does with its standard streams and how it ends. Knows nothing of the library.
#pragma once

#include <fcntl.h>
#include <csignal>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

#include <fmt/format.h>

namespace moebius_examples {

// Bad usage or bad input found before anything ran: exit status 2.
class BadInput : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Says it on stderr, where there is one: what cannot be written is lost and changes nothing else.
template <class... T>
void complain(fmt::format_string<T...> format, T&&... args) noexcept {
  try {
    const std::string text = fmt::format(format, std::forward<T>(args)...);
    std::fwrite(text.data(), 1, text.size(), stderr);
  } catch (...) {
  }
}

// Throws where results did not reach stdout.
inline void flush_results() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) throw std::runtime_error("cannot write to standard output");
}

// The status that `run` returns; 2 where it throws BadInput or another of Bad, 1 for any other failure.
template <class... Bad, class Run>
int exit_status_of(const char* name, Run&& run) {
  for (int ends : {SIGPIPE, SIGXFSZ}) std::signal(ends, SIG_IGN);  // what cannot be written is an error of ours, never a signal
  for (int fd : {0, 1, 2})
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDONLY);  // a file opened later would take the place of a closed stream
  try {
    const int status = run();
    flush_results();
    return status;
  } catch (const std::exception& e) {
    complain("{}: {}\n", name, e.what());
    const bool bad = dynamic_cast<const BadInput*>(&e) != nullptr || (... || (dynamic_cast<const Bad*>(&e) != nullptr));
    return bad ? 2 : 1;
  }
}

}  // namespace moebius_examples
