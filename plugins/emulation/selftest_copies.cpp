// Small kernels that copy asynchronously and load fragments, well or badly, so that tests can see the emulation notice.
#include <cstdint>
#include <cstring>

#include "../kernels/device.cuh"
#include "dmoe_emulation.h"

namespace dmoe {
namespace {

struct CopyTest {
    const uint32_t *words;  // 1024
    float *out;             // 64
    int groups;             // that a thread may leave under way when it reads
    bool barrier;
    bool drain;
};

// Two groups of one and two copies per thread; out: a word of a neighbour's first group, and own zeros.
void copy_kernel(CopyTest t) {
    DMOE_DYNAMIC_SHARED(uint32_t, shared);
    const int thread = static_cast<int>(threadIdx.x), other = (thread + 40) % 128;
    copy_async_16(shared + 4 * thread, t.words + 4 * thread, true);
    commit_copies();
    copy_async_16(shared + 512 + 4 * thread, t.words + 512 + 4 * thread, thread % 2 == 0);
    copy_async_16(shared + 15000 + 4 * thread, t.words + 4 * thread, true);
    commit_copies();
    if (t.groups == 1) {
        wait_for_copies<1>();
    } else if (t.groups == 0) {
        wait_for_copies<0>();
    }
    if (t.barrier) __syncthreads();
    if (thread < 20) t.out[thread] = static_cast<float>(shared[4 * other]);
    if (thread >= 20 && thread < 40) t.out[thread] = static_cast<float>(shared[512 + 4 * thread]);
    if (thread >= 40 && thread < 60) t.out[thread] = static_cast<float>(shared[15000 + 4 * thread]);
    if (t.drain) wait_for_copies<0>();
}

// Four matrices of 64 halfs; out: the low and the high half of word m of lane 5, plain, then transposed.
void matrices_kernel(CopyTest t) {
    DMOE_DYNAMIC_SHARED(uint32_t, shared);
    shared[threadIdx.x] = t.words[threadIdx.x];
    __syncthreads();
    const void *const row = shared + 4 * lane_id();
    uint32_t plain[4], transposed[4];
    load_matrices(plain, row);
    load_matrices_transposed(transposed, row);
    if (threadIdx.x != 5) return;
    for (int m = 0; m < 4; ++m) {
        t.out[2 * m] = static_cast<float>(plain[m] & 0xffffu), t.out[2 * m + 1] = static_cast<float>(plain[m] >> 16);
        t.out[8 + 2 * m] = static_cast<float>(transposed[m] & 0xffffu);
        t.out[9 + 2 * m] = static_cast<float>(transposed[m] >> 16);
    }
}

}  // namespace
}  // namespace dmoe

extern "C" int dmoe_emulation_copies(const char *name, const uint32_t *words, float *out) {
    const auto run = [&](int groups, bool barrier, bool drain) {
        return dmoe::launch<dmoe::copy_kernel>(dim3(1), 128, nullptr,
                                               dmoe::CopyTest{words, out, groups, barrier, drain}, {65536, true});
    };
    if (std::strcmp(name, "waited") == 0) return run(0, true, true);
    if (std::strcmp(name, "first_group") == 0) return run(1, true, true);
    if (std::strcmp(name, "not_waited") == 0) return run(2, true, true);
    if (std::strcmp(name, "no_barrier") == 0) return run(0, false, true);
    if (std::strcmp(name, "not_drained") == 0) return run(1, true, false);
    const dmoe::CopyTest test{words, out, 0, true, true};
    if (std::strcmp(name, "matrices") == 0) return dmoe::launch<dmoe::matrices_kernel>(dim3(1), 128, nullptr, test, {512});
    if (std::strcmp(name, "no_dynamic") == 0) return dmoe::launch<dmoe::matrices_kernel>(dim3(1), 128, nullptr, test, {});
    if (std::strcmp(name, "too_much") == 0) return dmoe::launch<dmoe::matrices_kernel>(dim3(1), 128, nullptr, test, {1 << 18});
    return DMOE_ERROR_SHAPE;
}
