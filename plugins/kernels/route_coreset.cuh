// Block routing, middle part: the tokens of a block, their votes, and which experts are in the coreset.
#pragma once

#include "route_best.cuh"
#include "route_scores.cuh"

namespace dmoe {

// First position of the block of a position that is not negative.
DMOE_DEVICE int64_t start_of_block(int64_t position, int block_length) {
    if (position >> 31 == 0) {  // 64-bit division is a long subroutine
        const uint32_t low = static_cast<uint32_t>(position);
        return low - low % static_cast<uint32_t>(block_length);
    }
    return position - position % block_length;
}

DMOE_DEVICE bool in_block(int64_t position, int64_t block_start, int block_length) {
    // Unsigned: positions before the block come out beyond any length.
    return position >= 0 && static_cast<uint64_t>(position - block_start) < static_cast<uint64_t>(block_length);
}

// The tokens of the block among tokens start … start + blockDim.x − 1 of a row, in order, into `list`; how many.
// `position`: of token start + threadIdx.x, −1 past the end.
DMOE_DEVICE int gather_tokens(int64_t position, int start, int64_t block_start, int block_length, int *list,
                              int *warp_totals) {
    const bool mine = in_block(position, block_start, block_length);
    const unsigned ballot = __ballot_sync(kWholeWarp, mine);
    if (lane_id() == 0) warp_totals[warp_id()] = __popc(ballot);
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x) / kWarp, of_lane = lane_id() < warps ? warp_totals[lane_id()] : 0;
    const unsigned filled = __ballot_sync(kWholeWarp, of_lane != 0);
    int before = 0, total = 0;
    for (unsigned left = filled; left != 0; left &= left - 1) {  // usually one or two warps have any
        const int w = __ffs(static_cast<int>(left)) - 1;
        if (w < warp_id()) before += warp_totals[w];
        total += warp_totals[w];
    }
    if (mine) list[before + __popc(ballot & ((1u << lane_id()) - 1))] = start + static_cast<int>(threadIdx.x);
    __syncthreads();
    return total;
}

// What a token gives to its block: r of its top-k and 0 elsewhere (top_p), or every r (top_c). `row`: a value per
// expert, 16-byte aligned, and scratch before.
template <int PER_LANE>
DMOE_DEVICE void write_votes(const RouteArguments &a, const float (&r)[PER_LANE], bool top_k_only, float *row) {
    const int lane = lane_id(), first = lane * a.per_lane;
    if (!top_k_only) {
        DMOE_UNROLL
        for (int i = 0; i < PER_LANE; ++i) {
            if (i < a.per_lane) row[first + i] = r[i];
        }
        return;
    }
    uint32_t keys[PER_LANE];  // also −∞ past the last expert, which comes behind all experts
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; ++i) keys[i] = ordered_bits_of_score(r[i]);
    const Place place = best_experts(keys, a.per_lane, a.attributes.experts_per_token, false, false,
                                     reinterpret_cast<uint32_t *>(row));
    DMOE_UNROLL
    for (int i = 0; i < PER_LANE; i += 4) reinterpret_cast<float4 *>(row)[i / 4 * kWarp + lane] = float4{0, 0, 0, 0};
    __syncwarp();
    if (place.expert >= 0) row[place.expert] = from_ordered_bits(place.key);
}

// votes[e] and the column of e in the first `active` rows: their sum in order, or the largest.
DMOE_DEVICE void add_votes(const float *rows, int stride, int active, int experts, bool sum, float *votes) {
    constexpr int kAtOnce = 16;
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        float total = votes[e];
        for (int w = 0; w < active; w += kAtOnce) {
            float values[kAtOnce];  // asked for together
            DMOE_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                values[i] = w + i < active ? rows[(w + i) * stride + e] : sum ? 0.0f : -INFINITY;
            }
            if (sum) {
                DMOE_UNROLL
                for (int i = 0; i < kAtOnce; ++i) total += values[i];
            } else {
                DMOE_UNROLL
                for (int i = 0; i < kAtOnce; ++i) {
                    total = values[i] > total || values[i] != values[i] ? values[i] : total;
                }
            }
        }
        votes[e] = total;
    }
}

// How many of the votes in order (as ordered_bits) the top_p rule keeps; a whole warp. Sums in double, so that a
// threshold that is met exactly is met here too (and as torch does).
DMOE_DEVICE int count_top_p(const uint32_t *keys, int count, float top_p) {
    double before = 0.0;
    for (int start = 0; start < count; start += kWarp) {
        const int rank = start + lane_id();
        const float vote = rank < count ? from_ordered_bits(keys[rank]) : 0.0f;
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
    return count;
}

constexpr uint32_t kNoVote = 0x80000000u;  // ordered_bits(0)

// How many bits are set in the words before word `at`, and in all.
template <int WORDS>
DMOE_DEVICE int bits_before(const uint32_t *words, int at, int &total) {
    int before = 0;
    total = 0;
    DMOE_UNROLL
    for (int w = 0; w < WORDS; ++w) {
        if (w == at) before = total;
        total += __popc(words[w]);
    }
    return before;
}

// Shared memory of find_coreset for up to EXPERTS experts.
template <int EXPERTS>
struct CoresetScratch {
    uint32_t key_at[EXPERTS], rank_at[EXPERTS];   // of each place among the experts that are ranked; 16-byte aligned
    uint32_t key_of[EXPERTS], place_of[EXPERTS];  // of each expert
    uint32_t ordered[EXPERTS];                    // keys in order of rank
    uint32_t ranked[EXPERTS / kWarp], positive[EXPERTS / kWarp];  // bit l of word w: expert l + 32 w
    int count;  // of places
};

// Keys of all experts, and which of them are ranked. In top_p those without a vote are not: they follow the positive
// votes and precede the negative ones, in order.
template <int EXPERTS>
DMOE_DEVICE void key_votes(const float *votes, int experts, bool sum, CoresetScratch<EXPERTS> &s) {
    const int warps = static_cast<int>(blockDim.x) / kWarp, words = (experts + kWarp - 1) / kWarp;
    for (int w = words + static_cast<int>(threadIdx.x); w < EXPERTS / kWarp; w += blockDim.x) {
        s.ranked[w] = s.positive[w] = 0;
    }
    if (warp_id() >= words) return;
    float total = 0.0f;  // every warp for itself: the same number, and no barrier
    for (int e = lane_id(); sum && e < experts; e += kWarp) total += votes[e];
    total = warp_sum(total) + 1e-20f;
    for (int w = warp_id(); w < words; w += warps) {
        const int e = w * kWarp + lane_id();
        uint32_t key = kNoVote;
        if (e < experts) key = ordered_bits(sum ? votes[e] / total : votes[e]);
        const unsigned ranked = __ballot_sync(kWholeWarp, sum ? key != kNoVote : e < experts);
        const unsigned positive = __ballot_sync(kWholeWarp, sum ? key > kNoVote : e < experts);
        s.key_of[e] = key;
        if (lane_id() == 0) {
            s.ranked[w] = ranked;
            s.positive[w] = positive;
        }
    }
}

// Each place counts the better ones: larger keys, and equal ones before it. Eight lanes per place, four keys at a time.
template <int EXPERTS>
DMOE_DEVICE void rank_places(CoresetScratch<EXPERTS> &s) {
    constexpr int kLanes = 8;
    const int count = s.count, part = lane_id() % kLanes, step = static_cast<int>(blockDim.x) / kLanes;
    // Whole warps go round, for the shuffles.
    for (int first = warp_id() * (kWarp / kLanes); first < count; first += step) {
        const int place = first + lane_id() / kLanes;
        const uint32_t mine = place < count ? s.key_at[place] : 0xffffffffu;  // a key is never 0
        int better = 0;
        for (int j = 4 * part; j < count; j += 4 * kLanes) {
            const uint4 four = *reinterpret_cast<const uint4 *>(s.key_at + j);
            better += four.x > (j < place ? mine - 1 : mine);
            better += four.y > (j + 1 < place ? mine - 1 : mine);
            better += four.z > (j + 2 < place ? mine - 1 : mine);
            better += four.w > (j + 3 < place ? mine - 1 : mine);
        }
        DMOE_UNROLL
        for (int distance = 1; distance < kLanes; distance *= 2) better += __shfl_xor_sync(kWholeWarp, better, distance);
        if (part == 0 && place < count) {
            s.rank_at[place] = static_cast<uint32_t>(better);
            s.ordered[better] = mine;
        }
    }
}

// The block's coreset (bit l of word w: expert l + 32 w) from its votes; all threads, which see it when this returns.
// A word past the last one is there, and 0. Nothing is sorted: each expert with a vote counts the better ones.
// top_p mode keeps what the threshold keeps, but at least `least` experts; the other one keeps `least`.
template <int EXPERTS>
DMOE_DEVICE void find_coreset(const RouteArguments &a, const float *votes, bool sum, float top_p, int least,
                              CoresetScratch<EXPERTS> &s, uint32_t *coreset) {
    constexpr int kWords = EXPERTS / kWarp;
    const int warps = static_cast<int>(blockDim.x) / kWarp, warp = warp_id(), lane = lane_id();
    const int words = (a.experts + kWarp - 1) / kWarp;
    key_votes(votes, a.experts, sum, s);
    __syncthreads();
    for (int w = warp; w < words; w += warps) {
        int count;
        const int e = w * kWarp + lane, before = bits_before<kWords>(s.ranked, w, count);
        const int place = before + __popc(s.ranked[w] & ((1u << lane) - 1));
        s.place_of[e] = static_cast<uint32_t>(place);
        if (s.ranked[w] >> lane & 1u) s.key_at[place] = s.key_of[e];
        if (w == 0 && count + lane < (count + 3) / 4 * 4) s.key_at[count + lane] = 0;  // rank_places reads by fours
        s.count = count;
    }
    for (int w = words + static_cast<int>(threadIdx.x); w <= kWords; w += blockDim.x) coreset[w] = 0;
    __syncthreads();
    rank_places(s);
    __syncthreads();
    if (warp < words) {
        int positives;
        bits_before<kWords>(s.positive, 0, positives);
        const int limit = sum ? max(count_top_p(s.ordered, positives, top_p), least) : least;
        for (int w = warp; w < words; w += warps) {
            const int e = w * kWarp + lane;
            int rank = positives + e - static_cast<int>(s.place_of[e]);  // without a vote
            if (s.ranked[w] >> lane & 1u) {
                rank = static_cast<int>(s.rank_at[s.place_of[e]]);
                if (rank >= positives) rank += a.experts - s.count;
            }
            const unsigned members = __ballot_sync(kWholeWarp, e < a.experts && rank < limit);
            if (lane == 0) coreset[w] = members;
        }
    }
    __syncthreads();
}

// Bit i: the lane's expert i is in the coreset.
DMOE_DEVICE uint32_t members_of_lane(const RouteArguments &a, const uint32_t *coreset) {
    const int first = lane_id() * a.per_lane, word = first / kWarp;
    const uint64_t two = static_cast<uint64_t>(coreset[word + 1]) << 32 | coreset[word];
    return static_cast<uint32_t>(two >> first % kWarp) & static_cast<uint32_t>((uint64_t{1} << a.per_lane) - 1);
}

}  // namespace dmoe
