// A device that a module implements (module.h). The library itself links no GPU library: what a module needs is loaded with it.
#pragma once

#include <memory>
#include <string>

#include "lib/device/device.h"
#include "lib/device/module.h"

namespace moebius {

// Loads libmoebius-<name>.so from the folders of MOEBIUS_MODULE_PATH (separated by ':'), or else from where this library is (the folder
// itself, moebius/ in it, or ../lib beside a program's). Throws kInvalidArgument for a name that is none, kUnsupported when the module
// cannot be loaded, is not of this build, or finds no device. A module stays loaded.
std::unique_ptr<Device> open_module_device(const std::string& name, const ModuleOptions& options);

}  // namespace moebius
