// How an expert's weight rows come from memory into operand A of the products: 16-bit floats as they lie there, or
// integers of 8 or 4 bits that become 16-bit floats in registers. README.md says which lane takes which values.
//
// A step is 64 values of k. Each type below holds a lane's part of a step of two weight rows:
//   load()     fetches it, zero behind the end of the rows
//   values()   eight values of a row as the words of two products, first or second half of the step
//   token_unit() where the same eight k of a token are
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kUnit = 8;              // halfs in 16 bytes, the unit of token offsets
constexpr int kSegment = 64 / kUnit;  // units of a step: one 128-byte line of every 16-bit row

// Two neighbouring rows of an expert, the lane's own.
struct RowPair {
    const char *even;        // the first one's bytes
    int64_t pitch;           // bytes of a row
    const uint16_t *scales;  // of the even row; null with plain weights
    int groups, group_shift; // groups of a row; log2 of a group's values
    int units;               // of k
};

// 16-bit weights. A lane takes units q and q + 4 of the step.
template <class Half>
struct PlainRows {
    static constexpr int kBits = 16;
    template <int TILES>
    static constexpr int kAhead = TILES == 4 ? 3 : 2;

    uint4 row[2][2];

    DMOE_DEVICE void load(const RowPair &from, int at) {
        DMOE_UNROLL
        for (int r = 0; r < 2; ++r) {
            const auto *const units = reinterpret_cast<const uint4 *>(from.even + r * from.pitch);
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int unit = token_unit(at, half, from.units);
                row[r][half] = load_once(units + unit, unit < from.units);
            }
        }
    }
    DMOE_DEVICE uint4 values(int r, int half) const { return row[r][half]; }
    static DMOE_DEVICE int token_unit(int at, int half, int) { return at + lane_id() % 4 + 4 * half; }
};

// Unsigned integers u with a scale per group: a weight is (u − 2^(BITS − 1)) · scale, rounded once to Half, the very
// value that dequantising gives. A lane takes units 2q and 2q + 1: 16 values, which are 16 or 8 bytes, one load. The
// scale goes to the weight and not to the sum, because with groups of 32 the lanes of a product are in two groups; it
// costs the same for any number of tokens.
template <class Half, int BITS>
struct QuantisedRows {
    static_assert(BITS == 8 || BITS == 4, "what there is code for");
    static constexpr int kBits = BITS;
    template <int TILES>
    static constexpr int kAhead = (BITS == 8 ? 4 : 6) - (TILES == 4 ? 0 : 2);

    uint32_t words[2][BITS / 2];
    uint32_t scales[2];

    DMOE_DEVICE void load(const RowPair &from, int at) {
        const int unit = at + lane_id() % 4 * 2;
        const bool wanted = unit < from.units;  // both units or none: rows are whole groups
        DMOE_UNROLL
        for (int r = 0; r < 2; ++r) {
            load_once(words[r], from.even + r * from.pitch + unit * BITS, wanted);
            scales[r] = load_scale(from.scales + r * from.groups + (unit * kUnit >> from.group_shift), wanted);
        }
    }
    DMOE_DEVICE uint4 values(int r, int half) const {
        uint32_t low, high;  // four integers each, a byte per integer
        if constexpr (BITS == 8) {
            low = words[r][2 * half], high = words[r][2 * half + 1];
        } else {
            const uint32_t even = words[r][half] & 0x0f0f0f0fu, odd = words[r][half] >> 4 & 0x0f0f0f0fu;
            low = __byte_perm(even, odd, 0x5140), high = __byte_perm(even, odd, 0x7362);
        }
        const uint32_t scale = scales[r] | scales[r] << 16;
        return make_uint4(Half::template dequantise<BITS>(low, 0x4140, scale),
                          Half::template dequantise<BITS>(low, 0x4342, scale),
                          Half::template dequantise<BITS>(high, 0x4140, scale),
                          Half::template dequantise<BITS>(high, 0x4342, scale));
    }
    // Behind the end any token value will do that is there to be read: the weight is 0.
    static DMOE_DEVICE int token_unit(int at, int half, int units) {
        return min(at + lane_id() % 4 * 2, units - 2) + half;
    }
};

}  // namespace dmoe
