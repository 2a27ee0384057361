// First launch of DmoeSelfAttention: a warp per head of a token splits, norms, rotates and scales it.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr int kPrepareThreads = 256;
constexpr int kPrepareWarps = kPrepareThreads / kWarp;

struct PrepareArguments {
    const uint16_t *qkv;                // [B·T, heads + 2 · kv_heads, dim]
    const float *cos, *sin;             // [B·T, half]
    const uint16_t *q_norm, *k_norm;    // [dim]; null = no norm
    uint16_t *q;                        // [B, kv_heads, T, share, dim]
    uint16_t *key, *value;              // [B, kv_heads, T, dim]
    unsigned *counters;                 // of the second launch, to be zeroed; at most as many as threads
    int counter_count;
    int tokens, heads, kv_heads, dim, half, count;  // count: heads of all tokens
    float eps, scale;
};

template <class Half>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(PrepareArguments a) {
    wait_for_predecessor();
    let_successor_start();
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x;
    if (thread < a.counter_count) a.counters[thread] = 0;
    const int index = static_cast<int>(blockIdx.x) * kPrepareWarps + warp_id(), lane = lane_id();
    if (index >= a.count) return;
    const int of_token = a.heads + 2 * a.kv_heads, n = index / of_token, head = index % of_token;
    const int64_t row = n / a.tokens;
    const int token = n % a.tokens, share = a.heads / a.kv_heads;
    const uint16_t *const from = a.qkv + static_cast<int64_t>(index) * a.dim;
    const auto place_of = [&](int kv_head) { return ((row * a.kv_heads + kv_head) * a.tokens + token) * a.dim; };
    if (head >= a.heads + a.kv_heads) {
        uint16_t *const to = a.value + place_of(head - a.heads - a.kv_heads);
        for (int d = lane; d < a.dim; d += kWarp) to[d] = from[d];
        return;
    }
    const bool query = head < a.heads;
    uint16_t *const to = query ? a.q + place_of(head / share) * share + head % share * a.dim
                               : a.key + place_of(head - a.heads);
    const uint16_t *const norm = query ? a.q_norm : a.k_norm;
    float factor = 1.0f;
    if (norm) {
        float squares = 0.0f;
        for (int d = lane; d < a.dim; d += kWarp) squares += Half::widen(from[d]) * Half::widen(from[d]);
        factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(a.dim) + a.eps);
    }
    const auto normed = [&](int d) {
        const float x = Half::widen(from[d]);
        return norm ? x * factor * Half::widen(norm[d]) : x;
    };
    const float *const cos = a.cos + static_cast<int64_t>(n) * a.half, *const sin = a.sin + static_cast<int64_t>(n) * a.half;
    const float scale = query ? a.scale : 1.0f;
    for (int d = lane; d < a.dim; d += kWarp) {
        float x = normed(d);
        if (d < a.half) {
            x = x * cos[d] - normed(d + a.half) * sin[d];
        } else if (d < 2 * a.half) {
            x = x * cos[d - a.half] + normed(d - a.half) * sin[d - a.half];
        }
        to[d] = Half::narrow(x * scale);
    }
}

}  // namespace dmoe
