// What dmoe_block_route and dmoe_router share on the host; in block_route.cu.
#pragma once

#include "route_scores.cuh"

namespace dmoe {

inline bool aligned_16(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// 0 or DMOE_ERROR_*. The logits are the caller's to check. No work: only sizes and attributes count.
int check_route(const RouteArguments &a);

// One launch. Fills in per_lane and share. `overlap`: the launch before it is of the same op and makes nothing but the
// logits, so that all else may be read before it has ended.
int launch_route(RouteArguments a, void *stream, bool overlap);

}  // namespace dmoe
