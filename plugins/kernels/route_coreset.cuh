// Block routing, middle part: the tokens of a block, their votes, the votes in order, and how many experts are kept.
#pragma once

#include "route_scores.cuh"

namespace dmoe {

DMOE_DEVICE bool in_block(int64_t position, int64_t block_start, int block_length) {
    // Unsigned: positions before the block come out beyond any length.
    return position >= 0 && static_cast<uint64_t>(position - block_start) < static_cast<uint64_t>(block_length);
}

// The tokens of the block among tokens start … start + blockDim.x − 1 of a row, in order, into `list`; how many.
DMOE_DEVICE int gather_tokens(const int64_t *positions, int tokens, int start, int64_t block_start, int block_length,
                              int *list, int *warp_totals) {
    const int token = start + static_cast<int>(threadIdx.x);
    const bool mine = token < tokens && in_block(positions[token], block_start, block_length);
    const unsigned ballot = __ballot_sync(kWholeWarp, mine);
    if (lane_id() == 0) warp_totals[warp_id()] = __popc(ballot);
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
        if (w < warp_id()) before += warp_totals[w];
        total += warp_totals[w];
    }
    if (mine) list[before + __popc(ballot & ((1u << lane_id()) - 1))] = token;
    __syncthreads();
    return total;
}

// What a token gives to its block: r of its top-k and 0 elsewhere (top_p), or every r (top_c).
template <int PER_LANE>
DMOE_DEVICE void write_votes(const RouteArguments &a, const float (&r)[PER_LANE], bool top_k_only, float *row) {
    const int lane = lane_id();
    uint32_t rest[PER_LANE];  // 0 = taken
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) rest[i] = lane + i * kWarp < a.experts ? ordered_bits(r[i]) : 0u;
    for (int place = 0; top_k_only && place < a.attributes.experts_per_token; ++place) pop_best(rest);
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) row[lane + i * kWarp] = !top_k_only || rest[i] == 0 ? r[i] : 0.0f;
}

// votes[e] and the column of e in the first `active` rows: their sum in order, or the largest.
DMOE_DEVICE void add_votes(const float *rows, int stride, int active, int experts, bool sum, float *votes) {
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        float total = votes[e];
        for (int w = 0; w < active; ++w) {
            const float value = rows[w * stride + e];
            total = sum ? total + value : value > total || value != value ? value : total;
        }
        votes[e] = total;
    }
}

// Largest first. `size` is a power of two of at least 64. Pairs at most 32 apart stay inside a warp.
DMOE_DEVICE void bitonic_sort(uint64_t *keys, int size) {
    bool wide = true;  // whether the stage before crossed warps
    for (int run = 2; run <= size; run *= 2) {
        for (int stride = run / 2; stride > 0; stride /= 2) {
            if (wide || stride > kWarp) {
                __syncthreads();
            } else {
                __syncwarp();
            }
            wide = stride > kWarp;
            for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
                const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
                const uint64_t a = keys[low], b = keys[high];
                if ((a < b) == ((low & run) == 0)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    }
    __syncthreads();
}

// keys: vote (as a part of their sum if `normalise`), largest first, then the lower expert. Upper word: ordered_bits of
// the vote, lower word: ~expert.
DMOE_DEVICE void sort_votes(const float *votes, int experts, bool normalise, uint64_t *keys) {
    float total = 0.0f;  // every warp for itself: the same number, and no barrier
    for (int e = lane_id(); e < experts; e += kWarp) total += votes[e];
    total = warp_sum(total) + 1e-20f;
    int padded = 2 * kWarp;
    while (padded < experts) padded *= 2;
    for (int e = threadIdx.x; e < padded; e += blockDim.x) {
        const float vote = e >= experts ? 0.0f : normalise ? votes[e] / total : votes[e];
        keys[e] = e < experts ? static_cast<uint64_t>(ordered_bits(vote)) << 32 | ~static_cast<uint32_t>(e) : 0u;
    }
    bitonic_sort(keys, padded);
}

// How many of the sorted votes the top_p rule keeps; a whole warp. Sums in double, so that a threshold that is met
// exactly is met here too (and as torch does).
DMOE_DEVICE int count_top_p(const uint64_t *keys, int experts, float top_p) {
    double before = 0.0;
    for (int start = 0; start < experts; start += kWarp) {
        const int rank = start + lane_id();
        const float vote = rank < experts ? from_ordered_bits(static_cast<uint32_t>(keys[rank] >> 32)) : 0.0f;
        double sum = vote;  // up to and with this rank
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const double left = __shfl_up_sync(kWholeWarp, sum, distance);
            if (lane_id() >= distance) sum += left;
        }
        double left = __shfl_up_sync(kWholeWarp, sum, 1);
        if (lane_id() == 0) left = 0.0;
        const bool keep = vote > 0.0f && (top_p >= 1.0f || static_cast<float>(before + left) <= top_p);
        const unsigned dropped = ~__ballot_sync(kWholeWarp, keep);
        if (dropped) return start + __ffs(static_cast<int>(dropped)) - 1;
        before += __shfl_sync(kWholeWarp, sum, kWarp - 1);
    }
    return experts;
}

}  // namespace dmoe
