// dmoe_block_route: arguments checked, one launch.
#include "block_route.cuh"
#include "route_launch.cuh"

using namespace dmoe;

extern "C" int dmoe_block_route(const DmoeRouteAttributes *attributes, int32_t rows, int32_t tokens, int32_t experts,
                                const float *router_logits, const float *expert_bias, const int64_t *position_ids,
                                const float *top_p, const int64_t *min_experts, const int64_t *coreset_size,
                                int32_t *expert_ids, float *expert_weights, uint8_t *coreset, void *stream) {
    if (!attributes) return DMOE_ERROR_POINTER;
    RouteArguments a{*attributes, rows,        tokens,       experts,    router_logits,  expert_bias, position_ids,
                     top_p,       min_experts, coreset_size, expert_ids, expert_weights, coreset};
    const int error = check_route(a);
    if (error || rows == 0 || tokens == 0) return error;
    if (!router_logits) return DMOE_ERROR_POINTER;
    return launch_route(a, stream);
}
