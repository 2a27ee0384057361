// Last launch of DmoeHead: the tiles' best logits and sums of exponentials of one token, in the order of the tiles.
#pragma once

#include "head_best.cuh"

namespace dmoe {

constexpr int kFinishThreads = 128;

struct FinishArguments {
    const uint64_t *best;  // [grid, tiles]
    const float *sum;      // [grid, tiles]: exponentials of a tile's logits less its best one
    int tiles;
    int64_t *token_ids;  // [grid]
    float *confidence;   // [grid]
};

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(FinishArguments a) {
    DMOE_SHARED(uint64_t, keys, kFinishThreads / kWarp);
    DMOE_SHARED(float, sums, kFinishThreads / kWarp);
    wait_for_predecessor();
    let_successor_start();
    const int64_t token = blockIdx.x;
    const uint64_t *const best = a.best + token * a.tiles;
    const float *const sum = a.sum + token * a.tiles;
    uint64_t key = 0;
    for (int tile = static_cast<int>(threadIdx.x); tile < a.tiles; tile += kFinishThreads) key = max(key, best[tile]);
    for (int distance = kWarp / 2; distance > 0; distance /= 2) key = lane_max(key, distance);
    if (lane_id() == 0) keys[warp_id()] = key;
    __syncthreads();
    for (int warp = 0; warp < kFinishThreads / kWarp; ++warp) key = max(key, keys[warp]);
    const float top = logit_of(key);
    float total = 0.0f;
    for (int tile = static_cast<int>(threadIdx.x); tile < a.tiles; tile += kFinishThreads) {
        // A tile of nothing but the mask token has no best.
        if (const uint64_t own = best[tile]) total += sum[tile] * weight_below(logit_of(own), top);
    }
    total = warp_sum(total);
    if (lane_id() == 0) sums[warp_id()] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    total = 0.0f;
    for (int warp = 0; warp < kFinishThreads / kWarp; ++warp) total += sums[warp];
    a.token_ids[token] = token_of(key);
    // top − top is NaN where the best logit is infinite or NaN, as is every exponential of a difference to it.
    a.confidence[token] = 1.0f / (total + (top - top));
}

}  // namespace dmoe
