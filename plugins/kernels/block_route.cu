// dmoe_block_route: arguments checked, one launch.
#include "block_route.cuh"
#include "route_launch.cuh"

namespace dmoe {

int check_route(const RouteArguments &a) {
    const DmoeRouteAttributes &at = a.attributes;
    if (a.rows < 0 || a.rows > 65535 || a.tokens < 0 || a.experts < 1 || a.experts > 1024) return DMOE_ERROR_SHAPE;
    if (at.mode < DMOE_MODE_TOKEN || at.mode > DMOE_MODE_TOP_C || at.block_length < 1 || at.block_length > 256 ||
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

namespace {

constexpr int kShare = 8;           // tokens: two for each of a processor's four schedulers
constexpr int kBlocksAtOnce = 128;  // about as many as there are processors; the size of a share changes no result

template <int PER_LANE, int MAX_WARPS>
int launch_route_kernel(const RouteArguments &a, void *stream, bool overlap) {
    const bool token_mode = a.attributes.mode == DMOE_MODE_TOKEN;
    const int warps = token_mode ? 4 : max(4, min(MAX_WARPS, static_cast<int>(a.attributes.block_length)));
    const dim3 grid((a.tokens + a.share - 1) / a.share, a.rows);
    return launch<block_route_kernel<PER_LANE, MAX_WARPS>>(grid, warps * kWarp, stream, a, LaunchOptions{0, overlap});
}

}  // namespace

int launch_route(RouteArguments a, void *stream, bool overlap) {
    a.per_lane = (a.experts + kWarp - 1) / kWarp;
    a.share = kShare;
    while (a.share < kWarp && static_cast<int64_t>(a.rows) * ((a.tokens + a.share - 1) / a.share) > kBlocksAtOnce) {
        a.share *= 2;
    }
    // Warps: as many tokens at once as the shared rows (32 KiB) allow.
    return a.experts <= 256 ? launch_route_kernel<8, 32>(a, stream, overlap)
                            : launch_route_kernel<32, 8>(a, stream, overlap);
}

}  // namespace dmoe

using namespace dmoe;

extern "C" int dmoe_block_route(const DmoeRouteAttributes *attributes, int32_t rows, int32_t tokens, int32_t experts,
                                const float *router_logits, const float *expert_bias, const int64_t *position_ids,
                                const float *top_p, const int64_t *min_experts, const int64_t *coreset_size,
                                int32_t *expert_ids, float *expert_weights, uint8_t *coreset, void *stream) {
    if (!attributes) return DMOE_ERROR_POINTER;
    RouteArguments a{*attributes, rows,        tokens,       experts,    router_logits,  expert_bias, position_ids,
                     top_p,       min_experts, coreset_size, expert_ids, expert_weights, coreset,
                     0,           0,           false};
    const int error = check_route(a);
    if (error || rows == 0 || tokens == 0) return error;
    if (!router_logits || !aligned_16(router_logits)) return DMOE_ERROR_POINTER;
    return launch_route(a, stream, false);
}
