// Block routing, last part: a token's experts from the coreset of its block, and what is written for it.
#pragma once

#include "route_best.cuh"
#include "route_scores.cuh"

namespace dmoe {

// Whether fewer than groups_kept of the groups are better than a group: higher scores first, then the lower group.
template <class ScoreOf>
DMOE_DEVICE bool is_kept(const RouteArguments &a, int group, float score, ScoreOf score_of) {
    int better = 0;
    for (int other = 0; other < a.attributes.num_groups; ++other) {
        const float value = score_of(other);
        better += value > score || (value == score && other < group);
    }
    return better < a.attributes.groups_kept;
}

// The two largest of a set of values, in order.
struct TopTwo {
    float first = -INFINITY, second = -INFINITY;
    DMOE_DEVICE void add(float value) {
        second = fmaxf(second, fminf(first, value));
        first = fmaxf(first, value);
    }
    DMOE_DEVICE float score(int size) const { return size == 1 ? first : first + second; }
};

// Groups that are the experts of a power of two of lanes: their scores meet in registers.
template <int PER_LANE>
DMOE_DEVICE uint32_t kept_groups_of_lanes(const RouteArguments &a, const float (&r)[PER_LANE], uint32_t usable,
                                          int lanes) {
    TopTwo top;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) top.add(usable >> i & 1u ? r[i] : -INFINITY);
    for (int distance = 1; distance < lanes; distance *= 2) {
        const float first = __shfl_xor_sync(kWholeWarp, top.first, distance);
        const float second = __shfl_xor_sync(kWholeWarp, top.second, distance);
        top.add(first);
        top.second = fmaxf(top.second, second);
    }
    const float score = top.score(a.per_lane * lanes);
    const auto score_of = [&](int group) { return __shfl_sync(kWholeWarp, score, group * lanes); };
    return is_kept(a, lane_id() / lanes, score, score_of) ? ~0u : 0u;
}

// Bit i: the lane's expert i is in a kept group. `scratch` holds one float per expert, this warp's own.
// A group scores the sum of its two largest r; experts that are not usable count as −inf.
template <int PER_LANE>
DMOE_DEVICE uint32_t kept_groups(const RouteArguments &a, const float (&r)[PER_LANE], uint32_t usable, float *scratch) {
    const int lane = lane_id(), groups = a.attributes.num_groups, size = a.experts / groups, lanes = size / a.per_lane;
    if (a.attributes.groups_kept >= groups) return ~0u;
    if (size % a.per_lane == 0 && (lanes & (lanes - 1)) == 0) return kept_groups_of_lanes(a, r, usable, lanes);
    const int first = lane * a.per_lane;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (i < a.per_lane && first + i < a.experts) scratch[first + i] = usable >> i & 1u ? r[i] : -INFINITY;
    }
    __syncwarp();
    float score[PER_LANE];
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int group = lane + i * kWarp;
        if (group >= groups) continue;
        TopTwo top;
        int member = lane % size;  // lanes start at different members: fewer bank conflicts
        for (int j = 0; j < size; ++j) {
            top.add(scratch[group * size + member]);
            if (++member == size) member = 0;
        }
        score[i] = top.score(size);
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
        kept |= static_cast<uint32_t>(is_kept(a, group, score[i], [&](int other) { return scratch[other]; })) << i;
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
        const uint32_t e = first + i;
        const bool there = i < a.per_lane && e < static_cast<uint32_t>(a.experts);
        if (there && scratch[e * reciprocal >> 20] != 0.0f) bits |= 1u << i;
    }
    __syncwarp();
    return bits;
}

// A token's experts, place by place: the best of the kept groups, then the best of the rest of the coreset.
template <int PER_LANE>
DMOE_DEVICE int select_experts(const RouteArguments &a, const float (&r)[PER_LANE], uint32_t members, bool few,
                               float *scratch) {
    const int k = a.attributes.experts_per_token;
    uint32_t usable = 0, keys[PER_LANE];
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        usable |= static_cast<uint32_t>(members >> i & 1u && fabsf(r[i]) < INFINITY) << i;
    }
    const uint32_t in_group = kept_groups(a, r, usable, scratch);
    int expert = -1, taken = 0;
    for (int pass = 0; pass < 2 && taken < k; ++pass) {
        const uint32_t wanted = usable & (pass == 0 ? in_group : ~in_group);
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) keys[i] = wanted >> i & 1u ? ordered_bits_of_score(r[i]) : 0u;
        int found = best_experts(keys, a.per_lane, k - taken, few, true, reinterpret_cast<uint32_t *>(scratch)).expert;
        const unsigned filled = __ballot_sync(kWholeWarp, found >= 0);
        if (pass > 0) found = __shfl_up_sync(kWholeWarp, found, taken);
        if (lane_id() >= taken) expert = found;
        taken += __popc(filled);
    }
    return expert;
}

// A token's outputs. members: bit i = the lane's expert i is in the coreset; `few`: at most 32 may be selected from.
template <int PER_LANE>
DMOE_DEVICE void select_and_write(const RouteArguments &a, int64_t token, const float (&r)[PER_LANE],
                                  const Scores &scores, uint32_t members, bool few, float *scratch) {
    const int lane = lane_id(), k = a.attributes.experts_per_token;
    const int expert = select_experts(a, r, members, few, scratch);
    float weight = expert < 0 ? 0.0f : scores.of(a.router_logits[token * a.experts + expert]);
    if (a.attributes.renormalise) weight = weight / (warp_sum(weight) + 1e-20f);
    if (lane < k) {
        a.expert_ids[token * k + lane] = expert;
        a.expert_weights[token * k + lane] = weight * a.attributes.routed_scaling;
    }
    if (!a.coreset) return;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = lane * a.per_lane + i;
        if (i < a.per_lane && e < a.experts) a.coreset[token * a.experts + e] = members >> i & 1u;
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
