// What the kernels need from a machine, under the same names on CUDA and on the emulated thread block.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include "device_cuda.cuh"
#else
#include "../emulation/device_emulation.h"
#endif

namespace dmoe {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

DMOE_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
DMOE_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

DMOE_DEVICE float warp_sum(float value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kWholeWarp, value, distance);
    }
    return value;
}

DMOE_DEVICE float warp_max(float value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, distance));
    }
    return value;
}

// Element types as raw 16-bit words: how a float is rounded (to nearest, ties to even) and which mma multiplies them.
//
// mma: c += a · b on the fragments of mma.m16n8k16; a = weights, row-major, b = tokens, column-major, c float32. With
// g = lane / 4 and q = lane % 4: a0 = (g, 2q..2q+1), a1 = (g+8, same), a2 = (g, 2q+8..2q+9), a3 = (g+8, same);
// b0 = (2q..2q+1, g), b1 = (2q+8..2q+9, g); c = (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1).
struct Fp16 {
    static DMOE_DEVICE uint16_t narrow(float value) { return narrow_fp16(value); }
    static DMOE_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
        mma_fp16(c, a0, a1, a2, a3, b0, b1);
    }
};

struct Bf16 {
    static DMOE_DEVICE uint16_t narrow(float value) {
        const uint32_t bits = __float_as_uint(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays NaN
        return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    static DMOE_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
        mma_bf16(c, a0, a1, a2, a3, b0, b1);
    }
};

}  // namespace dmoe
