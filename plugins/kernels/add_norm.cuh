// DmoeAddNorm: a thread block per token, 16 bytes per thread at a time.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kAddNormThreads = 1024;  // at most

struct AddNormArguments {
    const uint4 *x, *delta, *weight;
    uint4 *total, *normed;
    int units;  // of eight values in a token
    float hidden, eps;
};

template <class Half>
DMOE_DEVICE uint32_t narrow_pair(float low, float high) {
    return static_cast<uint32_t>(Half::narrow(low)) | static_cast<uint32_t>(Half::narrow(high)) << 16;
}

template <class Half>
__global__ void __launch_bounds__(kAddNormThreads) add_norm_kernel(AddNormArguments a) {
    DMOE_SHARED(float, warp_sums, kAddNormThreads / kWarp);
    const int64_t start = static_cast<int64_t>(blockIdx.x) * a.units;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    uint4 weight{0, 0, 0, 0};
    if (thread < a.units) weight = a.weight[thread];  // a constant: before the wait
    wait_for_predecessor();
    let_successor_start();
    uint4 held{0, 0, 0, 0};  // the thread's first total; it reads the others again
    float squares = 0.0f;
    for (int unit = thread; unit < a.units; unit += threads) {
        const uint4 x = a.x[start + unit], delta = a.delta[start + unit];
        uint32_t words[4];
        DMOE_UNROLL
        for (int i = 0; i < 8; i += 2) {
            words[i / 2] = narrow_pair<Half>(widen_at<Half>(x, i) + widen_at<Half>(delta, i),
                                             widen_at<Half>(x, i + 1) + widen_at<Half>(delta, i + 1));
        }
        const uint4 sum{words[0], words[1], words[2], words[3]};
        DMOE_UNROLL
        for (int i = 0; i < 8; ++i) squares = fmaf(widen_at<Half>(sum, i), widen_at<Half>(sum, i), squares);
        a.total[start + unit] = sum;
        if (unit == thread) held = sum;
    }
    squares = warp_sum(squares);
    if (lane_id() == 0) warp_sums[warp_id()] = squares;
    __syncthreads();
    squares = 0.0f;
    for (int w = 0; w < threads / kWarp; ++w) squares += warp_sums[w];
    const float factor = 1.0f / sqrtf(squares / a.hidden + a.eps);
    for (int unit = thread; unit < a.units; unit += threads) {
        const uint4 sum = unit == thread ? held : a.total[start + unit];
        if (unit != thread) weight = a.weight[unit];
        uint32_t words[4];
        DMOE_UNROLL
        for (int i = 0; i < 8; i += 2) {
            words[i / 2] = narrow_pair<Half>(widen_at<Half>(sum, i) * factor * widen_at<Half>(weight, i),
                                             widen_at<Half>(sum, i + 1) * factor * widen_at<Half>(weight, i + 1));
        }
        a.normed[start + unit] = uint4{words[0], words[1], words[2], words[3]};
    }
}

}  // namespace dmoe
