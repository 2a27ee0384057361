// A stage of the products' ring in shared memory: 64 weight rows and up to 64 tokens, over a piece ("chunk") of k.
//
// Units are 16 bytes. They lie in an order that keeps every access free of bank conflicts: the unit's index is xored
// with three bits of its row, reversed. README.md has the count.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kTileRows = 64;  // weight rows of an item
constexpr int kUnit = 8;       // halfs of a token in a unit
constexpr int kStep = 32;      // k that a warp takes in one go; step t of k belongs to the warps with index t mod 4

// Values of k in a stage. Integers of 4 bits take twice as many, so that a stage is worth its barrier.
template <int BITS>
constexpr int kChunk = BITS == 4 ? 256 : 128;
template <int BITS>
constexpr int kWeightUnits = kChunk<BITS> * BITS / 128;  // of a row
template <int BITS>
constexpr int kTokenUnits = kChunk<BITS> / kUnit;
// 4-byte words with a row's scales: 4 or 8 of 2 bytes at most, and half a word when they start in its middle. Odd, for
// the banks.
template <int BITS>
constexpr int kScaleWords = kChunk<BITS> / 64 + 1;

template <int BITS>
constexpr int kTokensAt = kTileRows * kWeightUnits<BITS> * 16;
template <int BITS, int TILES>
constexpr int kScalesAt = kTokensAt<BITS> + TILES * 8 * kTokenUnits<BITS> * 16;
template <int BITS, int TILES>
constexpr int kStageBytes = kScalesAt<BITS, TILES> + (BITS == 16 ? 0 : kTileRows * kScaleWords<BITS> * 4);
// What the exchange of sums at the end of a pass takes of the stage that was multiplied last.
template <int TILES>
constexpr int kExchangeBytes = TILES * 4096;

DMOE_DEVICE int reversed(int row) { return (row & 1) << 2 | (row & 2) | (row >> 2 & 1); }

template <int BITS>
DMOE_DEVICE int weight_place(int row, int unit) {
    return (row * kWeightUnits<BITS> + (unit ^ reversed(row >> 1))) * 16;
}
template <int BITS>
DMOE_DEVICE int token_place(int row, int unit) {
    return kTokensAt<BITS> + (row * kTokenUnits<BITS> + (unit ^ reversed(row))) * 16;
}
template <int BITS, int TILES>
DMOE_DEVICE int scale_place(int row, int word) {
    return kScalesAt<BITS, TILES> + (row * kScaleWords<BITS> + word) * 4;
}

}  // namespace dmoe
