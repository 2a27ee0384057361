// How a call of the experts is cut into launches: which product multiplies, how many tokens at once, how many outputs.
//
// It depends on sizes alone, of the call and of the device, never on the ids. And it changes no bit of a result, because both
// products add in one order.
#pragma once

#include "experts_launch.cuh"

namespace dmoe {

constexpr int kFewTokens = 1024;  // of a chunk in experts_product.cuh
constexpr int kManyTokens = 4096, kManyPairs = 32768;  // of one in experts_large.cuh; a pair is a 16-bit number
// From so many tokens per expert on, on average, experts_large.cuh multiplies. Below, its pass of 192 tokens is less than
// a quarter full, and with 16-bit weights experts_product.cuh is bound by their bytes: 150 TFLOP/s against 3.0 TB/s.
constexpr int kTokensPerExpert = 48;

struct Plan {
    bool large;     // experts_large.cuh multiplies
    int tokens;     // of a chunk, which reads its experts once
    int down_rows;  // outputs of a launch of down: a chunk of more than kChunkPairs pairs has them in slices
};

// Outputs per slice, so that those of all pairs are at most kChunkPairs · hidden, or a tile's rows.
inline int slice_rows(int64_t pairs, int hidden) {
    if (pairs <= kChunkPairs) return hidden;
    const int rows = static_cast<int>(static_cast<int64_t>(kChunkPairs) * hidden / pairs / kLargeRows) * kLargeRows;
    return min(hidden, max(rows, kLargeRows));
}

// `bits`: of the weights. Devices with little shared memory (compute capability 7.5) get short lists of pairs and the
// product for few tokens.
inline Plan plan_of(const DmoeExpertsShape &s, int bits) {
    const int64_t pairs = static_cast<int64_t>(s.tokens) * s.places;
    const bool little = shared_bytes_per_block() < 96 << 10;  // 7.5, which has no asynchronous copies either
    const Plan few{false, min(kFewTokens, (little ? kChunkPairs / 4 : kChunkPairs) / s.places), s.hidden};
    // Another chunk of few would read its experts again, which costs nothing where integers are bound by arithmetic.
    if (little || (pairs <= kTokensPerExpert * s.experts && (bits != 16 || s.tokens <= few.tokens))) return few;
    int most = kManyPairs;
    while (most >= kChunkPairs && large_stages(bits, list_bytes(s.experts, most)) < 2) most /= 2;
    if (most < kChunkPairs) return few;
    const int tokens = min(kManyTokens, most / s.places);
    return {true, tokens, slice_rows(min(pairs, static_cast<int64_t>(tokens) * s.places), s.hidden)};
}

}  // namespace dmoe
