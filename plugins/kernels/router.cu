// dmoe_router: logits, then routing on them or on their sigmoids; two launches.
#include "route_launch.cuh"
#include "router_product.cuh"

using namespace dmoe;

namespace {

int check_shape(const DmoeRouterShape *s) {
    if (!s) return DMOE_ERROR_POINTER;
    if (s->type != DMOE_TYPE_FP16 && s->type != DMOE_TYPE_BF16) return DMOE_ERROR_TYPE;
    if (s->rows < 0 || s->rows > 65535 || s->tokens < 0 || s->experts < 1 || s->experts > 1024 || s->hidden < 8 ||
        s->hidden % 8 != 0 || s->hidden > 1 << 18 || static_cast<int64_t>(s->rows) * s->tokens > 1 << 30) {
        return DMOE_ERROR_SHAPE;
    }
    return 0;
}

template <class Half>
int launch_product(const RouterProductArguments &a, void *stream) {
    constexpr auto kKernel = router_product_kernel<Half>;
    const int columns = (a.experts + kRouterExperts - 1) / kRouterExperts;
    const int groups = (a.tokens + kRouterTokens - 1) / kRouterTokens;
    const int at_once = max(1, resident_blocks<kKernel>(kRouterThreads) / columns);
    return launch<kKernel>(dim3(columns, min(groups, at_once)), kRouterThreads, stream, a, LaunchOptions{0, true});
}

}  // namespace

extern "C" int64_t dmoe_router_workspace_bytes(const DmoeRouterShape *shape) {
    if (const int error = check_shape(shape)) return error;
    return (static_cast<int64_t>(shape->rows) * shape->tokens * shape->experts * 4 + 255) / 256 * 256;
}

extern "C" int dmoe_router(const DmoeRouterShape *shape, const DmoeRouteAttributes *attributes, const void *hidden,
                           const float *router_weight, const float *expert_bias, const int64_t *position_ids,
                           const float *top_p, const int64_t *min_experts, const int64_t *coreset_size,
                           int32_t *expert_ids, float *expert_weights, float *router_logits, void *workspace,
                           void *stream) {
    if (const int error = check_shape(shape)) return error;
    if (!attributes) return DMOE_ERROR_POINTER;
    auto *const values = static_cast<float *>(workspace);
    const RouteArguments route{*attributes,  shape->rows, shape->tokens,  shape->experts, values,
                               expert_bias,  position_ids, top_p,         min_experts,    coreset_size,
                               expert_ids,   expert_weights, nullptr,     0,              0,
                               !attributes->softmax};
    const int error = check_route(route);
    if (error || shape->rows == 0 || shape->tokens == 0) return error;
    if (!hidden || !router_weight || !workspace || !aligned_16(hidden) || !aligned_16(router_weight) ||
        reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
        return DMOE_ERROR_POINTER;
    }
    if (shape->type == DMOE_TYPE_BF16 && !bf16_runs_here()) return DMOE_ERROR_TYPE;
    const RouterProductArguments product{static_cast<const uint4 *>(hidden),
                                         reinterpret_cast<const float4 *>(router_weight),
                                         router_logits,
                                         values,
                                         shape->rows * shape->tokens,
                                         shape->experts,
                                         shape->hidden / 8,
                                         route.scored};
    const int launched = shape->type == DMOE_TYPE_FP16 ? launch_product<Fp16>(product, stream)
                                                       : launch_product<Bf16>(product, stream);
    return launched ? launched : launch_route(route, stream, true);
}
