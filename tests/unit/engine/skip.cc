// With MOEBIUS_TEST_DEVICE the engine's tests are skipped where that device is not: tests/main.cc.
#include <cstdlib>
#include <string>

#include "lib/device/module_device.h"

const char* why_skipped() {
  static std::string why;
  const char* device = std::getenv("MOEBIUS_TEST_DEVICE");
  if (device == nullptr) return nullptr;
  try {
    moebius::open_module_device(device, {});
  } catch (const std::exception& e) {
    why = e.what();
  }
  return why.find("finds no device") != std::string::npos ? why.c_str() : nullptr;  // any other failure is one
}
