// One stage multiplied: 64 weight rows times up to eight tiles of eight tokens, by eight warps.
//
// A warp has 32 of the rows and every fourth step of 32 k (integers of 4 bits: every fourth two steps). Weights are operand A of mma.m16n8k16, tokens operand B. A row g
// is row 2g and A row g+8 is row 2g+1 of sixteen, so that a lane ends up with two neighbouring rows of the same token: a
// gate with its up, or two neighbouring outputs. k may be permuted as long as A and B agree: integers take the eight
// values of a token's unit in one lane, 16-bit weights take k as it is.
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
        const char *const from = stage + weight_place(row, step * 4 + k * 2 + lane / 16);
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

// `shift`: log2 of the values per scale.
template <class Half, int BITS, int TILES, int STEP>
DMOE_DEVICE void multiply_step(Sums<TILES> &sums, const char *stage, const uint4 (&bytes)[2], int tiles, int shift) {
    const int step = warp_id() % kSplit * kStepsOfBlock<BITS> + STEP, band = warp_id() / kSplit * 2;
    uint32_t weights[2][2][4];
    DMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
        const char *const scales = stage + scale_place<BITS, TILES>(band + half, step * kStep >> shift);
        lane_weights<Half, BITS, STEP>(weights[half], bytes[half], lane_scales(scales));
    }
    const char *const tokens = stage + token_place<BITS>(lane_id() / 4, step * 4 + lane_id() % 4);
    DMOE_UNROLL
    for (int j = 0; j < TILES; ++j) {
        if (j >= tiles) break;
        const uint4 b = *reinterpret_cast<const uint4 *>(tokens + j * 8 * kTokenUnits<BITS> * 16);
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t(&w)[2][4] = weights[half];
            Half::mma(sums[half][j], w[0][0], w[0][1], w[0][2], w[0][3], b.x, b.y);
            Half::mma(sums[half][j], w[1][0], w[1][1], w[1][2], w[1][3], b.z, b.w);
        }
    }
}

// A block of each of the warp's two bands. `depth`: k from the stage's first to the matrix's last.
template <class Half, int BITS, int TILES>
DMOE_DEVICE void multiply_integers(Sums<TILES> &sums, const char *stage, int tiles, int depth, int shift) {
    static_assert(kBlocks<BITS> == kSplit, "a block per warp");
    const int block = warp_id() % kSplit, k = block * kStepsOfBlock<BITS> * kStep;
    if (k >= depth) return;
    const bool whole = BITS == 8 || k + kStep < depth;
    uint4 bytes[2];
    DMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
        bytes[half] = lane_bytes(stage + block_place<BITS>(warp_id() / kSplit * 2 + half, block), whole);
    }
    multiply_step<Half, BITS, TILES, 0>(sums, stage, bytes, tiles, shift);
    if constexpr (BITS == 4) {
        if (whole) multiply_step<Half, BITS, TILES, 1>(sums, stage, bytes, tiles, shift);
    }
}

}  // namespace dmoe
