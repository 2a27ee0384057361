// First launch of DmoeExperts: which pairs (token, place) belong to which expert. A warp per expert, no atomics.
#pragma once

#include "experts_pairs.cuh"

namespace dmoe {

struct GroupArguments {
    const int32_t *expert_ids;  // [pair_count]; outside 0..experts−1 = none
    int pair_count, experts;
    Groups groups;
};

__global__ void __launch_bounds__(128) group_kernel(GroupArguments a) {
    const int expert = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kWarp, lane = lane_id();
    if (expert >= a.experts) {  // the grid covers whole eights of experts, and the products read that many counts
        if (lane == 0 && expert < kMaxExperts) a.groups.count[expert] = 0;
        return;
    }
    int below = 0, equal = 0;
    for (int i = lane; i < a.pair_count; i += kWarp) {
        const int id = a.expert_ids[i];
        below += id >= 0 && id < expert;
        equal += id == expert;
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        below += __shfl_xor_sync(kWholeWarp, below, distance);
        equal += __shfl_xor_sync(kWholeWarp, equal, distance);
    }
    if (lane == 0) {
        a.groups.count[expert] = equal;
        a.groups.first[expert] = below;
    }
    if (equal == 0) return;
    int at = below;
    for (int start = 0; start < a.pair_count; start += kWarp) {
        const int i = start + lane;
        const bool mine = i < a.pair_count && a.expert_ids[i] == expert;
        const unsigned ballot = __ballot_sync(kWholeWarp, mine);
        if (mine) a.groups.pairs[at + __popc(ballot & ((1u << lane) - 1))] = i;
        at += __popc(ballot);
    }
}

}  // namespace dmoe
