// How an expert's weight rows come from memory into operand A of the products: 16-bit floats as they lie there, or
// integers of 8 or 4 bits that become 16-bit floats in registers. README.md says which lane takes which values.
//
// A step is 64 values of k. Each type below holds a lane's part of a step of two weight rows:
//   load()    fetches it; a step behind the end of the rows may be asked for
//   values()  eight values of a row as the words of two products, first or second half of the step
//   unit()    where the first half's eight k are in a token; those of the second half are kNext units further
//   kPartial  whether a half of a step can lie behind the end, where tokens are to be read as 0
//   kAhead    how many steps are asked for at once
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kUnit = 8;              // halfs in 16 bytes, the unit of token offsets
constexpr int kSegment = 64 / kUnit;  // units of a step: one 128-byte line of every 16-bit row

// Two neighbouring rows of an expert, the lane's own.
struct RowPair {
    const char *row[2];
    const uint16_t *scales[2];  // null with plain weights
    int group_shift;            // log2 of the values per scale
    int units;                  // of k
};

// 16-bit weights. A lane takes units q and q + 4 of the step.
template <class Half>
struct PlainRows {
    static constexpr int kBits = 16, kNext = 4;
    static constexpr bool kPartial = true;
    template <int TILES>
    static constexpr int kAhead = TILES == 4 ? 3 : 2;

    uint4 words[2][2];

    static DMOE_DEVICE int unit(int at, int) { return at + lane_id() % 4; }
    DMOE_DEVICE void load(const RowPair &from, int at) {
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int place = unit(at, from.units) + half * kNext;
            DMOE_UNROLL
            for (int r = 0; r < 2; ++r) {
                words[r][half] = load_once(reinterpret_cast<const uint4 *>(from.row[r]) + place, place < from.units);
            }
        }
    }
    DMOE_DEVICE uint4 values(int r, int half) const { return words[r][half]; }
};

// Unsigned integers u with a scale per group: a weight is (u − 2^(BITS − 1)) · scale, rounded once to Half, the very
// value that dequantising gives. A lane takes units 2q and 2q + 1: 16 values, which are 16 or 8 bytes, one load. The
// scale goes to the weight and not to the sum: with groups of 32 the lanes of one product are in two groups, and the
// cost is the same for any number of tokens.
template <class Half, int BITS>
struct QuantisedRows {
    static_assert(BITS == 8 || BITS == 4, "what there is code for");
    static constexpr int kBits = BITS, kNext = 1;
    static constexpr bool kPartial = false;
    template <int TILES>
    static constexpr int kAhead = (BITS == 8 ? 4 : 6) - (TILES == 4 ? 0 : 2);

    uint32_t words[2][BITS / 2];
    uint32_t scales[2];

    // Rows are whole groups, so a lane has both units or none. A lane without has scales of 0, and so weights of 0,
    // whatever its words are; of the token it reads what is there.
    static DMOE_DEVICE int unit(int at, int units) { return min(at + lane_id() % 4 * 2, units - 2); }
    DMOE_DEVICE void load(const RowPair &from, int at) {
        const unsigned place = at + lane_id() % 4 * 2, group = place * kUnit >> from.group_shift;
        load_once(words, scales, from.row[0] + place * BITS, from.row[1] + place * BITS, from.scales[0] + group,
                  from.scales[1] + group, place < static_cast<unsigned>(from.units));
    }
    DMOE_DEVICE uint4 values(int r, int half) const {
        uint32_t low, high;  // four integers each, a byte per integer
        if constexpr (BITS == 8) {
            low = words[r][2 * half], high = words[r][2 * half + 1];
        } else {
            const uint32_t even = words[r][half] & 0x0f0f0f0fu, odd = words[r][half] >> 4 & 0x0f0f0f0fu;
            low = __byte_perm(even, odd, 0x5140), high = __byte_perm(even, odd, 0x7362);
        }
        const uint32_t scale = __byte_perm(scales[r], 0, 0x1010);
        return make_uint4(Half::template dequantise<BITS>(low, 0x4140, scale),
                          Half::template dequantise<BITS>(low, 0x4342, scale),
                          Half::template dequantise<BITS>(high, 0x4140, scale),
                          Half::template dequantise<BITS>(high, 0x4342, scale));
    }
};

}  // namespace dmoe
