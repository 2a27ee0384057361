// Block routing, first part: a token's scores in the registers of a warp, and the best of them.
// Lane l of a warp holds experts l, l + 32, l + 64, …: PER_LANE of them.
#pragma once

#include "device.cuh"
#include "dmoe_kernels.h"

namespace dmoe {

struct RouteArguments {
    DmoeRouteAttributes attributes;
    int rows, tokens, experts;
    const float *router_logits, *expert_bias;
    const int64_t *position_ids;
    const float *top_p;
    const int64_t *min_experts, *coreset_size;
    int32_t *expert_ids;
    float *expert_weights;
    uint8_t *coreset;
};

// Unsigned order of the result = order of the float; −0 = +0; NaN first; 0 is below every value.
DMOE_DEVICE uint32_t ordered_bits(float value) {
    if (value != value) return 0xffffffffu;
    const uint32_t bits = value == 0.0f ? 0u : __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DMOE_DEVICE float from_ordered_bits(uint32_t bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Softmax: exp(logit − peak) / total; sigmoid: peak and total are not used.
struct Scores {
    bool softmax;
    float peak, total;
    DMOE_DEVICE float of(float logit) const {
        return softmax ? expf(logit - peak) / total : 1.0f / (1.0f + expf(-logit));
    }
};

// Selection scores r of one token (score + bias), −inf beyond the last expert.
template <int PER_LANE>
DMOE_DEVICE Scores load_token(const RouteArguments &a, int64_t token, float (&r)[PER_LANE]) {
    const float *logits = a.router_logits + token * a.experts;
    const int lane = lane_id();
    Scores scores{a.attributes.softmax != 0, 0.0f, 1.0f};
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = lane + i * kWarp;
        r[i] = e < a.experts ? logits[e] : -INFINITY;
    }
    if (scores.softmax) {
        float peak = r[0], total = 0.0f;
        DMOE_UNROLL
        for (int i = 1; i < PER_LANE; ++i) peak = fmaxf(peak, r[i]);
        scores.peak = warp_max(peak);
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) total += expf(r[i] - scores.peak);
        scores.total = warp_sum(total);
    }
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = lane + i * kWarp;
        r[i] = e < a.experts ? scores.of(r[i]) + a.expert_bias[e] : -INFINITY;
    }
    return scores;
}

// The warp's largest key (lower expert first among equals) is set to 0; returns its expert, −1 when all are 0.
template <int PER_LANE>
DMOE_DEVICE int pop_best(uint32_t (&keys)[PER_LANE]) {
    const int lane = lane_id();
    uint32_t mine = keys[0];
    int at = 0;
    DMOE_UNROLL
    for (int i = 1; i < PER_LANE; ++i) {
        if (keys[i] > mine) {
            mine = keys[i];
            at = i;
        }
    }
    const uint32_t best = warp_max(mine);
    if (best == 0) return -1;
    const int expert = static_cast<int>(warp_min(mine == best ? static_cast<uint32_t>(lane + at * kWarp) : ~0u));
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (lane + i * kWarp == expert) keys[i] = 0;
    }
    return expert;
}

}  // namespace dmoe
