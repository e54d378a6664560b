// What a GPU did while it was watched, by NVIDIA's profiling interface (CUPTI), which is loaded when it is asked for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moebius_examples {

// A kernel, copy or fill, in nanoseconds of one clock.
struct DeviceRun {
  std::string name;
  uint64_t begin = 0, end = 0;
};

// Of all runs of one name. Kernels overlap: one adds what it ends later than all that began before it.
struct DeviceShare {
  std::string name;
  int64_t runs = 0;
  double seconds = 0;  // from begin to end, summed
  double added = 0;    // of these, added to the whole
};
std::vector<DeviceShare> shares_of(std::vector<DeviceRun> runs);  // those that add most first

// A kernel's name without its namespaces and parameters, and without template arguments where they are long.
std::string short_kernel_name(std::string_view demangled);

// Watches from here on until stop(). One at a time in a process, by one thread. Throws std::runtime_error where CUPTI cannot be had.
class DeviceTrace {
 public:
  DeviceTrace();
  std::vector<DeviceRun> stop();
};

}  // namespace moebius_examples
