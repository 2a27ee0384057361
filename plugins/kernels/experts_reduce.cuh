// Last launch of the experts: a token's weighted pairs added up in the order of its places, then the shared expert's
// output, four outputs per thread.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kReduceThreads = 256;
constexpr int kPlacesAtOnce = 8;

struct ReduceArguments {
    const float4 *pair_outputs;    // [tokens, places, quads]
    const float4 *shared_outputs;  // [tokens, quads], or null
    const int32_t *expert_ids;     // [tokens, places]
    int tokens, places, experts, quads;
    uint2 *mixed;  // [tokens, pitch], of which the first `quads` are written
    int pitch;
};

template <class Half>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(ReduceArguments a) {
    wait_for_predecessor();
    let_successor_start();
    const int index = static_cast<int>(blockIdx.x) * kReduceThreads + static_cast<int>(threadIdx.x);
    const int token = index / a.quads, quad = index % a.quads;
    if (token >= a.tokens) return;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const auto add = [&sum](const float4 &part) { sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w; };
    for (int start = 0; start < a.places; start += kPlacesAtOnce) {
        const int64_t pair = static_cast<int64_t>(token) * a.places + start;
        float4 parts[kPlacesAtOnce];
        bool there[kPlacesAtOnce];
        DMOE_UNROLL
        for (int i = 0; i < kPlacesAtOnce; ++i) {  // all loads before the first sum; nobody wrote what is not there
            const int id = start + i < a.places ? a.expert_ids[pair + i] : -1;
            there[i] = id >= 0 && id < a.experts;
            parts[i] = there[i] ? a.pair_outputs[(pair + i) * a.quads + quad] : sum;
        }
        DMOE_UNROLL
        for (int i = 0; i < kPlacesAtOnce; ++i) {
            if (there[i]) add(parts[i]);
        }
    }
    if (a.shared_outputs) add(a.shared_outputs[static_cast<int64_t>(token) * a.quads + quad]);
    a.mixed[static_cast<int64_t>(token) * a.pitch + quad] =
        make_uint2(Half::narrow(sum.x) | static_cast<unsigned>(Half::narrow(sum.y)) << 16,
                   Half::narrow(sum.z) | static_cast<unsigned>(Half::narrow(sum.w)) << 16);
}

}  // namespace dmoe
