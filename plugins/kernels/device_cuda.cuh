// The CUDA side of device.cuh: arithmetic and tensor-core products; device_cuda_copies.cuh and device_cuda_launch.cuh have the rest.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define DMOE_DEVICE __device__ __forceinline__
#define DMOE_UNROLL _Pragma("unroll")
#define DMOE_PRAGMA(text) _Pragma(#text)
#define DMOE_UNROLL_BY(count) DMOE_PRAGMA(unroll count)
#define DMOE_SHARED(type, name, count) __shared__ type name[count]

namespace dmoe {

DMOE_DEVICE uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, value);
#else
    for (int distance = 16; distance > 0; distance /= 2) {
        value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
#endif
}

DMOE_DEVICE uint32_t warp_min(uint32_t value) { return ~warp_max(~value); }

// Orders what the thread has done and seen before what follows, for the whole device. Lighter than __threadfence(), which
// is sequentially consistent; handing data on through an atomic counter needs no more.
DMOE_DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

DMOE_DEVICE uint16_t narrow_fp16(float value) {
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

// 2^value to two units in the last place; values below 2^−126 are 0.
DMOE_DEVICE float fast_exp2(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}

DMOE_DEVICE float widen_fp16(uint16_t half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

// The number, kept where it is made: the compiler would rather make it anew in every round of a loop.
DMOE_DEVICE int kept(int number) {
    int same;
    asm volatile("mov.b32 %0, %1;" : "=r"(same) : "r"(number));
    return same;
}

// (word & mask) | more as one instruction: the compiler makes two of two constants.
DMOE_DEVICE uint32_t mask_or(uint32_t word, uint32_t mask, uint32_t more) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "r"(mask), "r"(more));
    return d;
}

DMOE_DEVICE uint32_t sub_fp16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DMOE_DEVICE uint32_t mul_fp16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DMOE_DEVICE uint32_t fma_fp16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DMOE_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif  // below, mma_bf16 traps
    return d;
}

DMOE_DEVICE void mma_fp16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // Turing has half the depth: the first eight k, then the other eight
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a2), "r"(a3), "r"(b1));
#endif
}

DMOE_DEVICE void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // the host refuses bf16 here (bf16_runs_here), so this is never reached
    __trap();
#endif
}

}  // namespace dmoe

#include "device_cuda_bulk.cuh"
#include "device_cuda_copies.cuh"
#include "device_cuda_launch.cuh"
