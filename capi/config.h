// The configuration behind the C ABI: EngineConfig by key.
#pragma once

#include "lib/runtime/engine.h"
#include "moebius/moebius.h"

struct moebius_config {
  moebius::EngineConfig engine;
};
