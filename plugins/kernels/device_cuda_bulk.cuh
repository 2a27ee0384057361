// The CUDA side of device.cuh: bulk copies into shared memory, and barriers that count what has arrived there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device_cuda_copies.cuh"

namespace dmoe {

// Whether the code has bulk copies; known at compile time. The rest of this file is for code that asks first.
__device__ constexpr bool has_bulk_copies() {
#if __CUDA_ARCH__ >= 900
    return true;
#else
    return false;
#endif
}

// True in one thread of the warp, all of whose threads ask. The compiler knows it to be one, as a comparison of its index is not.
DMOE_DEVICE bool elected() {
    uint32_t one = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(one));
#endif
    return one != 0;
}

// Barriers in shared memory, side by side: where the first is. A barrier's phases come one after another; a phase ends when
// as many threads have arrived as it was made for, and the bytes that bulk copies were expected to bring are there.
struct Arrivals {
    uint32_t address;
    DMOE_DEVICE Arrivals operator[](int index) const { return {address + static_cast<uint32_t>(index) * 8}; }
};
DMOE_DEVICE Arrivals arrivals_at(uint64_t *shared) { return {static_cast<uint32_t>(kept(static_cast<int>(shared_address(shared))))}; }

// By one thread; others see the barrier after publish_arrivals() and a barrier of the block.
DMOE_DEVICE void init_arrivals(Arrivals barrier, int threads) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier.address), "r"(threads) : "memory");
}
DMOE_DEVICE void publish_arrivals() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Between what others have read and written in shared memory, seen after a barrier of the block, and the bulk copies that
// this thread asks for next.
DMOE_DEVICE void fence_bulk_copies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The barrier's phase does not end before so many bytes more have come.
DMOE_DEVICE void expect_bytes(Arrivals barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier.address), "r"(bytes) : "memory");
#endif
}
// Asked for by one thread. Addresses and bytes are multiples of 16; `from` may be mapped host memory.
DMOE_DEVICE void copy_bulk(void *shared, const void *from, int bytes, Arrivals barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(from), "r"(bytes), "r"(barrier.address)
                 : "memory");
#endif
}

// The thread arrives as soon as all asynchronous copies that it has asked for so far (not bulk ones) are there.
DMOE_DEVICE void arrive_with_copies(Arrivals barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier.address) : "memory");
#endif
}
// Until the phase of this parity has ended: 0 for the first, 1 for the second, 0 again. Then its copies are visible.
DMOE_DEVICE void wait_for_arrivals(Arrivals barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .pred there;\nWAIT:\n\tmbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
        "\t@there bra DONE;\n\tbra WAIT;\nDONE:\n\t}" ::"r"(barrier.address),
        "r"(parity)
        : "memory");
#endif
}

}  // namespace dmoe
