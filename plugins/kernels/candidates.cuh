// The K best logits of each row, best first: two launches, without sorting more than a few hundred numbers of a row.
//
// A row is cut into groups. At least K logits are not smaller than the K-th largest of the groups' best ones, so what is
// smaller is no candidate, and a group whose best one is smaller has none.
#pragma once

#include "head_best.cuh"

namespace dmoe {

constexpr int kGroupUnit = 128;       // logits of a group, or a multiple: a warp reads as many at once, four a lane
constexpr int kMostGroups = 2048;     // of a row
constexpr int kBestThreads = 256;     // of the first launch
constexpr int kGroupsAtOnce = 32;     // that a thread block of it takes
constexpr int kRankThreads = 1024;    // of the second
constexpr int kRankRoom = 2048;       // keys that a row's thread block holds
constexpr int kMostCandidates = 1024; // so that there is room for what every thread adds
constexpr int kBoundBits = 20;        // of 32: what the others would keep out is little
constexpr float kLowest = -__builtin_huge_valf();

struct CandidatesArguments {
    const float *logits;                       // [rows, kept, vocabulary]
    int wanted, kept, vocabulary, mask_id;     // the first `wanted` places of a row
    int candidates;                            // K
    int group, groups;                         // logits of a group, groups of a place
    uint32_t *best;                            // [rows · wanted, groups]
    int32_t *token_ids;                        // [rows · wanted, K]
    float *values;                             // [rows · wanted, K]
};

DMOE_DEVICE const float *logits_of(const CandidatesArguments &a, int place) {
    return a.logits + (static_cast<int64_t>(place / a.wanted) * a.kept + place % a.wanted) * a.vocabulary;
}

DMOE_DEVICE bool is_choice(const CandidatesArguments &a, int token) {
    return token < a.vocabulary && token != a.mask_id;
}

// The upper half of the best key of each group, a group per warp at a time; minus infinity's where no token is a choice.
__global__ void __launch_bounds__(kBestThreads) candidates_best_kernel(CandidatesArguments a) {
    wait_for_predecessor();
    let_successor_start();
    const int place = static_cast<int>(blockIdx.x);
    const float *const row = logits_of(a, place);
    uint32_t *const best = a.best + static_cast<int64_t>(place) * a.groups;
    const int first = static_cast<int>(blockIdx.y) * kGroupsAtOnce + warp_id();
    DMOE_UNROLL
    for (int group = first; group < first + kGroupsAtOnce; group += kBestThreads / kWarp) {
        if (group >= a.groups) break;
        float most = kLowest;
        bool is_nan = false;
        for (int token = group * a.group + lane_id(), end = token + a.group; token < end; token += kGroupUnit) {
            DMOE_UNROLL
            for (int i = 0; i < kGroupUnit; i += kWarp) {
                const float logit = is_choice(a, token + i) ? row[token + i] : kLowest;
                most = fmaxf(most, logit);
                is_nan = is_nan || logit != logit;
            }
        }
        const uint32_t upper = warp_max(is_nan ? ~0u : static_cast<uint32_t>(best_key(most, 0) >> 32));
        if (lane_id() == 0) best[group] = upper;
    }
}

// Sorts the first `count` of `keys`, which has kRankRoom places, the largest first. Pairs that a warp keeps to itself
// need no barrier of the thread block.
DMOE_DEVICE void sort_keys(uint64_t *keys, int count) {
    const int thread = static_cast<int>(threadIdx.x);
    int size = 2;
    while (size < count) size *= 2;
    for (int i = count + thread; i < size; i += kRankThreads) keys[i] = 0;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
        for (int stride = run / 2; stride > 0; stride /= 2) {
            if (thread < size / 2) {
                const int low = thread / stride * 2 * stride + thread % stride;
                const uint64_t first = keys[low], second = keys[low + stride];
                if ((first < second) == ((low & run) == 0)) keys[low] = second, keys[low + stride] = first;
            }
            if (max(stride, stride > 1 ? stride / 2 : run) > kWarp) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
}

// A thread block per place. What the order of threads decides, where a key lies before the sort, does not outlive it.
__global__ void __launch_bounds__(kRankThreads, 1) candidates_rank_kernel(CandidatesArguments a) {
    DMOE_SHARED(uint64_t, keys, kRankRoom);
    DMOE_SHARED(int, chosen, kMostGroups);
    DMOE_SHARED(unsigned, counters, 2);  // chosen groups, keys
    wait_for_predecessor();
    let_successor_start();
    const int thread = static_cast<int>(threadIdx.x);
    const int place = static_cast<int>(blockIdx.x);
    const float *const row = logits_of(a, place);
    const uint32_t *const best = a.best + static_cast<int64_t>(place) * a.groups;
    if (thread < 2) counters[thread] = 0;
    uint32_t mine[kMostGroups / kRankThreads];
    DMOE_UNROLL
    for (int i = 0; i < kMostGroups / kRankThreads; ++i) {
        const int group = i * kRankThreads + thread;
        mine[i] = group < a.groups ? best[group] : 0;
    }
    // The largest number of kBoundBits upper bits that K groups reach: a bit at a time, from the top.
    uint32_t bound = 0;
    for (int bit = 31; bit > 31 - kBoundBits; --bit) {
        const uint32_t higher = bound | 1u << bit;
        int reached = __syncthreads_count(mine[0] >= higher);
        if (a.groups > kRankThreads) reached += __syncthreads_count(mine[1] >= higher);
        if (reached >= a.candidates) bound = higher;
    }
    bound = max(bound, 1u);  // 0 is no group and no token
    DMOE_UNROLL
    for (int i = 0; i < kMostGroups / kRankThreads; ++i) {
        if (mine[i] >= bound) chosen[atomicAdd(&counters[0], 1u)] = i * kRankThreads + thread;
    }
    __syncthreads();
    const int units = a.group / kGroupUnit, all = static_cast<int>(counters[0]) * units;
    int count = 0;
    for (int first = 0; first < all; first += kRankThreads / kWarp) {
        constexpr int kEach = kGroupUnit / kWarp;
        const int unit = first + warp_id();
        uint64_t found[kEach];
        DMOE_UNROLL
        for (int i = 0; i < kEach; ++i) {
            found[i] = 0;
            if (unit < all) {
                const int token = chosen[unit / units] * a.group + unit % units * kGroupUnit + i * kWarp + lane_id();
                if (is_choice(a, token)) found[i] = best_key(row[token], token);
            }
        }
        DMOE_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const bool wanted = found[i] >> 32 >= bound;
            const int more = __syncthreads_count(wanted);
            if (count + more > kRankRoom) {  // only where many are equal, or nearly
                sort_keys(keys, count);
                count = min(count, a.candidates);
                if (thread == 0) counters[1] = static_cast<unsigned>(count);
                __syncthreads();
            }
            if (wanted) keys[atomicAdd(&counters[1], 1u)] = found[i];
            count += more;
        }
    }
    __syncthreads();
    sort_keys(keys, count);
    const int64_t to = static_cast<int64_t>(place) * a.candidates;
    for (int i = thread; i < a.candidates; i += kRankThreads) {
        a.token_ids[to + i] = i < count ? token_of(keys[i]) : -1;
        a.values[to + i] = i < count ? logit_of(keys[i]) : kLowest;
    }
}

}  // namespace dmoe
