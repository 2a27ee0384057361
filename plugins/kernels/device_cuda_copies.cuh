// The CUDA side of device.cuh: copies into shared memory, fragments out of it, and kernels that overlap.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// The dynamic shared memory of a launch, 128-byte aligned; once per kernel.
#define DMOE_DYNAMIC_SHARED(type, name)                                \
    extern __shared__ __align__(128) unsigned char dmoe_dynamic_shared[]; \
    type *const name = reinterpret_cast<type *>(dmoe_dynamic_shared)

namespace dmoe {

DMOE_DEVICE uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit words: lane l says where row l % 8 of matrix l / 8 is, 16 bytes of shared memory, 16-byte
// aligned, written before the last barrier. words[m]: of matrix m, with g = lane / 4 and q = lane % 4, columns 2q and 2q + 1 of row g.
DMOE_DEVICE void load_matrices(uint32_t (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row)));
}
// The same, transposed: rows 2q and 2q + 1 of column g.
DMOE_DEVICE void load_matrices_transposed(uint32_t (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row)));
}

// Asynchronous copies of 16 bytes from device to shared memory, both sides aligned to as much; zeros, and no read, when not
// wanted; nothing at all where not `there`. commit_copies() makes a group of what the thread has asked for since the last
// one; wait_for_copies<N>() returns when all of the thread's groups but its last N have arrived. Other threads see them
// after a barrier. Below compute capability 8.0 a copy goes through registers and has arrived when it returns.
DMOE_DEVICE void copy_async_16(void *shared, const void *from, bool wanted, bool there = true) {
#if __CUDA_ARCH__ >= 800  // a predicate, where the compiler would branch
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %3, 0;\n\t"
                 "@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n\t}" ::"r"(shared_address(shared)),
                 "l"(from), "r"(wanted ? 16 : 0), "r"(static_cast<int>(there))
                 : "memory");
#else
    if (there) *static_cast<uint4 *>(shared) = wanted ? *static_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
#endif
}
DMOE_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
DMOE_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Programmatic dependent launch. A kernel launched with LaunchOptions::overlap may start while the one before it runs:
//   wait_for_predecessor()  everything launched before this kernel has completed, its writes are visible. Every thread
//                           that reads (or overwrites) what earlier launches use calls it first.
//   let_successor_start()   the next kernel may start, if it overlaps. Call it only after wait_for_predecessor(): then
//                           a successor knows, even before it waits, that all launches but the last are complete.
// Below compute capability 9.0 both do nothing, and launches do not overlap.
DMOE_DEVICE void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DMOE_DEVICE void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace dmoe
