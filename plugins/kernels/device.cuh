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

// Whether this thread block is the last of `expected` to arrive at a counter that starts at 0; the whole block asks. What
// a block has written to global memory before it arrives, the last one reads afterwards, with plain loads (not __ldg).
// Nobody waits. An earlier kernel of the op zeroes the counter.
DMOE_DEVICE bool arrives_last(unsigned *counter, unsigned expected) {
    __syncthreads();  // the block's writes happen before the first thread's fence, which hands on what it has seen
    bool last = false;
    if (threadIdx.x == 0) {
        fence_device();
        last = atomicAdd(counter, 1u) + 1 == expected;
        fence_device();
    }
    return __syncthreads_or(last) != 0;
}

// Element types as raw 16-bit words: how a float is rounded (to nearest, ties to even) and got back, how small integers
// become such words, and which mma multiplies them.
//
// from_bytes, from_nibbles: two unsigned integers u of 8 or 4 bits, less the middle of their range, times `scale` (given
// twice), rounded once. Below the upper bits of 2^m, u is the float 2^m + u; the subtraction of 2^m and the middle is exact.
// from_bytes takes bytes i and i + 1 of `word` (`spread`: 0x4140 or 0x4342, what puts them into the low bytes of two
// halfs), from_nibbles<N> the Nth four bits of both halfs.
//
// mma: c += a · b on the fragments of mma.m16n8k16; a = weights, row-major, b = tokens, column-major, c float32. With
// g = lane / 4 and q = lane % 4: a0 = (g, 2q..2q+1), a1 = (g+8, same), a2 = (g, 2q+8..2q+9), a3 = (g+8, same);
// b0 = (2q..2q+1, g), b1 = (2q+8..2q+9, g); c = (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1).
struct Fp16 {
    static DMOE_DEVICE uint16_t narrow(float value) { return narrow_fp16(value); }
    static DMOE_DEVICE float widen(uint16_t half) { return widen_fp16(half); }
    static DMOE_DEVICE uint32_t from_bytes(uint32_t word, uint32_t spread, uint32_t scale) {
        return mul_fp16x2(sub_fp16x2(__byte_perm(word, 0x64646464u, spread), 0x64806480u), scale);  // 1024 + u
    }
    template <int N>
    static DMOE_DEVICE uint32_t from_nibbles(uint32_t word, uint32_t scale) {
        const uint32_t moved = word >> N / 2 * 8;
        if constexpr (N % 2 == 0) {
            return mul_fp16x2(sub_fp16x2(mask_or(moved, 0x000f000fu, 0x64006400u), 0x64086408u), scale);  // 1024 + u
        } else {  // 1024 + 16 u; a sixteenth, less 72
            return mul_fp16x2(fma_fp16x2(mask_or(moved, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u), scale);
        }
    }
    static DMOE_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
        mma_fp16(c, a0, a1, a2, a3, b0, b1);
    }
};

struct Bf16 {
    static constexpr uint32_t kMinusZero = 0x80008000u;  // twice: what a product's sum starts from

    static DMOE_DEVICE uint16_t narrow(float value) {
        const uint32_t bits = __float_as_uint(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays NaN
        return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    static DMOE_DEVICE float widen(uint16_t half) { return __uint_as_float(static_cast<uint32_t>(half) << 16); }
    static DMOE_DEVICE uint32_t from_bytes(uint32_t word, uint32_t spread, uint32_t scale) {
        // Seven bits of fraction: 128 + u mod 128, less 128 where u has bit 7, else 256.
        const uint32_t raised = __byte_perm(word, 0x43434343u, spread);
        const uint32_t integer = fma_bf16x2((raised ^ 0x00800080u) & 0xff80ff80u, 0xbf80bf80u, raised & 0xff7fff7fu);
        return fma_bf16x2(integer, scale, kMinusZero);
    }
    template <int N>
    static DMOE_DEVICE uint32_t from_nibbles(uint32_t word, uint32_t scale) {
        const uint32_t raised = mask_or(word >> 4 * N, 0x000f000fu, 0x43004300u);  // 128 + u
        return fma_bf16x2(fma_bf16x2(raised, 0x3f803f80u, 0xc308c308u), scale, kMinusZero);
    }
    static DMOE_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
        mma_bf16(c, a0, a1, a2, a3, b0, b1);
    }
};

// Value i of eight in 16 bytes, and of four; i is known at compile time.
template <class Half>
DMOE_DEVICE float widen_at(const uint4 &eight, int i) {
    const uint32_t word = i < 2 ? eight.x : i < 4 ? eight.y : i < 6 ? eight.z : eight.w;
    return Half::widen(static_cast<uint16_t>(word >> 16 * (i % 2)));
}
DMOE_DEVICE float float_at(const float4 &four, int i) {
    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

}  // namespace dmoe
