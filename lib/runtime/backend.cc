#include "lib/runtime/backend.h"

#include "lib/base/error.h"
#include "lib/cpu/cpu_device.h"
#include "lib/cpu/cpu_ops.h"
#include "lib/device/module_device.h"

namespace moebius {

std::unique_ptr<Device> open_device(const EngineConfig& config) {
  if (config.device == "cpu") {
    if (!config.device_ids.empty()) fail(Code::kInvalidArgument, "device_ids are of another device than the cpu");
    return std::make_unique<CpuDevice>(config.ranks, cpu_ops(config.isa));
  }
  if (config.plain_sums) fail(Code::kUnsupported, "plain_sums is of the cpu; device is '{}'", config.device);
  if (!config.device_ids.empty() && static_cast<int>(config.device_ids.size()) != config.ranks)
    fail(Code::kInvalidArgument, "device_ids has {} entries, there are {} ranks", config.device_ids.size(), config.ranks);
  return open_module_device(config.device, config.ranks, config.device_ids);
}

}  // namespace moebius
