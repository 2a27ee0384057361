// DmoeBlockRoute: see dmoe_export/ops/block_route/__init__.py for what it computes.
//
// Grid (shares of `share` tokens, rows). Modes with a coreset: a thread block finds the coreset of each routing block that
// its tokens are in, from all tokens of that block, a warp per token; then it selects for its own tokens. The shares of a
// routing block find the same coreset; nothing is handed on between thread blocks. Token mode: a warp per token.
#pragma once

#include "route_coreset.cuh"
#include "route_select.cuh"

namespace dmoe {

template <int PER_LANE, int MAX_WARPS>
struct RouteShared {
    static constexpr int kRow = PER_LANE * kWarp;
    // A row of a value per expert for each warp: votes, then scratch of find_coreset, then of each warp's selection.
    union {
        float4 rows[MAX_WARPS * kRow / 4];
        CoresetScratch<kRow> scratch;
    };
    float votes[kRow];
    uint32_t coreset[PER_LANE + 1];
    int list[MAX_WARPS * kWarp], warp_totals[MAX_WARPS];
};

// One routing block, for the tokens `mine` (bit i: token first + i of the row); all threads.
template <int PER_LANE, int MAX_WARPS>
DMOE_DEVICE void route_block(const RouteArguments &a, RouteShared<PER_LANE, MAX_WARPS> &s, int64_t block_start, int first,
                             unsigned mine, int64_t early_position) {
    constexpr int kRow = PER_LANE * kWarp;
    const int warps = static_cast<int>(blockDim.x) / kWarp, warp = warp_id(), block_length = a.attributes.block_length;
    const int64_t row_start = static_cast<int64_t>(blockIdx.y) * a.tokens;
    const bool sum = a.attributes.mode == DMOE_MODE_TOP_P;
    float *const rows = reinterpret_cast<float *>(s.rows), *const row = rows + warp * kRow;
    int token = -1, rounds = 0;  // the token of this warp; how many times the warps took one each
    float r[PER_LANE];
    Scores scores;

    // Each warp writes its token's row; then threads add up (or take the largest of) the columns, in token order.
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) s.votes[e] = sum ? 0.0f : -INFINITY;
    for (int start = 0; start < a.tokens; start += blockDim.x) {
        const int at = start + static_cast<int>(threadIdx.x);
        const int64_t position =
            start == 0 ? early_position : at < a.tokens ? a.position_ids[row_start + at] : int64_t{-1};
        const int found = gather_tokens(position, start, block_start, block_length, s.list, s.warp_totals);
        for (int base = 0; base < found; base += warps, ++rounds) {
            const int active = min(warps, found - base);
            if (warp < active) {
                token = s.list[base + warp];
                scores = load_token(a, row_start + token, r);
                write_votes(a, r, sum, row);
            }
            __syncthreads();
            add_votes(rows, kRow, active, a.experts, sum, s.votes);
            __syncthreads();
        }
    }
    find_coreset(a, s.votes, sum, s.scratch, s.coreset);
    const uint32_t members = members_of_lane(a, s.coreset);
    if (rounds == 1) {  // as nearly always: each warp still holds its token's scores
        const int at = token - first;
        if (token >= 0 && at >= 0 && at < a.share && (mine >> at & 1u)) {
            select_and_write(a, row_start + token, r, scores, members, row);
        }
    } else {
        for (int i = warp; i < a.share; i += warps) {
            if (!(mine >> i & 1u)) continue;
            scores = load_token(a, row_start + first + i, r);
            select_and_write(a, row_start + first + i, r, scores, members, row);
        }
    }
    __syncthreads();  // the next routing block uses the same shared memory
}

template <int PER_LANE, int MAX_WARPS>
__global__ void __launch_bounds__(MAX_WARPS *kWarp) block_route_kernel(RouteArguments a) {
    using Shared = RouteShared<PER_LANE, MAX_WARPS>;
    DMOE_SHARED(Shared, shared, 1);
    Shared &s = *shared;
    const int lane = lane_id(), warp = warp_id(), warps = static_cast<int>(blockDim.x) / kWarp;
    const int first = static_cast<int>(blockIdx.x) * a.share;
    const int64_t row_start = static_cast<int64_t>(blockIdx.y) * a.tokens;
    const int64_t *positions = a.position_ids + row_start;
    // Both at once: what they wait for is the same.
    const int64_t own = lane < a.share && first + lane < a.tokens ? positions[first + lane] : int64_t{-1};
    const int64_t early = static_cast<int>(threadIdx.x) < a.tokens ? positions[threadIdx.x] : int64_t{-1};

    unsigned left = __ballot_sync(kWholeWarp, own >= 0);
    for (int i = warp; i < a.share; i += warps) {
        if (!(left >> i & 1u) && first + i < a.tokens) write_padding(a, row_start + first + i);
    }
    if (a.attributes.mode == DMOE_MODE_TOKEN) {
        uint32_t members = 0;
        for (int i = 0; i < a.per_lane; ++i) members |= static_cast<uint32_t>(lane * a.per_lane + i < a.experts) << i;
        float *const row = reinterpret_cast<float *>(s.rows) + warp * PER_LANE * kWarp;
        for (int i = warp; i < a.share; i += warps) {
            if (!(left >> i & 1u)) continue;
            float r[PER_LANE];
            const Scores scores = load_token(a, row_start + first + i, r);
            select_and_write(a, row_start + first + i, r, scores, members, row);
        }
        return;
    }
    while (left) {
        const int64_t position = __shfl_sync(kWholeWarp, own, __ffs(static_cast<int>(left)) - 1);
        const int64_t block_start = start_of_block(position, a.attributes.block_length);
        const unsigned mine = __ballot_sync(kWholeWarp, in_block(own, block_start, a.attributes.block_length));
        route_block(a, s, block_start, first, mine, early);
        left &= ~mine;
    }
}

}  // namespace dmoe
