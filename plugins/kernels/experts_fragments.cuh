// Integer weights in fragment order, as dmoe_export/ops/experts/fragments.py defines it: where a lane's bytes are, and how
// they become operands of the tensor cores.
//
// A band of 16 rows is blocks of 512 bytes along k, 32 k of 8 bits or 64 k of 4; lane l has 16 bytes at 16 · l. Where k are
// an odd multiple of 32, the band's last block of 4 bits is half as long, 8 bytes at 8 · l. Scales lie apart: for each group
// of k 16 of them, one per row.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kBand = 16;         // rows that lie together
constexpr int kStep = 32;         // k of a step: four lanes of a row, eight values each
constexpr int kBlockBytes = 512;  // of a warp's 32 lanes
template <int BITS>
constexpr int kStepsOfBlock = BITS == 4 ? 2 : 1;

// Bytes of 16 rows' weights, and of their scales, per value of k and per group.
template <int BITS>
constexpr int kBandBytes = kBand * BITS / 8;
constexpr int kBandScales = kBand * 2;

// The lane's bytes of a block in shared memory, of a half one (not whole) its first two words. at: where those of a whole
// one are.
DMOE_DEVICE uint4 lane_bytes(const char *at, bool whole) {
    if (whole) return *reinterpret_cast<const uint4 *>(at);
    const uint2 half = *reinterpret_cast<const uint2 *>(at - lane_id() * 8);
    return make_uint4(half.x, half.y, 0, 0);
}

// A step of lane 4g + q as operand A of two products of Half::mma: a[p] are the halfs of rows 2g (a[p][0], a[p][2]) and
// 2g + 1 (a[p][1], a[p][3]) at k = 8q + 4p … 8q + 4p + 3 of the step, two in each. So row 2g is A's row g and row 2g + 1 its
// row g + 8, and B is words 2p and 2p + 1 of the 16 bytes of token g at k = 8q. step: of the block's, known at compile time. scales: lane_scales().
template <class Half, int BITS>
DMOE_DEVICE void lane_weights(uint32_t (&a)[2][4], const uint4 &bytes, int step, uint32_t scales) {
    const uint32_t scale[2] = {__byte_perm(scales, 0, 0x1010), __byte_perm(scales, 0, 0x3232)};
    DMOE_UNROLL
    for (int r = 0; r < 2; ++r) {
        if constexpr (BITS == 8) {
            const uint32_t words[2] = {r ? bytes.z : bytes.x, r ? bytes.w : bytes.y};
            DMOE_UNROLL
            for (int p = 0; p < 2; ++p) {
                a[p][r] = Half::from_bytes(words[p], 0x4140, scale[r]);
                a[p][2 + r] = Half::from_bytes(words[p], 0x4342, scale[r]);
            }
        } else {
            const uint32_t word = step ? (r ? bytes.w : bytes.z) : (r ? bytes.y : bytes.x);
            a[0][r] = Half::template from_nibbles<0>(word, scale[r]);
            a[0][2 + r] = Half::template from_nibbles<1>(word, scale[r]);
            a[1][r] = Half::template from_nibbles<2>(word, scale[r]);
            a[1][2 + r] = Half::template from_nibbles<3>(word, scale[r]);
        }
    }
}

}  // namespace dmoe
