// Block routing, last part: a token's experts from the coreset of its block, and what is written for it.
#pragma once

#include "route_scores.cuh"

namespace dmoe {

// Bit i: the lane's expert i is in a kept group. `scratch` holds one float per expert, this warp's own.
// A group scores the sum of its two largest r; experts that are not usable count as −inf.
template <int PER_LANE>
DMOE_DEVICE uint32_t kept_groups(const RouteArguments &a, const float (&r)[PER_LANE], uint32_t usable, float *scratch) {
    const int lane = lane_id(), groups = a.attributes.num_groups, size = a.experts / groups;
    if (a.attributes.groups_kept >= groups) return ~0u;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (lane + i * kWarp < a.experts) scratch[lane + i * kWarp] = usable >> i & 1u ? r[i] : -INFINITY;
    }
    __syncwarp();
    float score[PER_LANE];
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int group = lane + i * kWarp;
        if (group >= groups) continue;
        float first = -INFINITY, second = -INFINITY;
        int member = lane % size;  // lanes start at different members: fewer bank conflicts
        for (int j = 0; j < size; ++j) {
            const float value = scratch[group * size + member];
            if (++member == size) member = 0;
            second = fmaxf(second, fminf(first, value));
            first = fmaxf(first, value);
        }
        score[i] = size == 1 ? first : first + second;
    }
    __syncwarp();
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (lane + i * kWarp < groups) scratch[lane + i * kWarp] = score[i];
    }
    __syncwarp();
    uint32_t kept = 0;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int group = lane + i * kWarp;
        if (group >= groups) continue;
        int better = 0;
        for (int other = 0; other < groups; ++other) {
            const float value = scratch[other];
            better += value > score[i] || (value == score[i] && other < group);
        }
        kept |= static_cast<uint32_t>(better < a.attributes.groups_kept) << i;
    }
    __syncwarp();
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (lane + i * kWarp < groups) scratch[lane + i * kWarp] = static_cast<float>(kept >> i & 1u);
    }
    __syncwarp();
    const uint32_t reciprocal = ((1u << 20) + size - 1) / size;  // e · reciprocal >> 20 = e / size for e < 1024
    uint32_t bits = 0;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const uint32_t e = lane + i * kWarp;
        if (e < static_cast<uint32_t>(a.experts) && scratch[e * reciprocal >> 20] != 0.0f) bits |= 1u << i;
    }
    __syncwarp();
    return bits;
}

// A token's outputs. members: bit i = the lane's expert i is in the coreset.
template <int PER_LANE>
DMOE_DEVICE void select_and_write(const RouteArguments &a, int64_t token, const float (&r)[PER_LANE],
                                  const Scores &scores, uint32_t members, float *scratch) {
    const int lane = lane_id(), k = a.attributes.experts_per_token;
    uint32_t usable = 0;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        usable |= static_cast<uint32_t>(members >> i & 1u && fabsf(r[i]) < INFINITY) << i;
    }
    const uint32_t in_group = kept_groups(a, r, usable, scratch);
    int expert = -1, place = 0;  // lane j keeps the expert of place j
    for (int pass = 0; pass < 2 && place < k; ++pass) {  // the kept groups, then the rest of the coreset
        const uint32_t wanted = usable & (pass == 0 ? in_group : ~in_group);
        uint32_t keys[PER_LANE];
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) keys[i] = wanted >> i & 1u ? ordered_bits(r[i]) : 0u;
        for (; place < k; ++place) {
            const int best = pop_best(keys);
            if (best < 0) break;
            if (lane == place) expert = best;
        }
    }
    float weight = expert < 0 ? 0.0f : scores.of(a.router_logits[token * a.experts + expert]);
    if (a.attributes.renormalise) weight = weight / (warp_sum(weight) + 1e-20f);
    if (lane < k) {
        a.expert_ids[token * k + lane] = expert;
        a.expert_weights[token * k + lane] = weight * a.attributes.routed_scaling;
    }
    if (a.coreset) {
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) {
            const int e = lane + i * kWarp;
            if (e < a.experts) a.coreset[token * a.experts + e] = members >> i & 1u;
        }
    }
}

// One warp writes what a padding token gets.
DMOE_DEVICE void write_padding(const RouteArguments &a, int64_t token) {
    const int lane = lane_id(), k = a.attributes.experts_per_token;
    if (lane < k) {
        a.expert_ids[token * k + lane] = -1;
        a.expert_weights[token * k + lane] = 0.0f;
    }
    for (int e = lane; a.coreset && e < a.experts; e += kWarp) a.coreset[token * a.experts + e] = 0;
}

}  // namespace dmoe
