// Small kernels that use the emulated block well or badly, so that tests can see it notice.
#include <cstdint>
#include <cstring>

#include "../kernels/device.cuh"
#include "dmoe_emulation.h"

namespace dmoe {
namespace {

// Sum of the thread indices of the block, passed through shared memory.
void block_sum(float *out) {
    DMOE_SHARED(float, parts, 4);
    const float sum = warp_sum(static_cast<float>(threadIdx.x));
    if (lane_id() == 0) parts[warp_id()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) out[0] = parts[0] + parts[1] + parts[2] + parts[3];
}

void block_sum_without_barrier(float *out) {
    DMOE_SHARED(float, parts, 4);
    const float sum = warp_sum(static_cast<float>(threadIdx.x));
    if (lane_id() == 0) parts[warp_id()] = sum;
    if (threadIdx.x == 0) out[0] = parts[0] + parts[1] + parts[2] + parts[3];
}

void neighbour_without_warp_barrier(float *out) {
    DMOE_SHARED(float, values, 128);
    values[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (threadIdx.x == 0) out[0] = values[1] + values[31];
}

void barrier_in_a_branch(float *) {
    if (threadIdx.x != 7) __syncthreads();
}

void barriers_of_two_branches(float *) {
    if (warp_id() == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

void shuffle_in_a_branch(float *out) {
    float value = 1.0f;
    if (lane_id() < 16) value = __shfl_xor_sync(kWholeWarp, value, 1);
    out[0] = value;
}

void different_warp_operations(float *out) {
    if (lane_id() < 16) {
        out[0] = __shfl_sync(kWholeWarp, 1.0f, 0);
    } else {
        out[1] = static_cast<float>(__ballot_sync(kWholeWarp, 1));
    }
}

void partial_mask(float *out) {
    if (lane_id() < 16) out[0] = __shfl_sync(0xffffu, 1.0f, 0);
}

void too_much_shared_memory(float *out) {
    DMOE_SHARED(float, half, 8192);
    DMOE_SHARED(float, other_half, 8192);
    out[0] = half[0] + other_half[0];
}

void poison(float *out) {
    DMOE_SHARED(uint32_t, words, 128);
    out[0] = static_cast<float>(words[threadIdx.x] >> 24);
}

// The same operation, but from two lines: on a GPU this can hang.
void shuffles_of_two_branches(float *out) {
    if (lane_id() < 16) {
        out[0] = __shfl_sync(kWholeWarp, 1.0f, 0);
    } else {
        out[1] = __shfl_sync(kWholeWarp, 1.0f, 0);
    }
}

void votes(float *out) {
    const int any = __syncthreads_or(threadIdx.x == 77), none = __syncthreads_or(0);
    const int count = __syncthreads_count(threadIdx.x % 3 == 0);
    const unsigned odd = __ballot_sync(kWholeWarp, threadIdx.x % 2);
    const int below = __shfl_up_sync(kWholeWarp, static_cast<int>(threadIdx.x), 1);
    const uint32_t most = warp_max(threadIdx.x ^ 21u), least = warp_min(threadIdx.x + 5u);
    if (threadIdx.x == 33) {
        const float results[] = {float(any != 0), float(none), float(count), float(odd == 0xaaaaaaaau),
                                 float(below),    float(most), float(least)};
        std::memcpy(out, results, sizeof results);
    }
}

// Five blocks write a number each; the last one adds them up. out: sum, how many were last, numbers, then the counter.
void arrival(float *out) {
    if (threadIdx.x == 127) out[2 + blockIdx.x] = static_cast<float>(1u << blockIdx.x);
    if (!arrives_last(reinterpret_cast<unsigned *>(out + 7), gridDim.x)) return;
    if (threadIdx.x != 0) return;
    out[0] = out[2] + out[3] + out[4] + out[5] + out[6];
    out[1] += 1.0f;
}

struct Test {
    const char *name;
    void (*kernel)(float *);
};

constexpr Test kTests[] = {
    {"block_sum", block_sum},
    {"block_sum_without_barrier", block_sum_without_barrier},
    {"neighbour_without_warp_barrier", neighbour_without_warp_barrier},
    {"barrier_in_a_branch", barrier_in_a_branch},
    {"barriers_of_two_branches", barriers_of_two_branches},
    {"shuffle_in_a_branch", shuffle_in_a_branch},
    {"different_warp_operations", different_warp_operations},
    {"partial_mask", partial_mask},
    {"too_much_shared_memory", too_much_shared_memory},
    {"poison", poison},
    {"votes", votes},
    {"shuffles_of_two_branches", shuffles_of_two_branches},
};

}  // namespace
}  // namespace dmoe

extern "C" int dmoe_emulation_selftest(const char *name, float *out) {
    if (std::strcmp(name, "arrival") == 0) return dmoe::launch(dmoe::arrival, dim3(5), 128, nullptr, out);
    for (const auto &test : dmoe::kTests) {
        if (std::strcmp(test.name, name) == 0) return dmoe::launch(test.kernel, dim3(1), 128, nullptr, out);
    }
    return DMOE_ERROR_SHAPE;
}

// One product per type: a [16, 16] row-major, b [16, 8] by columns ([8, 16]), c [16, 8]; b and a as raw halfs.
namespace dmoe {
namespace {

struct MmaArguments {
    const uint16_t *a, *b;
    float *c;
    int type;
};

void mma_once(MmaArguments m) {
    const int g = lane_id() / 4, q = lane_id() % 4;
    const auto pair = [](const uint16_t *from, int row, int k) {
        return static_cast<uint32_t>(from[row * 16 + k]) | static_cast<uint32_t>(from[row * 16 + k + 1]) << 16;
    };
    float c[4] = {m.c[g * 8 + 2 * q], m.c[g * 8 + 2 * q + 1], m.c[(g + 8) * 8 + 2 * q], m.c[(g + 8) * 8 + 2 * q + 1]};
    const uint32_t a[] = {pair(m.a, g, 2 * q), pair(m.a, g + 8, 2 * q), pair(m.a, g, 2 * q + 8),
                          pair(m.a, g + 8, 2 * q + 8)};
    const uint32_t b[] = {pair(m.b, g, 2 * q), pair(m.b, g, 2 * q + 8)};
    if (m.type == DMOE_TYPE_FP16) {
        Fp16::mma(c, a[0], a[1], a[2], a[3], b[0], b[1]);
    } else {
        Bf16::mma(c, a[0], a[1], a[2], a[3], b[0], b[1]);
    }
    m.c[g * 8 + 2 * q] = c[0], m.c[g * 8 + 2 * q + 1] = c[1];
    m.c[(g + 8) * 8 + 2 * q] = c[2], m.c[(g + 8) * 8 + 2 * q + 1] = c[3];
}

}  // namespace
}  // namespace dmoe

extern "C" int dmoe_emulation_mma(const uint16_t *a, const uint16_t *b, float *c, int32_t type) {
    return dmoe::launch(dmoe::mma_once, dim3(1), 32, nullptr, dmoe::MmaArguments{a, b, c, type});
}

extern "C" void dmoe_emulation_narrow(const float *values, uint16_t *halfs, int64_t count, int32_t type) {
    for (int64_t i = 0; i < count; ++i) {
        halfs[i] = type == DMOE_TYPE_FP16 ? dmoe::Fp16::narrow(values[i]) : dmoe::Bf16::narrow(values[i]);
    }
}
