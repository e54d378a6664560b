#pragma once

#include "lib/base/error.h"
#include "lib/layout/types.h"
#include "moebius/moebius.h"

namespace moebius::capi {

inline Layout layout_of(moebius_layout layout) {
  if (layout != MOEBIUS_LAYOUT_TP && layout != MOEBIUS_LAYOUT_EP) fail(Code::kInvalidArgument, "layout {} is neither TP (0) nor EP (1)", layout);
  return static_cast<Layout>(layout);
}

}  // namespace moebius::capi
