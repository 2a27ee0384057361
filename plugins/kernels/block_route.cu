// dmoe_block_route: arguments checked, one launch.
#include "block_route.cuh"

using namespace dmoe;

namespace {

template <int PER_LANE, int MAX_WARPS>
int launch_route(const RouteArguments &a, void *stream) {
    const int warps = max(4, min(MAX_WARPS, static_cast<int>(a.attributes.block_length)));
    const int blocks = a.attributes.mode == DMOE_MODE_TOKEN ? (a.tokens + warps - 1) / warps : a.tokens;
    return launch(block_route_kernel<PER_LANE, MAX_WARPS>, dim3(blocks, a.rows), warps * kWarp, stream, a);
}

}  // namespace

extern "C" int dmoe_block_route(const DmoeRouteAttributes *attributes, int32_t rows, int32_t tokens, int32_t experts,
                                const float *router_logits, const float *expert_bias, const int64_t *position_ids,
                                const float *top_p, const int64_t *min_experts, const int64_t *coreset_size,
                                int32_t *expert_ids, float *expert_weights, uint8_t *coreset, void *stream) {
    if (!attributes) return DMOE_ERROR_POINTER;
    const DmoeRouteAttributes &at = *attributes;
    if (rows < 0 || rows > 65535 || tokens < 0 || experts < 1 || experts > 1024) return DMOE_ERROR_SHAPE;
    if (at.mode < DMOE_MODE_TOKEN || at.mode > DMOE_MODE_TOP_C || at.block_length < 1 || at.block_length > 128 ||
        at.experts_per_token < 1 || at.experts_per_token > 32 || at.experts_per_token > experts || at.num_groups < 1 ||
        experts % at.num_groups != 0 || at.groups_kept < 1 || at.groups_kept > at.num_groups) {
        return DMOE_ERROR_ATTRIBUTE;
    }
    if (rows == 0 || tokens == 0) return 0;
    const bool votes = at.mode == DMOE_MODE_TOP_P, fixed = at.mode == DMOE_MODE_TOP_C;
    if (!router_logits || !expert_bias || !position_ids || !expert_ids || !expert_weights || (votes && !top_p) ||
        (votes && !min_experts) || (fixed && !coreset_size)) {
        return DMOE_ERROR_POINTER;
    }
    const RouteArguments a{at,    rows,        tokens,       experts,    router_logits,  expert_bias, position_ids,
                           top_p, min_experts, coreset_size, expert_ids, expert_weights, coreset};
    // Warps: as many tokens at once as the shared rows (32 KiB) allow.
    return experts <= 256 ? launch_route<8, 32>(a, stream) : launch_route<32, 8>(a, stream);
}
