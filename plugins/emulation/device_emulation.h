// The emulated side of kernels/device.cuh: CUDA's names on top of emulator.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define DMOE_DEVICE inline
#define DMOE_UNROLL
#define DMOE_UNROLL_BY(count)
#define DMOE_SHARED(type, name, count) \
    type *const name = static_cast<type *>(::dmoe::emulation::shared_memory(sizeof(type) * (count)))

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (::dmoe::emulation::here.thread)
#define blockIdx (::dmoe::emulation::here.block)
#define blockDim (::dmoe::emulation::here.block_size)
#define gridDim (::dmoe::emulation::here.grid_size)

using dim3 = dmoe::emulation::Dim3;
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

// Fibers only change places inside the functions below, so a plain read and write is atomic.
inline unsigned atomicAdd(unsigned *address, unsigned value) {
    const unsigned old = *address;
    *address = old + value;
    return old;
}
inline void __syncthreads(int line = __builtin_LINE()) { dmoe::emulation::block_barrier("__syncthreads", line, false); }
inline int __syncthreads_or(int vote, int line = __builtin_LINE()) {
    return dmoe::emulation::block_barrier("__syncthreads_or", line, vote != 0).any;
}
inline int __syncthreads_count(int vote, int line = __builtin_LINE()) {
    return dmoe::emulation::block_barrier("__syncthreads_count", line, vote != 0).count;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    dmoe::emulation::warp_exchange("__syncwarp", line, mask, "", 1);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    const unsigned char mine = vote != 0;
    const auto *all = static_cast<const unsigned char *>(
        dmoe::emulation::warp_exchange("__ballot_sync", line, mask, &mine, 1));
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
    return bits;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
    return static_cast<const T *>(
        dmoe::emulation::warp_exchange("__shfl_sync", line, mask, &value, sizeof value))[source & 31];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
    return static_cast<const T *>(dmoe::emulation::warp_exchange("__shfl_xor_sync", line, mask, &value,
                                                                 sizeof value))[(threadIdx.x % 32) ^ distance];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int line = __builtin_LINE()) {
    const unsigned lane = threadIdx.x % 32;
    return static_cast<const T *>(dmoe::emulation::warp_exchange(
        "__shfl_up_sync", line, mask, &value, sizeof value))[lane < distance ? lane : lane - distance];
}

namespace dmoe {

namespace emulation {
float widen_fp16(uint16_t half);
uint16_t narrow_fp16(float value);
uint16_t narrow_bf16(float value);
inline float widen_bf16(uint16_t half) { return __uint_as_float(static_cast<uint32_t>(half) << 16); }
// `work` on the low and on the high halfs. Sums and products of halfs are rounded once to float here, which changes
// nothing for fp16 (float has more than twice its bits) and for the integers and the one product of from_bytes() and
// from_nibbles().
template <class Work>
uint32_t each_half(float (*widen)(uint16_t), uint16_t (*narrow)(float), uint32_t a, uint32_t b, uint32_t c, Work work) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto half = [shift](uint32_t word) { return static_cast<uint16_t>(word >> shift); };
        result |= static_cast<uint32_t>(narrow(work(widen(half(a)), widen(half(b)), widen(half(c))))) << shift;
    }
    return result;
}
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t), const char *what,
         int line);
}  // namespace emulation

DMOE_DEVICE uint32_t warp_max(uint32_t value, int line = __builtin_LINE()) {
    const auto *all = static_cast<const uint32_t *>(
        emulation::warp_exchange("warp_max", line, 0xffffffffu, &value, sizeof value));
    for (int lane = 0; lane < 32; ++lane) value = max(value, all[lane]);
    return value;
}
DMOE_DEVICE uint32_t warp_min(uint32_t value, int line = __builtin_LINE()) { return ~warp_max(~value, line); }

DMOE_DEVICE void fence_device() {}  // blocks run one after another: what one has written the next ones see

DMOE_DEVICE uint16_t narrow_fp16(float value) { return emulation::narrow_fp16(value); }
DMOE_DEVICE float fast_exp2(float value) {
    const float power = std::exp2(value);
    return power < 0x1p-126f ? 0.0f : power;
}
DMOE_DEVICE float widen_fp16(uint16_t half) { return emulation::widen_fp16(half); }
DMOE_DEVICE int kept(int number) { return number; }
DMOE_DEVICE uint32_t mask_or(uint32_t word, uint32_t mask, uint32_t more) { return (word & mask) | more; }
DMOE_DEVICE uint32_t sub_fp16x2(uint32_t a, uint32_t b) {
    return emulation::each_half(emulation::widen_fp16, emulation::narrow_fp16, a, b, 0u,
                                [](float x, float y, float) { return x - y; });
}
DMOE_DEVICE uint32_t mul_fp16x2(uint32_t a, uint32_t b) {
    return emulation::each_half(emulation::widen_fp16, emulation::narrow_fp16, a, b, 0u,
                                [](float x, float y, float) { return x * y; });
}
DMOE_DEVICE uint32_t fma_fp16x2(uint32_t a, uint32_t b, uint32_t c) {
    return emulation::each_half(emulation::widen_fp16, emulation::narrow_fp16, a, b, c,
                                [](float x, float y, float z) { return std::fma(x, y, z); });
}
DMOE_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    return emulation::each_half(emulation::widen_bf16, emulation::narrow_bf16, a, b, c,
                                [](float x, float y, float z) { return std::fma(x, y, z); });
}
DMOE_DEVICE void mma_fp16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                          int line = __builtin_LINE()) {
    emulation::mma(c, {a0, a1, a2, a3}, {b0, b1}, emulation::widen_fp16, "mma_fp16", line);
}
DMOE_DEVICE void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                          int line = __builtin_LINE()) {
    emulation::mma(c, {a0, a1, a2, a3}, {b0, b1}, emulation::widen_bf16, "mma_bf16", line);
}

}  // namespace dmoe

#include "device_emulation_bulk.h"
#include "device_emulation_copies.h"
#include "device_emulation_launch.h"
