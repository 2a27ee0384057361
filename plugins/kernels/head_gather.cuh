// First launch of DmoeHead: the wanted tokens' hidden rows through the last RMSNorm, a thread block per token.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kGatherThreads = 256;

struct GatherArguments {
    const uint4 *hidden;        // [rows · tokens, units], eight halfs a unit
    const uint4 *norm;          // [units]
    const int64_t *logit_rows;  // [rows, wanted]
    int first;                  // the first place of logit_rows that this launch takes
    int wanted, tokens, units;
    float eps;
    uint4 *normed;  // [grid, units]
};

template <class Half>
DMOE_DEVICE void widen(float (&values)[8], const uint4 &unit) {
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
    DMOE_UNROLL
    for (int i = 0; i < 8; ++i) values[i] = Half::widen(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
}

template <class Half>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(GatherArguments a) {
    DMOE_SHARED(float, sums, kGatherThreads / kWarp);
    wait_for_predecessor();
    let_successor_start();
    const int64_t place = a.first + static_cast<int64_t>(blockIdx.x);
    const int64_t row = place / a.wanted;
    const int64_t token = min(max(a.logit_rows[place], static_cast<int64_t>(0)), static_cast<int64_t>(a.tokens) - 1);
    const uint4 *const from = a.hidden + (row * a.tokens + token) * a.units;
    const int thread = static_cast<int>(threadIdx.x);
    float sum = 0.0f, x[8];
    for (int unit = thread; unit < a.units; unit += kGatherThreads) {
        widen<Half>(x, from[unit]);
        DMOE_UNROLL
        for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) sums[warp_id()] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < kGatherThreads / kWarp; ++warp) total += sums[warp];
    const float scale = 1.0f / sqrtf(total / static_cast<float>(a.units * 8) + a.eps);
    uint4 *const to = a.normed + static_cast<int64_t>(blockIdx.x) * a.units;
    for (int unit = thread; unit < a.units; unit += kGatherThreads) {
        float weight[8];
        widen<Half>(x, from[unit]);
        widen<Half>(weight, a.norm[unit]);
        uint32_t words[4];
        DMOE_UNROLL
        for (int i = 0; i < 4; ++i) {
            words[i] = Half::narrow(x[2 * i] * scale * weight[2 * i]) |
                       static_cast<uint32_t>(Half::narrow(x[2 * i + 1] * scale * weight[2 * i + 1])) << 16;
        }
        to[unit] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

}  // namespace dmoe
