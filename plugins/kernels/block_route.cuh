// DmoeBlockRoute: see dmoe_export/ops/block_route/__init__.py for what it computes.
//
// Grid (tokens, rows). Modes with a coreset: the block (of threads) of a routing block's first valid token does the
// whole routing block, a warp per token; the others leave at once. Token mode: a warp per token.
// Lane l of a warp holds experts l, l + 32, l + 64, …: PER_LANE of them.
#pragma once

#include "device.cuh"
#include "dmoe_kernels.h"

namespace dmoe {

struct RouteArguments {
    DmoeRouteAttributes attributes;
    int rows, tokens, experts;
    const float *router_logits, *expert_bias;
    const int64_t *position_ids;
    const float *top_p;
    const int64_t *min_experts, *coreset_size;
    int32_t *expert_ids;
    float *expert_weights;
    uint8_t *coreset;
};

// Unsigned order of the result = order of the float; −0 = +0; NaN first; 0 is below every value.
DMOE_DEVICE uint32_t ordered_bits(float value) {
    if (value != value) return 0xffffffffu;
    const uint32_t bits = value == 0.0f ? 0u : __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DMOE_DEVICE float from_ordered_bits(uint32_t bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Softmax: exp(logit − peak) / total; sigmoid: peak and total are not used.
struct Scores {
    bool softmax;
    float peak, total;
    DMOE_DEVICE float of(float logit) const {
        return softmax ? expf(logit - peak) / total : 1.0f / (1.0f + expf(-logit));
    }
};

// Selection scores r of one token (score + bias), −inf beyond the last expert.
template <int PER_LANE>
DMOE_DEVICE Scores load_token(const RouteArguments &a, int64_t token, float (&r)[PER_LANE]) {
    const float *logits = a.router_logits + token * a.experts;
    const int lane = lane_id();
    Scores scores{a.attributes.softmax != 0, 0.0f, 1.0f};
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = lane + i * kWarp;
        r[i] = e < a.experts ? logits[e] : -INFINITY;
    }
    if (scores.softmax) {
        float peak = r[0], total = 0.0f;
        DMOE_UNROLL
        for (int i = 1; i < PER_LANE; ++i) peak = fmaxf(peak, r[i]);
        scores.peak = warp_max(peak);
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) total += expf(r[i] - scores.peak);
        scores.total = warp_sum(total);
    }
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = lane + i * kWarp;
        r[i] = e < a.experts ? scores.of(r[i]) + a.expert_bias[e] : -INFINITY;
    }
    return scores;
}

// The warp's largest key (lower expert first among equals) is set to 0; returns its expert, −1 when all are 0.
template <int PER_LANE>
DMOE_DEVICE int pop_best(uint32_t (&keys)[PER_LANE]) {
    const int lane = lane_id();
    uint32_t mine = keys[0];
    int at = 0;
    DMOE_UNROLL
    for (int i = 1; i < PER_LANE; ++i) {
        if (keys[i] > mine) {
            mine = keys[i];
            at = i;
        }
    }
    const uint32_t best = warp_max(mine);
    if (best == 0) return -1;
    const int expert = static_cast<int>(warp_min(mine == best ? static_cast<uint32_t>(lane + at * kWarp) : ~0u));
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (lane + i * kWarp == expert) keys[i] = 0;
    }
    return expert;
}

// Bit i: the lane's expert i is in a kept group. `scratch` holds one float per expert, this warp's own.
// A group scores the sum of its two largest r; experts that are not usable count as −inf.
template <int PER_LANE>
DMOE_DEVICE uint32_t kept_groups(const RouteArguments &a, const float (&r)[PER_LANE], uint32_t usable, float *scratch) {
    const int lane = lane_id(), groups = a.attributes.num_groups, size = a.experts / groups;
    if (a.attributes.groups_kept >= groups) return ~0u;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        if (lane + i * kWarp < a.experts) scratch[lane + i * kWarp] = usable >> i & 1u ? r[i] : -INFINITY;
    }
    __syncwarp();
    float score[PER_LANE];
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int group = lane + i * kWarp;
        if (group >= groups) continue;
        float first = -INFINITY, second = -INFINITY;
        int member = lane % size;  // lanes start at different members: fewer bank conflicts
        for (int j = 0; j < size; ++j) {
            const float value = scratch[group * size + member];
            if (++member == size) member = 0;
            second = fmaxf(second, fminf(first, value));
            first = fmaxf(first, value);
        }
        score[i] = size == 1 ? first : first + second;
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
        int better = 0;
        for (int other = 0; other < groups; ++other) {
            const float value = scratch[other];
            better += value > score[i] || (value == score[i] && other < group);
        }
        kept |= static_cast<uint32_t>(better < a.attributes.groups_kept) << i;
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
        const uint32_t e = lane + i * kWarp;
        if (e < static_cast<uint32_t>(a.experts) && scratch[e * reciprocal >> 20] != 0.0f) bits |= 1u << i;
    }
    __syncwarp();
    return bits;
}

// A token's outputs. members: bit i = the lane's expert i is in the coreset.
template <int PER_LANE>
DMOE_DEVICE void select_and_write(const RouteArguments &a, int64_t token, const float (&r)[PER_LANE],
                                  const Scores &scores, uint32_t members, float *scratch) {
    const int lane = lane_id(), k = a.attributes.experts_per_token;
    uint32_t usable = 0;
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        usable |= static_cast<uint32_t>(members >> i & 1u && fabsf(r[i]) < INFINITY) << i;
    }
    const uint32_t in_group = kept_groups(a, r, usable, scratch);
    int expert = -1, place = 0;  // lane j keeps the expert of place j
    for (int pass = 0; pass < 2 && place < k; ++pass) {  // the kept groups, then the rest of the coreset
        const uint32_t wanted = usable & (pass == 0 ? in_group : ~in_group);
        uint32_t keys[PER_LANE];
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) keys[i] = wanted >> i & 1u ? ordered_bits(r[i]) : 0u;
        for (; place < k; ++place) {
            const int best = pop_best(keys);
            if (best < 0) break;
            if (lane == place) expert = best;
        }
    }
    float weight = expert < 0 ? 0.0f : scores.of(a.router_logits[token * a.experts + expert]);
    if (a.attributes.renormalise) weight = weight / (warp_sum(weight) + 1e-20f);
    if (lane < k) {
        a.expert_ids[token * k + lane] = expert;
        a.expert_weights[token * k + lane] = weight * a.attributes.routed_scaling;
    }
    if (a.coreset) {
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) {
            const int e = lane + i * kWarp;
            if (e < a.experts) a.coreset[token * a.experts + e] = members >> i & 1u;
        }
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
        for (int end = leader; end > 0; end -= blockDim.x) {  // backwards: an earlier token of the block is usually near
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

    // Selection. Usually a warp has one token, and with a coreset it still holds its scores; a block of more tokens than
    // warps goes through them again.
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
