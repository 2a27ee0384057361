// The best of a warp's keys, one after another. Lane l has the keys of experts l · per_lane, l · per_lane + 1, …; a key of 0
// is none.
#pragma once

#include "device.cuh"

namespace dmoe {

// What lane j knows of the expert at place j: −1 and 0 where there is none.
struct Place {
    int expert;
    uint32_t key;
};

// The best `wanted`, however many are equal: one in every round.
template <int PER_LANE>
DMOE_DEVICE Place pop_best(uint32_t (&keys)[PER_LANE], int per_lane, int wanted) {
    Place mine{-1, 0u};
    for (int place = 0; place < wanted; ++place) {
        uint32_t head = keys[0];
        DMOE_UNROLL
        for (int i = 1; i < PER_LANE; ++i) head = max(head, keys[i]);
        const uint32_t best = warp_max(head);
        if (best == 0) break;
        const int owner = __ffs(static_cast<int>(__ballot_sync(kWholeWarp, head == best))) - 1;
        int at = 0;
        DMOE_UNROLL
        for (int i = PER_LANE - 1; i >= 0; --i) at = keys[i] == best ? i : at;
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) keys[i] = lane_id() == owner && i == at ? 0u : keys[i];
        const int expert = __shfl_sync(kWholeWarp, lane_id() * per_lane + at, owner);
        if (lane_id() == place) mine = Place{expert, best};
    }
    return mine;
}

// The sum of `value` (0 … PER_LANE) over the lanes before, and over all.
template <int PER_LANE>
DMOE_DEVICE int lanes_before(int value, int &total) {
    int before = 0;
    total = 0;
    DMOE_UNROLL
    for (int bit = 0; 1 << bit <= PER_LANE; ++bit) {
        const unsigned ballot = __ballot_sync(kWholeWarp, value >> bit & 1);
        before += __popc(ballot & ((1u << lane_id()) - 1)) << bit;
        total += __popc(ballot) << bit;
    }
    return before;
}

template <int PER_LANE>
DMOE_DEVICE int count_from(const uint32_t (&keys)[PER_LANE], uint32_t least) {
    int count = 0;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) count += keys[i] >= least;
    return count;
}

// The `wanted`-th largest of the lanes' largest keys, of which none of the best `wanted` is smaller; 1 if not so many
// lanes have keys.
template <int PER_LANE>
DMOE_DEVICE uint32_t least_of_best(const uint32_t (&keys)[PER_LANE], int wanted) {
    uint32_t head = keys[0], best = 1;
    DMOE_UNROLL
    for (int i = 1; i < PER_LANE; ++i) head = max(head, keys[i]);
    for (int seen = 0; seen < wanted && best != 0;) {
        best = warp_max(head);
        seen += __popc(__ballot_sync(kWholeWarp, head == best));
        if (head == best) head = 0;
    }
    return max(best, 1u);
}

constexpr int kBestScratch = 3 * kWarp;  // words

// The best `wanted` (at most 32), larger first, then the lower expert: lane j gets place j. `scratch`: kBestScratch words of
// the warp's own, 16-byte aligned. The keys that may be among the best are put side by side; each lane takes one and
// counts those that are better, so nothing is found one after another.
template <int PER_LANE>
DMOE_DEVICE Place best_experts(uint32_t (&keys)[PER_LANE], int per_lane, int wanted, uint32_t *scratch) {
    const int lane = lane_id();
    uint32_t least = 1;
    int total;
    int at = lanes_before<PER_LANE>(count_from(keys, least), total);
    if (total > kWarp) {
        least = least_of_best(keys, wanted);
        at = lanes_before<PER_LANE>(count_from(keys, least), total);
        if (total > kWarp) return pop_best(keys, per_lane, wanted);
    }
    uint32_t *const found = scratch, *const expert_of = scratch + kWarp, *const places = scratch + 2 * kWarp;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (keys[i] < least) continue;
        found[at] = keys[i];
        expert_of[at++] = static_cast<uint32_t>(lane * per_lane + i);
    }
    if (lane >= total) found[lane] = 0;
    places[lane] = kWarp;
    __syncwarp();
    const uint32_t mine = found[lane];
    int better = 0;
    for (int j = 0; j < total; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4 *>(found + j);
        better += four.x > mine || (four.x == mine && j < lane);
        better += four.y > mine || (four.y == mine && j + 1 < lane);
        better += four.z > mine || (four.z == mine && j + 2 < lane);
        better += four.w > mine || (four.w == mine && j + 3 < lane);
    }
    if (lane < total) places[better] = static_cast<uint32_t>(lane);
    __syncwarp();
    const uint32_t chosen = places[lane];
    Place place{-1, 0u};
    if (chosen < static_cast<uint32_t>(kWarp) && lane < wanted) {
        place = Place{static_cast<int>(expert_of[chosen]), found[chosen]};
    }
    __syncwarp();
    return place;
}

}  // namespace dmoe
