// A small kernel that waits for bulk copies at a barrier, well or badly, so that tests can see the emulation notice.
#include <cstdint>
#include <cstring>

#include "../kernels/device.cuh"
#include "dmoe_emulation.h"

namespace dmoe {
namespace {

struct ArrivalsTest {
    const uint32_t *words;  // 1024
    float *out;             // 64
    int expected = 512;     // bytes, of 512
    int arriving = 128;     // threads, of 128
    unsigned parity = 0;    // of the first phase
    int bytes_off = 0;      // of the bulk copy's source
    bool fence = true, wait = true, drain = true;
};

// Twice: 512 bytes by a bulk copy, 16 bytes by each thread; out: 32 words of both that others have brought.
void arrivals_kernel(ArrivalsTest t) {
    DMOE_DYNAMIC_SHARED(uint32_t, shared);
    DMOE_SHARED(uint64_t, memory, 2);
    const Arrivals barrier = arrivals_at(memory)[1];
    const int thread = static_cast<int>(threadIdx.x), other = (thread + 40) % 128;
    if (thread == 0) {
        init_arrivals(barrier, 128);
        publish_arrivals();
    }
    __syncthreads();
    for (int phase = 0; phase < 2; ++phase) {
        if (warp_id() == phase && elected()) {
            if (t.fence) fence_bulk_copies();
            expect_bytes(barrier, t.expected);
            copy_bulk(shared, t.words + 128 * phase + t.bytes_off / 4, 512, barrier);
        }
        copy_async_16(shared + 128 + 4 * thread, t.words + 256 + 4 * thread, true);
        if (thread < t.arriving) arrive_with_copies(barrier);
        if (t.wait) wait_for_arrivals(barrier, phase ^ t.parity);
        if (thread < 16) {
            t.out[32 * phase + thread] = static_cast<float>(shared[other]);
            t.out[32 * phase + 16 + thread] = static_cast<float>(shared[128 + 4 * other]);
        }
        __syncthreads();
        if (!t.drain) break;
    }
}

}  // namespace
}  // namespace dmoe

extern "C" int dmoe_emulation_arrivals(const char *name, const uint32_t *words, float *out) {
    dmoe::ArrivalsTest test{words, out};
    const auto is = [name](const char *other) { return std::strcmp(name, other) == 0; };
    if (is("too_few_bytes_expected")) test.expected = 496;
    else if (is("too_many_bytes_expected")) test.expected = 528;
    else if (is("an_arrival_is_missing")) test.arriving = 127;
    else if (is("other_parity")) test.parity = 1;
    else if (is("not_waited")) test.wait = false;
    else if (is("no_fence")) test.fence = false;
    else if (is("misaligned")) test.bytes_off = 8;
    else if (is("ends_early")) test.wait = test.drain = false;
    else if (!is("right")) return DMOE_ERROR_SHAPE;
    return dmoe::launch<dmoe::arrivals_kernel>(dim3(1), 128, nullptr, test, {4096});
}
