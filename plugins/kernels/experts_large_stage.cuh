// A stage of the ring of experts_large.cuh: 128 weight rows and up to 128 tokens, over one line of k: 64
// values, which are 128 bytes of a token.
//
// A unit's index is xored with three bits of its row. A weight row and the one below share an order, because ldmatrix
// takes every other one of them. Integers lie as in memory, band after band, and so do their scales behind them.
#pragma once

#include "experts_stage.cuh"

namespace dmoe {

constexpr int kLargeRows = 128;   // weight rows of an item
constexpr int kLargeTiles = 16;   // of eight tokens, in a pass
constexpr int kLargeTokens = kLargeTiles * 8;
constexpr int kLineUnits = 8;     // of eight halfs each: two steps of 32 k
constexpr int kLine = kLineUnits * 8;
constexpr int kLargeStageBytes = (kLargeRows + kLargeTokens) * kLineUnits * 16;

DMOE_DEVICE int large_weight_place(int row, int unit) { return (row * kLineUnits + (unit ^ (row >> 1 & 7))) * 16; }
DMOE_DEVICE int large_token_place(int row, int unit) {
    return ((kLargeRows + row) * kLineUnits + (unit ^ reversed(row))) * 16;
}

// Of a band of integers: blocks of 512 bytes in a line, one per step of 8 bits and one for both steps of 4; two groups'
// scales at most.
template <int BITS>
constexpr int kLineBlocks = BITS == 8 ? 2 : 1;
template <int BITS>
DMOE_DEVICE int large_block_place(int band, int block) {
    return (band * kLineBlocks<BITS> + block) * kBlockBytes;
}
template <int BITS>
DMOE_DEVICE int large_scale_place(int band, int group) {
    return kLargeRows / kBand * kLineBlocks<BITS> * kBlockBytes + (band * 2 + group) * kBandScales;
}

// The order of lines in a pass: two halves, so that of the four sums of experts_product.cuh two are open at once. There a
// step of 32 k belongs to sum `step mod 4`, and with 4 bits two neighbours do (`pairs`). So of a line either each step has a
// sum of its own, or both have one, that of the line's last bit.
DMOE_DEVICE int lines_of(int depth) { return (depth + kLine - 1) / kLine; }
DMOE_DEVICE int first_lines(int lines, bool pairs) { return pairs ? lines / 4 * 2 + min(lines % 4, 2) : (lines + 1) / 2; }
DMOE_DEVICE int line_at(int stage, int lines, bool pairs) {
    const int first = first_lines(lines, pairs), second = stage >= first ? 1 : 0, place = stage - second * first;
    return pairs ? place / 2 * 4 + second * 2 + place % 2 : place * 2 + second;
}

}  // namespace dmoe
