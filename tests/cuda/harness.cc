#include "tests/cuda/harness.h"

namespace moebius {
namespace {

std::unique_ptr<Device> device;
std::string failure;

void open_once() {
  if (device != nullptr || !failure.empty()) return;
  try {
    device = open_module_device(MOEBIUS_TEST_DEVICE, {.ranks = 4, .row_major = 1});
  } catch (const std::exception& e) {
    failure = e.what();
  }
}

}  // namespace

Device& test_device() {
  open_once();
  if (device == nullptr) throw std::runtime_error(failure);
  return *device;
}

}  // namespace moebius

// A module's runtime ends before what is static here would.
void after_tests() { moebius::device.reset(); }

// Only where there is no GPU: a module that is missing or fails otherwise is a failure.
const char* why_skipped() {
  moebius::open_once();
  return moebius::failure.find("finds no device") != std::string::npos ? moebius::failure.c_str() : nullptr;
}
