// One stage of experts_large.cuh multiplied: a warp has 32 weight rows, 64 tokens and the whole line of k. Operands and
// their order are those of experts_multiply.cuh.
#pragma once

#include "experts_large_stage.cuh"
#include "experts_multiply.cuh"

namespace dmoe {

constexpr int kWarpTiles = 8;  // of eight tokens
using LargeSums = Sums<kWarpTiles>;

DMOE_DEVICE int large_row() { return warp_id() % 4 * 32; }                   // the warp's first, of the item
DMOE_DEVICE int large_column() { return warp_id() / 4 * (kWarpTiles * 8); }  // and of the pass's tokens

// One step of 16-bit weights. `tiles`: those of the warp that have tokens.
template <class Half>
DMOE_DEVICE void multiply_large_step(LargeSums &sums, const char *stage, int step, int tiles) {
    const int lane = lane_id();
    // Sixteen rows or eight tokens further units have the same order, and two or four units further is an xor.
    const int weights_at = large_weight_place(large_row() + lane % 8 * 2 + (lane / 8 & 1), lane / 16);
    const int tokens_at = large_token_place(large_column() + lane % 8, lane / 8) ^ step * 64;
    uint32_t weights[2][2][4];
    DMOE_UNROLL
    for (int k = 0; k < 2; ++k) {
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {  // the matrices: even rows, odd rows, the same of the next unit
            load_matrices(weights[half][k], stage + (weights_at ^ (step * 64 + k * 32)) + half * 16 * kLineUnits * 16);
        }
    }
    DMOE_UNROLL
    for (int j = 0; j < kWarpTiles; ++j) {
        if (j >= tiles) break;
        uint32_t tokens[4];  // the matrices: four units
        load_matrices(tokens, stage + tokens_at + j * 8 * kLineUnits * 16);
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

// One step of integers. `shift`: log2 of the values per scale. `whole`: the line has both steps.
template <class Half, int BITS>
DMOE_DEVICE void multiply_large_step(LargeSums &sums, const char *stage, int step, int tiles, int shift, bool whole) {
    const int lane = lane_id(), band = large_row() / kBand;
    uint32_t weights[2][2][4];
    DMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
        const char *const bytes = stage + large_block_place<BITS>(band + half, BITS == 8 ? step : 0) + lane * 16;
        const char *const scales = stage + large_scale_place<BITS>(band + half, step * kStep >> shift) + lane / 4 * 4;
        lane_weights<Half, BITS>(weights[half], lane_bytes(bytes, BITS == 8 || whole), BITS == 8 ? 0 : step,
                                 *reinterpret_cast<const uint32_t *>(scales));
    }
    const int tokens_at = large_token_place(large_column() + lane / 4, lane % 4) ^ step * 64;
    DMOE_UNROLL
    for (int j = 0; j < kWarpTiles; ++j) {
        if (j >= tiles) break;
        const uint4 b = *reinterpret_cast<const uint4 *>(stage + tokens_at + j * 8 * kLineUnits * 16);
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t(&w)[2][4] = weights[half];
            Half::mma(sums[half][j], w[0][0], w[0][1], w[0][2], w[0][3], b.x, b.y);
            Half::mma(sums[half][j], w[1][0], w[1][1], w[1][2], w[1][3], b.z, b.w);
        }
    }
}

// A line of `steps` steps. Each has a sum of its own, but where a line has one for both (line_at()), that of its last bit.
template <class Half, int BITS>
DMOE_DEVICE void multiply_large(LargeSums (&sums)[2], const char *stage, bool plain, int line, int steps, int tiles, int shift) {
    if (BITS == 16 || plain) {
        multiply_large_step<Half>(sums[0], stage, 0, tiles);
        if (steps == 2) multiply_large_step<Half>(sums[1], stage, 1, tiles);
    } else if constexpr (BITS != 16) {
        LargeSums &one = sums[0], &other = sums[1];
        if (BITS == 8 || line % 2 == 0) {
            multiply_large_step<Half, BITS>(one, stage, 0, tiles, shift, steps == 2);
            if (BITS == 4 && steps == 2) multiply_large_step<Half, BITS>(one, stage, 1, tiles, shift, true);
        } else {
            multiply_large_step<Half, BITS>(other, stage, 0, tiles, shift, steps == 2);
        }
        if (steps == 2 && (BITS == 8 || line % 2)) multiply_large_step<Half, BITS>(other, stage, 1, tiles, shift, true);
    }
}

}  // namespace dmoe
