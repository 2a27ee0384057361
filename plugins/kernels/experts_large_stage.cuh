// A stage of the ring of experts_large.cuh: 128 weight rows and up to 128 tokens, over one line of k: 128 bytes of a row.
//
// A unit's index is xored with three bits of its row. A weight row and the one below share an order, because ldmatrix
// takes every other one of them.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kLargeRows = 128;   // weight rows of an item
constexpr int kLargeTiles = 16;   // of eight tokens, in a pass
constexpr int kLargeTokens = kLargeTiles * 8;
constexpr int kLineUnits = 8;     // of eight halfs each: two steps of 32 k
constexpr int kLine = kLineUnits * 8;
constexpr int kLargeStageBytes = (kLargeRows + kLargeTokens) * kLineUnits * 16;

DMOE_DEVICE int large_weight_place(int row, int unit) { return (row * kLineUnits + (unit ^ (row >> 1 & 7))) * 16; }
DMOE_DEVICE int large_token_place(int row, int unit) {
    return ((kLargeRows + row) * kLineUnits + (unit ^ (row & 7))) * 16;
}

// The order of a row's lines in a pass: 0, 2, 4, …, then 1, 3, 5, …, so that sums of at most two of the four residues of
// steps are open at once.
DMOE_DEVICE int even_lines(int lines) { return (lines + 1) / 2; }
DMOE_DEVICE int line_at(int stage, int lines) {
    const int even = even_lines(lines);
    return stage < even ? 2 * stage : 2 * (stage - even) + 1;
}

}  // namespace dmoe
