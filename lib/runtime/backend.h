// Where an engine's ranks work, by the name that the configuration gives: the CPU, or a module loaded at run time.
#pragma once

#include <memory>

#include "lib/device/device.h"
#include "lib/runtime/engine.h"

namespace moebius {

// Throws kInvalidArgument for a name or a number that cannot be, kUnsupported when the module is not there, is of another build, or
// finds no device.
std::unique_ptr<Device> open_device(const EngineConfig& config);

}  // namespace moebius
