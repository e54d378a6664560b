#pragma once

#include "lib/runtime/engine.h"
#include "moebius/moebius.h"

struct moebius_request {
  moebius::RequestSpec spec;
};
