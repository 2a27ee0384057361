// Second launch of DmoeSelfAttention: softmax(q · keysᵀ) · values of a tile of query rows over all keys or a chunk of them.
//
// The rows of a key head are its query heads' tokens, row = token · share + head. A step takes 128 keys: each of eight
// warps scores sixteen of them for all rows, weights go through shared memory as halfs, and each warp mixes sixteen columns
// of the values. Keys and values go from memory into registers, once per thread block: operand B of the scores takes 16
// bytes of a key per lane (k permuted in A and B alike, as in experts_product.cuh), operand B of the mixture two columns
// of eight keys. A chunk is always added up by itself and chunks are folded in order, so that a row's bits are the same
// whether one thread block has all chunks or each has one, and in tiles of any size.
#pragma once

#include "attention_fold.cuh"
#include "attention_keys.cuh"
#include "device.cuh"

namespace dmoe {

template <class Half, int SEGMENTS, int TILES>
DMOE_DEVICE void score(float (&scores)[TILES][2][4], const uint4 (&keys)[2][SEGMENTS], const uint4 *queries, int dim) {
    constexpr int kPitch = SEGMENTS * 4 + 4;
    const uint4 *const mine = queries + lane_id() / 4 * kPitch + lane_id() % 4;
    DMOE_UNROLL
    for (int i = 0; i < SEGMENTS; ++i) {
        if (i * 32 >= dim) continue;
        DMOE_UNROLL
        for (int m = 0; m < TILES; ++m) {
            const uint4 e = mine[m * 16 * kPitch + i * 4], o = mine[(m * 16 + 8) * kPitch + i * 4];
            DMOE_UNROLL
            for (int n = 0; n < 2; ++n) {
                Half::mma(scores[m][n], e.x, o.x, e.y, o.y, keys[n][i].x, keys[n][i].y);
                Half::mma(scores[m][n], e.z, o.z, e.w, o.w, keys[n][i].z, keys[n][i].w);
            }
        }
    }
}

// sums += weights · values over 32 keys; `weights`: the lane's 16 bytes of row g.
template <class Half, int TILES>
DMOE_DEVICE void mix(float (&sums)[TILES][2][4], const uint32_t (&values)[8], const uint4 *weights, int pitch) {
    DMOE_UNROLL
    for (int m = 0; m < TILES; ++m) {
        const uint4 e = weights[m * 16 * pitch], o = weights[(m * 16 + 8) * pitch];
        DMOE_UNROLL
        for (int j = 0; j < 2; ++j) {  // the lower column, the upper one
            const uint32_t order = j == 0 ? 0x5410u : 0x7632u;
            Half::mma(sums[m][j], e.x, o.x, e.y, o.y, __byte_perm(values[0], values[1], order),
                      __byte_perm(values[2], values[3], order));
            Half::mma(sums[m][j], e.z, o.z, e.w, o.w, __byte_perm(values[4], values[5], order),
                      __byte_perm(values[6], values[7], order));
        }
    }
}

// Scores of keys that a row does not see become −infinity; the largest of the warp's scores of each row to `warp_rows`.
template <int TILES>
DMOE_DEVICE void mask(float (&scores)[TILES][2][4], const uint32_t *places, const uint32_t *limits, float *warp_rows) {
    const int g = lane_id() / 4, q = lane_id() % 4;
    DMOE_UNROLL
    for (int m = 0; m < TILES; ++m) {
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = m * 16 + half * 8 + g;
            float peak = -INFINITY;
            DMOE_UNROLL
            for (int c = 0; c < 4; ++c) {
                float &value = scores[m][c / 2][half * 2 + c % 2];
                if (places[c / 2 * 8 + 2 * q + c % 2] >= limits[row]) value = -INFINITY;
                peak = fmaxf(peak, value);
            }
            peak = fmaxf(peak, __shfl_xor_sync(kWholeWarp, peak, 1));
            peak = fmaxf(peak, __shfl_xor_sync(kWholeWarp, peak, 2));
            if (q == 0) warp_rows[row * kAttendWarps + warp_id()] = peak;
        }
    }
}

// Weights of the warp's sixteen keys by the rows' largest scores, as halfs into shared memory and added to the lane's sums.
template <class Half, int PITCH, int TILES, int PAIRS>
DMOE_DEVICE void weigh(Mixture<TILES, PAIRS> &part, const float (&scores)[TILES][2][4], const float4 *warp_rows,
                       uint4 *weights) {
    const int g = lane_id() / 4, q = lane_id() % 4;
    DMOE_UNROLL
    for (int m = 0; m < TILES; ++m) {
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = m * 16 + half * 8 + g;
            const float4 low = warp_rows[row * 2], high = warp_rows[row * 2 + 1];
            const float peak = fmaxf(fmaxf(fmaxf(low.x, low.y), fmaxf(low.z, low.w)),
                                     fmaxf(fmaxf(high.x, high.y), fmaxf(high.z, high.w)));
            const float base = part.raise(m, half, peak);
            uint32_t *const to = reinterpret_cast<uint32_t *>(weights + row * PITCH) + warp_id() * 8 + q;
            DMOE_UNROLL
            for (int n = 0; n < 2; ++n) {
                const float left = weight_of(scores[m][n][half * 2], base);
                const float right = weight_of(scores[m][n][half * 2 + 1], base);
                part.sum[m][half] += left + right;
                to[n * 4] = Half::narrow(left) | static_cast<uint32_t>(Half::narrow(right)) << 16;
            }
        }
    }
}

// SEGMENTS · 32 is the most dimensions of a head, TILES · 16 the rows of a thread block. WHOLE: it has all chunks; else one.
// The next step's keys are asked for before this one's are mixed, but in small tiles of one chunk: usually that is one step,
// and with 128 registers two thread blocks share a processor.
template <class Half, int SEGMENTS, int TILES, bool WHOLE>
__global__ void __launch_bounds__(kAttendThreads, SEGMENTS == 4 && TILES == 2 && !WHOLE ? 2 : 1)
    attend_kernel(AttendArguments a) {
    constexpr bool kAskEarly = WHOLE || SEGMENTS == 8 || TILES == 4;
    constexpr int kRows = TILES * 16, kPairs = SEGMENTS / 4, kGroups = kStepKeys / 32;
    constexpr int kQueryPitch = SEGMENTS * 4 + 4, kWeightPitch = kStepKeys / 8 + 4;  // 64 bytes more: no bank conflicts
    DMOE_SHARED(uint4, queries, kRows * kQueryPitch);
    DMOE_SHARED(uint4, weights, kRows * kWeightPitch);
    DMOE_SHARED(float4, warp_rows, kRows * kAttendWarps / 4);  // [row, warp]
    DMOE_SHARED(uint32_t, limits, kRows);
    DMOE_SHARED(uint32_t, places, kStepKeys);

    const int warp = warp_id(), lane = lane_id(), g = lane / 4, q = lane % 4;
    const int tile = static_cast<int>(blockIdx.x) % a.tiles, others = static_cast<int>(blockIdx.x) / a.tiles;
    const int chunk = WHOLE ? 0 : others % a.chunks, row_and_head = WHOLE ? others : others / a.chunks;

    Step step = first_step(a, row_and_head, chunk);
    uint4 keys[2][SEGMENTS];
    if (step.fresh) wait_for_predecessor();  // past keys were there before the first launch
    load_keys(keys, a, step);
    int64_t position = load_position(a, row_and_head, step);
    if (!step.fresh) wait_for_predecessor();
    load_tile<kRows, kQueryPitch>(queries, limits, a, row_and_head, tile);
    __syncthreads();
    const uint32_t most = warp_max(max(limits[lane], limits[kRows - kWarp + lane]));

    Mixture<TILES, kPairs> total, part;
    if constexpr (WHOLE) total.clear();
    part.clear();
    bool any = false;
    for (;;) {
        if (static_cast<int>(threadIdx.x) < kStepKeys) places[threadIdx.x] = key_place(position);
        const bool seen = __syncthreads_or(key_place(position) < most) != 0;
        const bool last_step = step.start + kStepKeys >= step.keys;
        const bool more = !last_step || (WHOLE && step.chunk + 1 < a.chunks);
        const Step next = next_step(a, row_and_head, step);
        const auto ask_for_next = [&] {
            load_keys(keys, a, next);
            position = load_position(a, row_and_head, next);
        };
        any |= seen;
        if (kAskEarly && !seen && more) ask_for_next();
        if (seen) {
            uint32_t group_seen[kGroups], values[kPairs][kGroups][8];
            DMOE_UNROLL
            for (int i = 0; i < kGroups; ++i) group_seen[i] = __ballot_sync(kWholeWarp, places[i * 32 + lane] < most);
            DMOE_UNROLL
            for (int p = 0; p < kPairs; ++p) {
                DMOE_UNROLL
                for (int i = 0; i < kGroups; ++i) {
                    load_values(values[p][i], a, step, i * 32, group_seen[i], (p * kAttendWarps + warp) * 16 + 2 * g);
                }
            }
            float scores[TILES][2][4] = {};
            if (__ballot_sync(kWholeWarp, places[warp * 16 + lane % 16] < most)) score<Half>(scores, keys, queries, a.dim);
            if (kAskEarly && more) ask_for_next();
            mask(scores, places + warp * 16, limits, reinterpret_cast<float *>(warp_rows));
            __syncthreads();
            weigh<Half, kWeightPitch>(part, scores, warp_rows, weights);
            __syncthreads();
            DMOE_UNROLL
            for (int i = 0; i < kGroups; ++i) {
                if (!group_seen[i]) continue;
                DMOE_UNROLL
                for (int p = 0; p < kPairs; ++p) {
                    mix<Half>(part.mixed[p], values[p][i], weights + g * kWeightPitch + i * 4 + q, kWeightPitch);
                }
            }
        }
        if (last_step && any) {
            sum_of_warps(part, reinterpret_cast<float *>(warp_rows));
            if constexpr (WHOLE) {
                total.fold(part);
                part.clear();
                any = false;
            }
        }
        if (!more) break;
        if (!kAskEarly) ask_for_next();
        step = next;
    }

    if constexpr (!WHOLE) {
        const PartialTile<kRows> all(a.partials, row_and_head * a.tiles + tile, a.chunks, a.dim);
        if (a.chunks > 1) {
            all.write(part, chunk);
            if (!arrives_last(a.counters + row_and_head * a.tiles + tile, static_cast<unsigned>(a.chunks))) return;
            all.read(total);
        } else {
            total = part;
        }
    }
    const int64_t heads = static_cast<int64_t>(a.kv_heads) * a.share;
    const int64_t batch = row_and_head / a.kv_heads, head = row_and_head % a.kv_heads;
    write_rows<Half>(total, a.mixed, a.dim, min(kRows, a.rows - tile * kRows), [&](int row) {
        const int at = tile * kRows + row, token = at / a.share;
        return (batch * a.tokens + token) * heads + head * a.share + (at - token * a.share);
    });
}

}  // namespace dmoe
