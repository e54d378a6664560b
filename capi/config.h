// The configuration behind the C ABI: EngineConfig by key.
#pragma once

#include "lib/runtime/engine.h"
#include "moebius/moebius.h"

struct moebius_config {
  moebius::EngineConfig engine;
  moebius_progress_fn progress = nullptr;
  void* progress_user = nullptr;
  moebius_warning_fn warning = nullptr;
  void* warning_user = nullptr;
};
