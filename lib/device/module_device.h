// A device that a module implements (module.h). The library itself links no GPU library: what a module needs is loaded with it.
#pragma once

#include <memory>
#include <string>

#include "lib/device/device.h"
#include "lib/device/module.h"

namespace moebius {

// A module of this library's build, loaded from a file; throws as below. `name` is what messages call it.
const DeviceModule& load_module_file(const std::string& name, const std::string& file);
// The same by the device's name; out_file: where it was found.
const DeviceModule& load_module(const std::string& name, std::string* out_file = nullptr);
bool has_module(const std::string& name);  // its file stands where modules are looked for
// A program that stands where modules are looked for. Throws kUnsupported.
std::string find_beside(const std::string& program);

// Loads libmoebius-<name>.so from the folders of MOEBIUS_MODULE_PATH (separated by ':'), or else from where this library is (the folder
// itself, moebius/ in it, or ../lib beside a program's). Throws kInvalidArgument for a name that is none, kUnsupported when the module
// cannot be loaded, is not of this build, or finds no device. A module stays loaded.
std::unique_ptr<Device> open_module_device(const std::string& name, const ModuleOptions& options);

}  // namespace moebius
