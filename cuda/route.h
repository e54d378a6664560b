// From rows to experts: the router's choice, and the choices grouped by expert.
#pragma once

#include "lib/device/ops.h"

namespace moebius::cuda {

void route(const RouteArgs& args, const Lane& lane);
void group_experts(const GroupArgs& args, const Lane& lane);
void norm_route(const NormRouteArgs& args, const Lane& lane);
size_t scratch_bytes_route(const OpLimits& limits);

}  // namespace moebius::cuda
