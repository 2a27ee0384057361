// One stage of experts_large.cuh multiplied. A warp has 64 of the item's rows and every fourth tile of tokens, where weights
// are integers 32 rows and every second tile: so each is dequantised by two warps and not by four. Operands and their order
// are those of experts_multiply.cuh.
#pragma once

#include "experts_large_stage.cuh"
#include "experts_multiply.cuh"

namespace dmoe {

template <int BITS>
constexpr int kWarpHalves = BITS == 16 ? 4 : 2;  // sixteens of rows
template <int BITS>
constexpr int kWarpsOfRows = kLargeRows / kBand / kWarpHalves<BITS>;
template <int BITS>
constexpr int kColumns = kProductThreads / kWarp / kWarpsOfRows<BITS>;  // warps that share rows
template <int BITS>
constexpr int kWarpTiles = kLargeTiles / kColumns<BITS>;
template <int BITS>
using LargeSums = float[kWarpHalves<BITS>][kWarpTiles<BITS>][4];

// Of the item's bands, the warp's first one; of the pass's tiles likewise.
template <int BITS>
DMOE_DEVICE int large_band() {
    return warp_id() % kWarpsOfRows<BITS> * kWarpHalves<BITS>;
}
template <int BITS>
DMOE_DEVICE int large_column() {
    return warp_id() / kWarpsOfRows<BITS>;
}
// How many tiles the warp has of a pass of so many tokens, or more.
template <int BITS>
DMOE_DEVICE int large_tiles(int tokens) {
    return min(kWarpTiles<BITS>, ((tokens + 7) / 8 - large_column<BITS>() + kColumns<BITS> - 1) / kColumns<BITS>);
}

// A step of 16-bit weights. `tiles`: those of the warp that have tokens; they go in pairs.
template <class Half, int BITS>
DMOE_DEVICE void multiply_large_rows(LargeSums<BITS> &sums, const char *stage, int tiles) {
    static_assert(kWarpTiles<BITS> % 2 == 0, "pairs");
    const int lane = lane_id(), row = lane % 8, matrix = lane / 8;
    // Rows further by eight have the same order of units. The next product of the step is two units further: an xor.
    const char *const rows = stage + kPlaneBytes;
    const int weights_at = large_place(large_band<BITS>() * kBand + matrix % 2 * 8 + row, matrix / 2);
    const int tokens_at = large_place((large_column<BITS>() + matrix / 2 * kColumns<BITS>) * 8 + row, matrix % 2);
    DMOE_UNROLL
    for (int k = 0; k < 2; ++k) {
        uint32_t weights[kWarpHalves<BITS>][4];
        DMOE_UNROLL
        for (int half = 0; half < kWarpHalves<BITS>; ++half) {  // the matrices: even rows, odd rows, the same of the next unit
            load_matrices(weights[half], rows + (weights_at ^ k * 32) + half * kBand * kStepUnits * 16);
        }
        DMOE_UNROLL
        for (int j = 0; j < kWarpTiles<BITS>; j += 2) {
            if (j >= tiles) break;
            uint32_t tokens[4];  // the matrices: two units of a tile, the same of the next
            load_matrices(tokens, stage + (tokens_at ^ k * 32) + j * kColumns<BITS> * 8 * kStepUnits * 16);
            DMOE_UNROLL
            for (int t = 0; t < 2; ++t) {
                DMOE_UNROLL
                for (int half = 0; half < kWarpHalves<BITS>; ++half) {
                    const uint32_t(&w)[4] = weights[half];
                    Half::mma(sums[half][j + t], w[0], w[1], w[2], w[3], tokens[2 * t], tokens[2 * t + 1]);
                }
            }
        }
    }
}

// A block of each of the warp's bands of integers. `depth`: k from the stage's first to the matrix's last. `shift`: log2 of
// the values per scale.
template <class Half, int BITS>
DMOE_DEVICE void multiply_large_blocks(LargeSums<BITS> &sums, const char *stage, int tiles, int depth, int shift) {
    constexpr int kHalves = kWarpHalves<BITS>;
    const int lane = lane_id(), band = large_band<BITS>();
    const char *const tokens = stage + large_place(large_column<BITS>() * 8 + lane / 4, lane % 4);
    uint4 bytes[kHalves];
    DMOE_UNROLL
    for (int half = 0; half < kHalves; ++half) {
        const char *const block = stage + kBlocksAt<BITS> + (band + half) * kBlockBytes;
        bytes[half] = lane_bytes(block + lane * 16, BITS == 8 || depth > kStep);
    }
    DMOE_UNROLL
    for (int step = 0; step < kStepsOfBlock<BITS>; ++step) {
        if (step * kStep >= depth) break;
        uint32_t weights[kHalves][2][4];
        DMOE_UNROLL
        for (int half = 0; half < kHalves; ++half) {
            const char *const scales = stage + large_scale_place<BITS>(band + half, step * kStep >> shift) + lane / 4 * 4;
            lane_weights<Half, BITS>(weights[half], bytes[half], step, *reinterpret_cast<const uint32_t *>(scales));
        }
        DMOE_UNROLL
        for (int j = 0; j < kWarpTiles<BITS>; ++j) {
            if (j >= tiles) break;
            const uint4 b = *reinterpret_cast<const uint4 *>(tokens + step * kPlaneBytes +
                                                             j * kColumns<BITS> * 8 * kStepUnits * 16);
            DMOE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                const uint32_t(&w)[2][4] = weights[half];
                Half::mma(sums[half][j], w[0][0], w[0][1], w[0][2], w[0][3], b.x, b.y);
                Half::mma(sums[half][j], w[1][0], w[1][1], w[1][2], w[1][3], b.z, b.w);
            }
        }
    }
}

}  // namespace dmoe
