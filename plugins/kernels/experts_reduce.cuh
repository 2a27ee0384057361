// Last launch of DmoeExperts: a token's weighted pairs added up in the order of its places, four outputs per thread.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kReduceThreads = 256;

struct ReduceArguments {
    const float4 *pair_outputs;  // [tokens, places, quads]
    const int32_t *expert_ids;   // [tokens, places]
    int tokens, places, experts, quads;
    uint2 *mixed;  // [tokens, quads]
};

template <class Half>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(ReduceArguments a) {
    const int index = static_cast<int>(blockIdx.x) * kReduceThreads + static_cast<int>(threadIdx.x);
    const int token = index / a.quads, quad = index % a.quads;
    if (token >= a.tokens) return;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int place = 0; place < a.places; ++place) {
        const int64_t pair = static_cast<int64_t>(token) * a.places + place;
        const int id = a.expert_ids[pair];
        if (id < 0 || id >= a.experts) continue;  // nobody wrote that pair
        const float4 part = a.pair_outputs[pair * a.quads + quad];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    a.mixed[static_cast<int64_t>(token) * a.quads + quad] =
        make_uint2(Half::narrow(sum.x) | static_cast<unsigned>(Half::narrow(sum.y)) << 16,
                   Half::narrow(sum.z) | static_cast<unsigned>(Half::narrow(sum.w)) << 16);
}

}  // namespace dmoe
