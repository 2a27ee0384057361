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

// Where in a stage a lane finds what it multiplies; the same in all stages.
template <int BITS>
struct LanePlaces {
    int weights, scales, tokens;  // of integers

    template <int TILES>
    static DMOE_DEVICE LanePlaces of() {
        const int block = warp_id() % kSplit, band = warp_id() / kSplit * 2, g = lane_id() / 4, q = lane_id() % 4;
        return {kept(block_place<BITS>(band, block) + lane_id() * 16), kept(scale_place<BITS, TILES>(band, 0) + g * 4),
                kept(token_place<BITS>(g, block * kStepsOfBlock<BITS> * 4 + q))};
    }
};

// A block of each of the warp's two bands: a step, or two of integers of 4 bits. `depth`: k from the stage's first to the
// matrix's last. `shift`: log2 of the values per scale.
template <class Half, int BITS, int TILES>
DMOE_DEVICE void multiply_integers(Sums<TILES> &sums, const LanePlaces<BITS> &places, const char *stage, int tiles,
                                   int depth, int shift) {
    static_assert(kBlocks<BITS> == kSplit, "a block per warp");
    constexpr int kSteps = kStepsOfBlock<BITS>, kAtOnce = TILES == 4 ? kSteps : 1;  // with more tiles registers are short
    const int k = warp_id() % kSplit * kSteps * kStep;
    if (k >= depth) return;
    const int steps = BITS == 8 || k + kStep < depth ? kSteps : 1;
    uint4 bytes[2];
    DMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
        bytes[half] = lane_bytes(stage + places.weights + block_place<BITS>(half, 0), steps == kSteps);
    }
    DMOE_UNROLL
    for (int first = 0; first < kSteps; first += kAtOnce) {
        if (first >= steps) break;
        uint32_t weights[kAtOnce][2][2][4];
        DMOE_UNROLL
        for (int s = 0; s < kAtOnce; ++s) {  // a step beyond the last is made, and not multiplied
            const int group = (k + (first + s) * kStep) >> shift;
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const uint32_t scales = *reinterpret_cast<const uint32_t *>(
                    stage + places.scales + half * kScaleBytes<BITS> + group * kBandScales);
                lane_weights<Half, BITS>(weights[s][half], bytes[half], first + s, scales);
            }
        }
        DMOE_UNROLL
        for (int j = 0; j < TILES; ++j) {
            if (j >= tiles) break;
            DMOE_UNROLL
            for (int s = 0; s < kAtOnce; ++s) {
                if (first + s >= steps) break;
                // A step is four units: one bit of the order of units.
                const char *const from = stage + (places.tokens ^ (first + s) * 64) + j * 8 * kTokenUnits<BITS> * 16;
                const uint4 b = *reinterpret_cast<const uint4 *>(from);
                DMOE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const uint32_t(&w)[2][4] = weights[s][half];
                    Half::mma(sums[half][j], w[0][0], w[0][1], w[0][2], w[0][3], b.x, b.y);
                    Half::mma(sums[half][j], w[1][0], w[1][1], w[1][2], w[1][3], b.z, b.w);
                }
            }
        }
    }
}

}  // namespace dmoe
