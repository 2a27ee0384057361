// A stage of the products' ring in shared memory: 64 weight rows and up to 64 tokens, over a piece ("chunk") of k.
//
// Units are 16 bytes. Those of tokens and 16-bit weights lie in an order that keeps every access free of bank conflicts: the
// unit's index is xored with three bits of its row, reversed. Integers lie as in memory, band after band, and so do their
// scales. README.md has the count.
#pragma once

#include "experts_fragments.cuh"

namespace dmoe {

constexpr int kTileRows = 64;  // weight rows of an item
constexpr int kUnit = 8;       // halfs of a token in a unit

// Values of k in a stage. Integers of 4 bits take twice as many, so that a stage is worth its barrier.
template <int BITS>
constexpr int kChunk = BITS == 4 ? 256 : 128;
template <int BITS>
constexpr int kWeightUnits = kChunk<BITS> * BITS / 128;  // of a row
template <int BITS>
constexpr int kTokenUnits = kChunk<BITS> / kUnit;
// Of a band of integers: blocks of its weights, bytes of its scales at most.
template <int BITS>
constexpr int kBlocks = kChunk<BITS> / kStep / kStepsOfBlock<BITS>;
template <int BITS>
constexpr int kScaleBytes = kChunk<BITS> / kStep * kBandScales;

template <int BITS>
constexpr int kTokensAt = kTileRows * kWeightUnits<BITS> * 16;
template <int BITS, int TILES>
constexpr int kScalesAt = kTokensAt<BITS> + TILES * 8 * kTokenUnits<BITS> * 16;
template <int BITS, int TILES>
constexpr int kStageBytes = kScalesAt<BITS, TILES> + (BITS == 16 ? 0 : kTileRows / kBand * kScaleBytes<BITS>);
// What the exchange of sums at the end of a pass takes of the stage that was multiplied last.
template <int TILES>
constexpr int kExchangeBytes = TILES * 4096;

DMOE_DEVICE int reversed(int row) { return (row & 1) << 2 | (row & 2) | (row >> 2 & 1); }

DMOE_DEVICE int weight_place(int row, int unit) {
    return (row * kWeightUnits<16> + (unit ^ reversed(row >> 1))) * 16;
}
template <int BITS>
DMOE_DEVICE int token_place(int row, int unit) {
    return kTokensAt<BITS> + (row * kTokenUnits<BITS> + (unit ^ reversed(row))) * 16;
}
template <int BITS>
DMOE_DEVICE int block_place(int band, int block) {
    return (band * kBlocks<BITS> + block) * kBlockBytes;
}
template <int BITS, int TILES>
DMOE_DEVICE int scale_place(int band, int group) {
    return kScalesAt<BITS, TILES> + band * kScaleBytes<BITS> + group * kBandScales;
}

}  // namespace dmoe
