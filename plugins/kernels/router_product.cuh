// First launch of DmoeRouter: logits = hidden · weightᵀ in float32. A thread block has 8 tokens and 8 experts; its 256
// threads split k, 8 at a time, so that each byte is asked for once, all at the start, straight into registers. A thread's
// 64 sums are then added up across the block. The order of a sum depends on H alone.
#pragma once

#include "device.cuh"
#include "route_scores.cuh"

namespace dmoe {

constexpr int kRouterThreads = 256, kRouterTokens = 8, kRouterExperts = 8;
constexpr int kRouterSums = kRouterTokens * kRouterExperts, kRouterWarps = kRouterThreads / kWarp;

struct RouterProductArguments {
    const uint4 *hidden;   // [tokens, units]
    const float4 *weight;  // [experts, 2 · units]
    float *logits;         // [tokens, experts]; may be null
    float *values;         // the same, or sigmoids of them
    int tokens, experts, units;  // of eight hidden values
    bool sigmoids;
};

// Lanes add up by halves: lane l ends with sums 2l and 2l + 1 of all lanes. COUNT: how many each pair of lanes shares out.
template <int COUNT = kRouterSums / 2>
DMOE_DEVICE void scatter_sums(float (&sums)[kRouterSums]) {
    constexpr int kDistance = COUNT / 2;
    const bool upper = lane_id() & kDistance;
    DMOE_UNROLL
    for (int i = 0; i < COUNT; ++i) {
        const float kept = upper ? sums[i + COUNT] : sums[i], sent = upper ? sums[i] : sums[i + COUNT];
        sums[i] = kept + __shfl_xor_sync(kWholeWarp, sent, kDistance);
    }
    if constexpr (COUNT > 2) scatter_sums<COUNT / 2>(sums);
}

template <class Half>
__global__ void __launch_bounds__(kRouterThreads, 1) router_product_kernel(RouterProductArguments a) {
    DMOE_SHARED(float2, partials, 2 * kRouterWarps *kRouterSums / 2);  // two buffers: a barrier less
    const int groups = (a.tokens + kRouterTokens - 1) / kRouterTokens, first_expert = blockIdx.x * kRouterExperts;
    const int chunks = (a.units + kRouterThreads - 1) / kRouterThreads;
    float4 weight[kRouterExperts][2];
    uint4 next[kRouterTokens];
    const auto load_weights = [&](int chunk) {
        const int unit = chunk * kRouterThreads + static_cast<int>(threadIdx.x);
        DMOE_UNROLL
        for (int e = 0; e < kRouterExperts; ++e) {
            const bool wanted = unit < a.units && first_expert + e < a.experts;
            const float4 *from = a.weight + 2 * (static_cast<int64_t>(first_expert + e) * a.units + unit);
            weight[e][0] = wanted ? from[0] : float4{0, 0, 0, 0};
            weight[e][1] = wanted ? from[1] : float4{0, 0, 0, 0};
        }
    };
    const auto load_tokens = [&](int group, int chunk) {
        const int unit = chunk * kRouterThreads + static_cast<int>(threadIdx.x);
        DMOE_UNROLL
        for (int t = 0; t < kRouterTokens; ++t) {
            const int token = group * kRouterTokens + t;
            const bool wanted = unit < a.units && token < a.tokens;
            next[t] = wanted ? a.hidden[static_cast<int64_t>(token) * a.units + unit] : uint4{0, 0, 0, 0};
        }
    };
    load_weights(0);  // constants: no need to wait for whoever makes the hidden state
    wait_for_predecessor();
    let_successor_start();
    load_tokens(blockIdx.y, 0);
    int buffer = 0;
    for (int group = blockIdx.y; group < groups; group += gridDim.y) {
        float sums[kRouterSums] = {};
        for (int chunk = 0; chunk < chunks; ++chunk) {
            uint4 x[kRouterTokens];
            DMOE_UNROLL
            for (int t = 0; t < kRouterTokens; ++t) x[t] = next[t];
            const bool last = chunk + 1 == chunks;
            if (!last || group + static_cast<int>(gridDim.y) < groups) {
                load_tokens(last ? group + static_cast<int>(gridDim.y) : group, last ? 0 : chunk + 1);
            }
            DMOE_UNROLL
            for (int i = 0; i < 8; ++i) {
                float row[kRouterTokens];
                DMOE_UNROLL
                for (int t = 0; t < kRouterTokens; ++t) row[t] = widen_at<Half>(x[t], i);
                DMOE_UNROLL
                for (int e = 0; e < kRouterExperts; ++e) {
                    const float w = float_at(weight[e][i / 4], i % 4);
                    DMOE_UNROLL
                    for (int t = 0; t < kRouterTokens; ++t) {
                        sums[t * kRouterExperts + e] = fmaf(row[t], w, sums[t * kRouterExperts + e]);
                    }
                }
            }
            if (chunks > 1) load_weights(last ? 0 : chunk + 1);
        }
        scatter_sums(sums);
        float2 *const mine = partials + buffer * kRouterWarps * kWarp;
        mine[warp_id() * kWarp + lane_id()] = float2{sums[0], sums[1]};
        __syncthreads();
        if (threadIdx.x < kRouterSums) {
            const float *from = reinterpret_cast<const float *>(mine) + threadIdx.x;
            float logit = from[0];
            DMOE_UNROLL
            for (int w = 1; w < kRouterWarps; ++w) logit += from[w * kRouterSums];
            const int token = group * kRouterTokens + static_cast<int>(threadIdx.x) / kRouterExperts;
            const int expert = first_expert + static_cast<int>(threadIdx.x) % kRouterExperts;
            if (token < a.tokens && expert < a.experts) {
                const int64_t at = static_cast<int64_t>(token) * a.experts + expert;
                if (a.logits) a.logits[at] = logit;
                a.values[at] = a.sigmoids ? sigmoid(logit) : logit;
            }
        }
        buffer ^= 1;
    }
}

}  // namespace dmoe
