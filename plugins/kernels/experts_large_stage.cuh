// A stage of the ring of experts_large.cuh: up to 192 tokens and 128 weight rows, over a step of 32 k; with integers of 4
// bits over a block of 64, whose tokens are two planes.
//
// Rows of a plane and of 16-bit weights are 64 bytes, four units. A unit's index is xored with bits 1 and 2 of its row, so
// eight neighbouring rows, or all units of two, are in different banks. Integers and scales lie as in memory.
#pragma once

#include "experts_stage.cuh"

namespace dmoe {

constexpr int kLargeRows = 128;  // weight rows of an item
constexpr int kLargeTiles = 24;  // of eight tokens, in a pass
constexpr int kLargeTokens = kLargeTiles * 8;
constexpr int kStepUnits = kStep / kUnit;
constexpr int kPlaneBytes = kLargeTokens * kStepUnits * 16;

// BITS, here and below: of the routed experts' weights. Those of the shared expert, 16 bits, lie behind the first plane.
template <int BITS>
constexpr int kBlocksAt = kStepsOfBlock<BITS> * kPlaneBytes;
template <int BITS>
constexpr int kLargeScalesAt = kBlocksAt<BITS> + kLargeRows / kBand * kBlockBytes;
template <int BITS>
constexpr int kLargeStageBytes = kStepsOfBlock<BITS> == 1
                                     ? kPlaneBytes + kLargeRows * kStepUnits * 16
                                     : kLargeScalesAt<BITS> + kLargeRows / kBand * kStepsOfBlock<BITS> * kBandScales;

// Of 16-bit weights the even ones of sixteen rows come first, then the odd ones: neighbours here are rows of one matrix.
DMOE_DEVICE int row_of_place(int place) { return (place & ~15) | (place & 7) << 1 | (place >> 3 & 1); }

DMOE_DEVICE int large_place(int row, int unit) { return (row * kStepUnits + (unit ^ (row >> 1 & 3))) * 16; }
template <int BITS>
DMOE_DEVICE int large_scale_place(int band, int group) {
    return kLargeScalesAt<BITS> + (band * kStepsOfBlock<BITS> + group) * kBandScales;
}

// Stages of a pass; wide: each has two steps.
DMOE_DEVICE int stages_of(int depth, bool wide) { return (depth + (wide ? 2 : 1) * kStep - 1) >> (wide ? 6 : 5); }

// The order of k in a pass: a sum of experts_product.cuh after the other. There stage s of a pass, counted as they are here,
// belongs to sum `s mod 4`. So 0, 4, 8, …, then 1, 5, …; behind the last one comes `stages`.
DMOE_DEVICE int stage_after(int stage, int stages) {
    if (stage + 4 < stages) return stage + 4;
    const int first = stage % 4 + 1;
    return first < 4 && first < stages ? first : stages;
}

}  // namespace dmoe
