// The best of a warp's keys. Lane l has the keys of experts l · per_lane, l · per_lane + 1, …; a key of 0 is none.
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

// A lower bound of the `wanted`-th largest key: that of the lanes' largest keys; 1 if not so many lanes have keys.
template <int PER_LANE>
DMOE_DEVICE uint32_t least_of_best(const uint32_t (&keys)[PER_LANE], int wanted) {
    uint32_t head = keys[0], best = 1;
    DMOE_UNROLL
    for (int i = 1; i < PER_LANE; ++i) head = max(head, keys[i]);
    for (int place = 0; place < wanted; ++place) {
        best = warp_max(head);
        head = head == best ? 0u : head;
    }
    return max(best, 1u);
}

// Keys from `least` on side by side in `found`, their experts 32 words behind, in order of experts; how many there are.
// More than 32 are only counted.
template <int PER_LANE>
DMOE_DEVICE int collect(const uint32_t (&keys)[PER_LANE], int per_lane, uint32_t least, uint32_t *found) {
    int count = 0;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) count += keys[i] >= least;
    int at = count;  // up to and with this lane
    DMOE_UNROLL
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int left = __shfl_up_sync(kWholeWarp, at, distance);
        if (lane_id() >= distance) at += left;
    }
    const int total = __shfl_sync(kWholeWarp, at, kWarp - 1), first = lane_id() * per_lane;
    if (total > kWarp) return total;
    uint32_t *to = found + (at - count);
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (keys[i] >= least) {
            to[0] = keys[i];
            to[kWarp] = static_cast<uint32_t>(first + i);
            ++to;
        }
    }
    return total;
}

constexpr int kBestScratch = 3 * kWarp;  // words

// The best `wanted` (at most 32), larger first, then the lower expert: lane j gets place j. `scratch`: the warp's own,
// kBestScratch words, 16-byte aligned. `few`: no more than 32 keys are expected. `ordered`: which place is whose matters.
// The keys that may be among the best are put side by side; each lane takes one and counts those that are not smaller,
// so nothing is found one after another.
template <int PER_LANE>
DMOE_DEVICE Place best_experts(uint32_t (&keys)[PER_LANE], int per_lane, int wanted, bool few, bool ordered,
                               uint32_t *scratch) {
    const int lane = lane_id();
    uint32_t *const found = scratch, *const expert_of = scratch + kWarp, *const places = scratch + 2 * kWarp;
    int total = few ? collect(keys, per_lane, 1u, found) : kWarp + 1;
    if (total > kWarp) {
        total = collect(keys, per_lane, least_of_best(keys, wanted), found);
        if (total > kWarp) return pop_best(keys, per_lane, wanted);
    }
    if (lane >= total) found[lane] = 0;
    places[lane] = kWarp;  // nobody's
    __syncwarp();
    const uint32_t mine = found[lane];
    if (!ordered && total <= wanted) {
        const Place place{lane < total ? static_cast<int>(expert_of[lane]) : -1, mine};
        __syncwarp();
        return place;
    }
    int not_smaller = 0;
    for (int j = 0; j < total; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4 *>(found + j);
        not_smaller += (four.x >= mine) + (four.y >= mine) + (four.z >= mine) + (four.w >= mine);
    }
    if (lane < total) places[not_smaller - 1] = static_cast<uint32_t>(lane);
    __syncwarp();
    uint32_t chosen = places[lane];
    if (__ballot_sync(kWholeWarp, lane < total && chosen == kWarp)) {  // equal keys want the same place
        int better = 0;
        for (int j = 0; j < total; ++j) {
            better += found[j] > mine || (found[j] == mine && expert_of[j] < expert_of[lane]);
        }
        __syncwarp();
        if (lane < total) places[better] = static_cast<uint32_t>(lane);
        __syncwarp();
        chosen = places[lane];
    }
    Place place{-1, 0u};
    if (lane < min(wanted, total)) place = Place{static_cast<int>(expert_of[chosen]), found[chosen]};
    __syncwarp();
    return place;
}

}  // namespace dmoe
