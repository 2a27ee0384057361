// Block routing, first part: a token's scores in the registers of a warp.
// Lane l of a warp holds experts l · per, l · per + 1, …, per = ⌈E / 32⌉ of them: a lower lane has lower experts.
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
    int per_lane;  // ⌈experts / 32⌉
    int share;     // tokens that a thread block selects experts for; at most 32
    bool scored;   // router_logits are scores already
};

// Unsigned order of the result = order of the float, which is not −0; 0 is below every value. NaN: above all if positive,
// as a GPU makes them, else below all.
DMOE_DEVICE uint32_t ordered_bits_of_score(float value) {
    const uint32_t bits = __float_as_uint(value);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// The same for any float: −0 = +0, NaN first.
DMOE_DEVICE uint32_t ordered_bits(float value) {
    return value != value ? 0xffffffffu : ordered_bits_of_score(value + 0.0f);
}

DMOE_DEVICE float from_ordered_bits(uint32_t bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

DMOE_DEVICE float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

// Softmax: exp(logit − peak) / total; otherwise peak and total are not used.
struct Scores {
    bool softmax, scored;
    float peak, total;
    DMOE_DEVICE float of(float logit) const {
        return scored ? logit : softmax ? expf(logit - peak) / total : sigmoid(logit);
    }
};

// The lane's part of a row of `experts` floats, `beyond` past the end of the row.
template <int PER_LANE>
DMOE_DEVICE void load_row(const RouteArguments &a, const float *row, float beyond, float (&to)[PER_LANE]) {
    const int first = lane_id() * a.per_lane;
    if (a.per_lane == PER_LANE && a.experts % 4 == 0) {
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; i += 4) {
            float4 four{beyond, beyond, beyond, beyond};
            if (first + i < a.experts) four = *reinterpret_cast<const float4 *>(row + first + i);
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
        return;
    }
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) to[i] = i < a.per_lane && first + i < a.experts ? row[first + i] : beyond;
}

// Selection scores r of one token (score + bias), −inf beyond the last expert.
template <int PER_LANE>
DMOE_DEVICE Scores load_token(const RouteArguments &a, int64_t token, float (&r)[PER_LANE]) {
    float bias[PER_LANE];
    load_row(a, a.router_logits + token * a.experts, -INFINITY, r);
    load_row(a, a.expert_bias, 0.0f, bias);
    Scores scores{a.attributes.softmax != 0, a.scored, 0.0f, 1.0f};
    // A loop for each kind: a branch inside an unrolled one would make its elements wait for each other.
    if (scores.softmax) {
        float peak = r[0], total = 0.0f;
        DMOE_UNROLL
        for (int i = 1; i < PER_LANE; ++i) peak = fmaxf(peak, r[i]);
        scores.peak = warp_max(peak);
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) total += r[i] = expf(r[i] - scores.peak);
        scores.total = warp_sum(total);
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) r[i] = r[i] / scores.total;
    } else if (!scores.scored) {
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) r[i] = sigmoid(r[i]);
    }
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) r[i] = r[i] + bias[i];  // not −0, as no score is
    if (a.experts != PER_LANE * kWarp) {
        const int count = min(a.per_lane, a.experts - lane_id() * a.per_lane);
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) r[i] = i < count ? r[i] : -INFINITY;
    }
    return scores;
}

}  // namespace dmoe
