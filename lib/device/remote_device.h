// Ranks in processes of their own, one for each: this process plans and tells, theirs hold the memory and do the work of a module's device.
// Ranks read each other's memory through handles of the device's (CUDA IPC).
#pragma once

#include <memory>
#include <string>

#include "lib/device/device.h"
#include "lib/device/module.h"

namespace moebius {

// Starts a process (moebius-rank, from where modules are looked for) for each rank, which loads libmoebius-<name>.so. Throws as
// open_module_device does. A process that ends makes its rank fail (kRankFailed); all of them end with the device, and with this process.
std::unique_ptr<Device> open_remote_device(const std::string& name, const ModuleOptions& options);

}  // namespace moebius
