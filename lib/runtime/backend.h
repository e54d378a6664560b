// Where an engine's ranks work, by the name that the configuration gives: the CPU, or a module loaded at run time.
#pragma once

#include <memory>

#include "lib/device/device.h"
#include "lib/model/config.h"
#include "lib/runtime/engine.h"

namespace moebius {

// Whether the LM head is kept as rows, which cuBLASLt multiplies by, and not packed.
inline bool row_major_head(const EngineConfig& config) { return config.device != "cpu" && config.fast(); }

// Throws kInvalidArgument for a name or a number that cannot be, kUnsupported when the module is not there, is of another build, or
// finds no device.
std::unique_ptr<Device> open_device(const EngineConfig& config);
// The same for a model, which must not be beyond the module's kernels (kUnsupported).
std::unique_ptr<Device> open_device(const EngineConfig& config, const ModelConfig& model);

}  // namespace moebius
