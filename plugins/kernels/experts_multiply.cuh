// One stage multiplied: 64 weight rows times up to eight tiles of eight tokens, by eight warps.
//
// A warp has 32 of the rows and every fourth step of 32 k. Weights are operand A of mma.m16n8k16, tokens operand B. A row g
// is row 2g and A row g+8 is row 2g+1 of sixteen, so that a lane ends up with two neighbouring rows of the same token: a
// gate with its up, or two neighbouring outputs. k may be permuted as long as A and B agree: integers take the eight
// values of a unit in one lane, 16-bit weights take k as it is.
#pragma once

#include "experts_stage.cuh"

namespace dmoe {

constexpr int kSplit = 4;  // warps that share rows

// Sums of a warp: [its two sixteens of rows][tile][as mma's c].
template <int TILES>
using Sums = float[2][TILES][4];

template <class Half, int TILES>
DMOE_DEVICE void multiply_plain(Sums<TILES> &sums, const char *stage, int tiles, int depth) {
    const int lane = lane_id(), step = warp_id() % kSplit;
    if (step * kStep >= depth) return;
    // Sixteen rows further is one place further in the order of units, and so are eight tokens.
    const int row = warp_id() / kSplit * 32 + lane % 8 * 2 + (lane / 8 & 1);
    uint32_t weights[2][2][4];
    DMOE_UNROLL
    for (int k = 0; k < 2; ++k) {
        const char *const from = stage + weight_place<16>(row, step * 4 + k * 2 + lane / 16);
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {  // the matrices: even rows, odd rows, the same of the next unit
            load_matrices(weights[half][k], from + half * 16 * kWeightUnits<16> * 16);
        }
    }
    const char *const from = stage + token_place<16>(lane % 8, step * 4 + lane / 8);
    DMOE_UNROLL
    for (int j = 0; j < TILES; ++j) {
        if (j >= tiles) break;
        uint32_t tokens[4];  // the matrices: four units
        load_matrices(tokens, from + j * 8 * kTokenUnits<16> * 16);
        DMOE_UNROLL
        for (int k = 0; k < 2; ++k) {
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const uint32_t(&w)[4] = weights[half][k];
                Half::mma(sums[half][j], w[0], w[1], w[2], w[3], tokens[2 * k], tokens[2 * k + 1]);
            }
        }
    }
}

// Eight integers of a row, which are unit q of a step, as halfs in the order of k.
template <class Half, int BITS>
DMOE_DEVICE uint4 dequantised(const char *words, uint32_t scale) {
    uint32_t low, high;  // four integers each, a byte per integer
    if constexpr (BITS == 8) {
        const uint2 both = *reinterpret_cast<const uint2 *>(words);
        low = both.x, high = both.y;
    } else {
        const uint32_t word = *reinterpret_cast<const uint32_t *>(words);
        const uint32_t even = word & 0x0f0f0f0fu, odd = word >> 4 & 0x0f0f0f0fu;
        low = __byte_perm(even, odd, 0x5140), high = __byte_perm(even, odd, 0x7362);
    }
    return make_uint4(Half::template dequantise<BITS>(low, 0x4140, scale), Half::template dequantise<BITS>(low, 0x4342, scale),
                      Half::template dequantise<BITS>(high, 0x4140, scale),
                      Half::template dequantise<BITS>(high, 0x4342, scale));
}

// `shift`: log2 of the values per scale. `odd_rows`, `odd`: whether the scales of odd rows, and those of all rows, start in
// the middle of a word (the two cancel out).
template <class Half, int BITS, int TILES>
DMOE_DEVICE void multiply_integers(Sums<TILES> &sums, const char *stage, int tiles, int depth, int shift, bool odd_rows,
                                   bool odd) {
    const int g = lane_id() / 4, q = lane_id() % 4, row = warp_id() / kSplit * 32 + 2 * g;
    DMOE_UNROLL_BY((TILES == 4 ? 2 : 1))  // with more tiles there are no registers for two
    for (int piece = 0; piece < kChunk<BITS> / kStep / kSplit; ++piece) {
        const int step = piece * kSplit + warp_id() % kSplit;
        if (step * kStep >= depth) continue;
        const int byte = step * kStep * BITS / 8 + q * BITS;  // of a row
        const char *const words = stage + weight_place<BITS>(row, byte / 16) + byte % 16;
        uint4 weights[2][2];
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            DMOE_UNROLL
            for (int r = 0; r < 2; ++r) {  // as far apart as in multiply_plain(); a row and the one below share an order
                const int below = half * 16 + r, place = (step * kStep >> shift) + (odd != (r && odd_rows));
                const uint32_t scale =
                    reinterpret_cast<const uint16_t *>(stage + scale_place<BITS, TILES>(row + below, 0))[place];
                weights[half][r] = dequantised<Half, BITS>(words + below * kWeightUnits<BITS> * 16, scale | scale << 16);
            }
        }
        const char *const tokens = stage + token_place<BITS>(g, step * 4 + q);
        DMOE_UNROLL
        for (int j = 0; j < TILES; ++j) {
            if (j >= tiles) break;
            const uint4 b = *reinterpret_cast<const uint4 *>(tokens + j * 8 * kTokenUnits<BITS> * 16);
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const uint4 even = weights[half][0], other = weights[half][1];
                Half::mma(sums[half][j], even.x, other.x, even.y, other.y, b.x, b.y);
                Half::mma(sums[half][j], even.z, other.z, even.w, other.w, b.z, b.w);
            }
        }
    }
}

}  // namespace dmoe
