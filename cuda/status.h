// What a module's function returns when it cannot do what was asked.
#pragma once

#include <cstdio>

#include "lib/base/code.h"
#include "lib/device/module.h"

namespace moebius::cuda {

// Sets the status, with a text by printf's rules, and returns its code.
template <class... Args>
int32_t refuse(ModuleStatus& status, Code code, const char* format, Args... args) {
  status.code = static_cast<int32_t>(code);
  std::snprintf(status.text, sizeof status.text, format, args...);
  return status.code;
}

}  // namespace moebius::cuda
