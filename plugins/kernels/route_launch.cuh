// What dmoe_block_route and dmoe_router ask of their arguments, and how the routing kernel is launched.
#pragma once

#include "block_route.cuh"

namespace dmoe {

inline bool aligned_16(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// 0 or DMOE_ERROR_*. The logits are the caller's to check. No work: only sizes and attributes count.
inline int check_route(const RouteArguments &a) {
    const DmoeRouteAttributes &at = a.attributes;
    if (a.rows < 0 || a.rows > 65535 || a.tokens < 0 || a.experts < 1 || a.experts > 1024) return DMOE_ERROR_SHAPE;
    if (at.mode < DMOE_MODE_TOKEN || at.mode > DMOE_MODE_TOP_C || at.block_length < 1 || at.block_length > 128 ||
        at.experts_per_token < 1 || at.experts_per_token > 32 || at.experts_per_token > a.experts || at.num_groups < 1 ||
        a.experts % at.num_groups != 0 || at.groups_kept < 1 || at.groups_kept > at.num_groups) {
        return DMOE_ERROR_ATTRIBUTE;
    }
    if (a.rows == 0 || a.tokens == 0) return 0;
    const bool votes = at.mode == DMOE_MODE_TOP_P, fixed = at.mode == DMOE_MODE_TOP_C;
    if (!a.expert_bias || !a.position_ids || !a.expert_ids || !a.expert_weights || (votes && !a.top_p) ||
        (votes && !a.min_experts) || (fixed && !a.coreset_size) || !aligned_16(a.expert_bias)) {
        return DMOE_ERROR_POINTER;
    }
    return 0;
}

template <int PER_LANE, int MAX_WARPS>
int launch_route_kernel(const RouteArguments &a, void *stream) {
    const bool token_mode = a.attributes.mode == DMOE_MODE_TOKEN;
    const int warps = token_mode ? 4 : max(4, min(MAX_WARPS, static_cast<int>(a.attributes.block_length)));
    return launch(block_route_kernel<PER_LANE, MAX_WARPS>, dim3((a.tokens + a.share - 1) / a.share, a.rows), warps * kWarp,
                  stream, a);
}

constexpr int kShare = 4;         // tokens: one for each of a processor's four schedulers
constexpr int kBlocksAtOnce = 128;  // about as many as there are processors

// One launch. Fills in per_lane and share. The size of a share changes no result.
inline int launch_route(RouteArguments a, void *stream) {
    a.per_lane = (a.experts + kWarp - 1) / kWarp;
    a.share = kShare;
    while (a.share < kWarp && static_cast<int64_t>(a.rows) * ((a.tokens + a.share - 1) / a.share) > kBlocksAtOnce) {
        a.share *= 2;
    }
    // Warps: as many tokens at once as the shared rows (32 KiB) allow.
    return a.experts <= 256 ? launch_route_kernel<8, 32>(a, stream) : launch_route_kernel<32, 8>(a, stream);
}

}  // namespace dmoe
