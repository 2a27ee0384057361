// DmoeBlockRoute: see dmoe_export/ops/block_route/__init__.py for what it computes.
//
// Grid (tokens, rows). Modes with a coreset: the block (of threads) of a routing block's first valid token does the
// whole routing block, a warp per token; the others leave at once. Token mode: a warp per token.
#pragma once

#include "route_coreset.cuh"
#include "route_select.cuh"

namespace dmoe {

template <int PER_LANE, int MAX_WARPS>
__global__ void __launch_bounds__(MAX_WARPS *kWarp) block_route_kernel(RouteArguments a) {
    constexpr int kRow = PER_LANE * kWarp;
    DMOE_SHARED(float, rows, MAX_WARPS *kRow);  // a row of a value per expert for each warp
    DMOE_SHARED(uint64_t, keys, kRow);
    DMOE_SHARED(float, votes, kRow);
    DMOE_SHARED(uint32_t, coreset, PER_LANE);  // word i, bit l: expert l + 32 i
    DMOE_SHARED(int, list, MAX_WARPS *kWarp);
    DMOE_SHARED(int, warp_totals, MAX_WARPS);
    DMOE_SHARED(int, coreset_count, 1);

    const int warps = static_cast<int>(blockDim.x) / kWarp, warp = warp_id(), lane = lane_id();
    const int64_t row_start = static_cast<int64_t>(blockIdx.y) * a.tokens;
    const int64_t *positions = a.position_ids + row_start;
    const bool token_mode = a.attributes.mode == DMOE_MODE_TOKEN, sum = a.attributes.mode == DMOE_MODE_TOP_P;
    float *scratch = rows + warp * kRow;
    const int leader = static_cast<int>(blockIdx.x) * (token_mode ? warps : 1);
    const int block_length = a.attributes.block_length;
    int64_t block_start = 0;
    int token = -1, rounds = 0;  // the token of this warp; how many times the warps took one each
    float r[PER_LANE];
    Scores scores;
    uint32_t members = 0;

    if (token_mode) {
        token = leader + warp;
        if (token >= a.tokens) return;
        if (positions[token] < 0) return write_padding(a, row_start + token);
        for (int i = 0; i < PER_LANE; ++i) members |= static_cast<uint32_t>(lane + i * kWarp < a.experts) << i;
    } else {
        if (positions[leader] < 0) {
            if (warp == 0) write_padding(a, row_start + leader);
            return;
        }
        block_start = positions[leader] - positions[leader] % block_length;
        for (int end = leader; end > 0; end -= blockDim.x) {  // backwards: an earlier token is usually near
            const int other = end - 1 - static_cast<int>(threadIdx.x);
            if (__syncthreads_or(other >= 0 && in_block(positions[other], block_start, block_length))) return;
        }

        // Each warp writes its token's row; then threads add up (or take the largest of) the columns, in token order.
        for (int e = threadIdx.x; e < a.experts; e += blockDim.x) votes[e] = sum ? 0.0f : -INFINITY;
        for (int start = leader; start < a.tokens; start += blockDim.x) {
            const int found = gather_tokens(positions, a.tokens, start, block_start, block_length, list, warp_totals);
            for (int base = 0; base < found; base += warps, ++rounds) {
                const int active = min(warps, found - base);
                if (warp < active) {
                    token = list[base + warp];
                    scores = load_token(a, row_start + token, r);
                    write_votes(a, r, sum, scratch);
                }
                __syncthreads();
                add_votes(rows, kRow, active, a.experts, sum, votes);
                __syncthreads();
            }
        }
        sort_votes(votes, a.experts, sum, keys);
        if (warp == 0) {
            int64_t count = sum ? count_top_p(keys, a.experts, *a.top_p) : *a.coreset_size;
            if (sum) count = max(count, static_cast<int64_t>(*a.min_experts));
            count = max(min(count, static_cast<int64_t>(a.experts)), static_cast<int64_t>(0));
            if (lane == 0) *coreset_count = static_cast<int>(count);
        }
        for (int i = threadIdx.x; i < PER_LANE; i += blockDim.x) coreset[i] = 0;
        __syncthreads();
        for (int rank = threadIdx.x; rank < *coreset_count; rank += blockDim.x) {
            const uint32_t e = ~static_cast<uint32_t>(keys[rank]);
            atomicOr(&coreset[e / kWarp], 1u << e % kWarp);
        }
        __syncthreads();
        for (int i = 0; i < PER_LANE; ++i) members |= (coreset[i] >> lane & 1u) << i;
    }

    // Selection. Usually a warp has one token, and with a coreset it still holds its scores; a block of more tokens
    // than warps goes through them again.
    const bool one = token_mode || rounds == 1;
    for (int start = leader; start < a.tokens; start += blockDim.x) {
        const int found =
            one ? warps : gather_tokens(positions, a.tokens, start, block_start, block_length, list, warp_totals);
        for (int at = warp; at < found; at += warps) {
            if (!one) token = list[at];
            if (token < 0) return;  // a block of fewer tokens than warps
            if (!one || token_mode) scores = load_token(a, row_start + token, r);
            select_and_write(a, row_start + token, r, scores, members, scratch);
        }
        if (one) return;  // the barriers in gather_tokens keep the list until everyone has read it
    }
}

}  // namespace dmoe
