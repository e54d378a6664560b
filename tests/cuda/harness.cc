#include "tests/cuda/harness.h"

namespace moebius {
namespace {

std::unique_ptr<Device> device;
std::string failure;

void open_once() {
  if (device != nullptr || !failure.empty()) return;
  try {
    device = open_module_device(MOEBIUS_TEST_DEVICE, 4, {});
  } catch (const std::exception& e) {
    failure = e.what();
  }
}

}  // namespace

bool has_device(std::string* why) {
  open_once();
  if (why != nullptr) *why = failure;
  return device != nullptr;
}

Device& test_device() {
  open_once();
  if (device == nullptr) throw std::runtime_error(failure);
  return *device;
}

}  // namespace moebius
