// Which pairs (token, place) belong to which expert. Every thread block of the products finds out for itself, in shared
// memory: the ids of a step are a kilobyte, and a launch of its own would cost more.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kProductWarps = 8;
constexpr int kProductThreads = kProductWarps * kWarp;
constexpr int kMaxExperts = 4 * kProductThreads;

// A pair is token · places + place. `pairs` lists expert 0's, then expert 1's, …; the order within an expert is not
// fixed, and no result depends on it: it only says which column of a tile a pair is.
struct PairLists {
    unsigned *ends;    // [experts], where an expert's pairs end; they start where those of the one before end
    uint16_t *active;  // [experts], those that have pairs, ascending
    uint16_t *pairs;   // [pair_count]

    DMOE_DEVICE int first(int expert) const { return expert ? static_cast<int>(ends[expert - 1]) : 0; }
    DMOE_DEVICE int end(int expert) const { return static_cast<int>(ends[expert]); }
};

constexpr int list_bytes(int experts, int pair_count) { return (experts * 6 + pair_count * 2 + 127) / 128 * 128; }

DMOE_DEVICE PairLists lists_at(char *memory, int experts) {
    auto *const active = reinterpret_cast<uint16_t *>(memory + experts * 4);
    return {reinterpret_cast<unsigned *>(memory), active, active + experts};
}

// Fills the lists from `ids` [pair_count], where what is outside 0 … experts − 1 is no expert; how many are active. All
// threads call it; what they wrote is visible to all when it returns.
DMOE_DEVICE int group_pairs(const PairLists &lists, const int32_t *ids, int pair_count, int experts) {
    DMOE_SHARED(int2, warp_totals, kProductWarps);
    const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), first = 4 * thread;
    const auto is_expert = [experts](int id) { return static_cast<unsigned>(id) < static_cast<unsigned>(experts); };
    for (int e = thread; e < experts; e += kProductThreads) lists.ends[e] = 0;
    __syncthreads();
    for (int i = thread; i < pair_count; i += kProductThreads) {
        const int id = ids[i];
        if (is_expert(id)) atomicAdd(lists.ends + id, 1u);
    }
    __syncthreads();
    int counts[4] = {}, pairs = 0, active = 0;
    DMOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (first + i < experts) counts[i] = static_cast<int>(lists.ends[first + i]);
        pairs += counts[i], active += counts[i] > 0;
    }
    int pairs_upto = pairs, active_upto = active;
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int pairs_left = __shfl_up_sync(kWholeWarp, pairs_upto, distance);
        const int active_left = __shfl_up_sync(kWholeWarp, active_upto, distance);
        if (lane >= distance) pairs_upto += pairs_left, active_upto += active_left;
    }
    if (lane == kWarp - 1) warp_totals[warp_id()] = make_int2(pairs_upto, active_upto);
    __syncthreads();
    int at = pairs_upto - pairs, place = active_upto - active, total = 0;
    for (int w = 0; w < kProductWarps; ++w) {
        if (w < warp_id()) at += warp_totals[w].x, place += warp_totals[w].y;
        total += warp_totals[w].y;
    }
    DMOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (first + i >= experts) continue;
        lists.ends[first + i] = static_cast<unsigned>(at);  // where they start: counting the pairs in moves it to the end
        if (counts[i] > 0) lists.active[place++] = static_cast<uint16_t>(first + i);
        at += counts[i];
    }
    __syncthreads();
    for (int i = thread; i < pair_count; i += kProductThreads) {
        const int id = ids[i];
        if (is_expert(id)) lists.pairs[atomicAdd(lists.ends + id, 1u)] = static_cast<uint16_t>(i);
    }
    __syncthreads();
    return total;
}

}  // namespace dmoe
