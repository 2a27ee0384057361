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

// The coreset of a routing block from all its tokens in the row; all threads. `early_position`: of token threadIdx.x.
template <int PER_LANE, int MAX_WARPS>
DMOE_DEVICE void coreset_of_block(const RouteArguments &a, RouteShared<PER_LANE, MAX_WARPS> &s, int64_t row_start,
                                  int64_t block_start, int64_t early_position, float top_p, int least) {
    constexpr int kRow = PER_LANE * kWarp;
    const int warps = static_cast<int>(blockDim.x) / kWarp, warp = warp_id(), block_length = a.attributes.block_length;
    const bool sum = a.attributes.mode == DMOE_MODE_TOP_P;
    float *const rows = reinterpret_cast<float *>(s.rows);
    __syncthreads();  // the routing block before used the same shared memory
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) s.votes[e] = sum ? 0.0f : -INFINITY;
    for (int start = 0; start < a.tokens; start += blockDim.x) {
        const int at = start + static_cast<int>(threadIdx.x);
        const int64_t position =
            start == 0 ? early_position : at < a.tokens ? a.position_ids[row_start + at] : int64_t{-1};
        const int found = gather_tokens(position, start, block_start, block_length, s.list, s.warp_totals);
        for (int base = 0; base < found; base += warps) {  // usually once
            const int active = min(warps, found - base);
            if (warp < active) {
                wait_for_predecessor();  // for the logits; launch_route() says why not for all else
                let_successor_start();
                float r[PER_LANE];
                load_token(a, row_start + s.list[base + warp], r);
                write_votes(a, r, sum, rows + warp * kRow);
            }
            __syncthreads();
            add_votes(rows, kRow, active, a.experts, sum, s.votes);
            __syncthreads();
        }
    }
    find_coreset(a, s.votes, sum, top_p, least, s.scratch, s.coreset);
}

template <int PER_LANE, int MAX_WARPS>
__global__ void __launch_bounds__(MAX_WARPS *kWarp) block_route_kernel(RouteArguments a) {
    using Shared = RouteShared<PER_LANE, MAX_WARPS>;
    DMOE_SHARED(Shared, shared, 1);
    Shared &s = *shared;
    const int lane = lane_id(), warp = warp_id(), warps = static_cast<int>(blockDim.x) / kWarp;
    const int first = static_cast<int>(blockIdx.x) * a.share, block_length = a.attributes.block_length;
    const int64_t row_start = static_cast<int64_t>(blockIdx.y) * a.tokens;
    const int64_t *positions = a.position_ids + row_start;
    // All at once: one wait.
    const int64_t own = lane < a.share && first + lane < a.tokens ? positions[first + lane] : int64_t{-1};
    const int64_t early = static_cast<int>(threadIdx.x) < a.tokens ? positions[threadIdx.x] : int64_t{-1};
    float top_p = 0.0f;
    int64_t least = 0;
    if (a.attributes.mode == DMOE_MODE_TOP_P) top_p = *a.top_p, least = *a.min_experts;
    if (a.attributes.mode == DMOE_MODE_TOP_C) least = *a.coreset_size;
    least = min(least, int64_t{PER_LANE * kWarp});

    const unsigned valid = __ballot_sync(kWholeWarp, own >= 0);  // bit i: token first + i
    unsigned left = valid;
    while (left) {  // once, unless the share reaches into another routing block
        unsigned mine = left;
        const bool few = a.attributes.mode != DMOE_MODE_TOKEN;
        uint32_t members = lane * a.per_lane < a.experts ? ~0u : 0u;
        if (few) {
            const int64_t position = __shfl_sync(kWholeWarp, own, __ffs(static_cast<int>(left)) - 1);
            const int64_t block_start = start_of_block(position, block_length);
            mine = __ballot_sync(kWholeWarp, in_block(own, block_start, block_length));
            coreset_of_block(a, s, row_start, block_start, early, top_p, static_cast<int>(max(least, int64_t{0})));
            members = members_of_lane(a, s.coreset);
        }
        for (int i = warp; i < a.share; i += warps) {
            if (!(mine >> i & 1u)) continue;
            wait_for_predecessor();
            let_successor_start();
            float r[PER_LANE], *const scratch = reinterpret_cast<float *>(s.rows) + warp * Shared::kRow;
            const Scores scores = load_token(a, row_start + first + i, r);
            select_and_write(a, row_start + first + i, r, scores, members, few, scratch);
        }
        left &= ~mine;
    }
    wait_for_predecessor();
    for (int i = warp; i < a.share && first + i < a.tokens; i += warps) {
        if (!(valid >> i & 1u)) write_padding(a, row_start + first + i);
    }
}

}  // namespace dmoe
