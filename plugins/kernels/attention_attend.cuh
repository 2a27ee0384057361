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
#include "device.cuh"

namespace dmoe {

constexpr int kAttendWarps = 8;
constexpr int kAttendThreads = kAttendWarps * kWarp;
constexpr int kStepKeys = 16 * kAttendWarps;
constexpr uint32_t kUnseen = 0xffffffffu;  // the place of a key that nobody sees

struct AttendArguments {
    const uint16_t *q;                                // [B, kv_heads, rows, dim], scaled
    const int64_t *position_ids, *past_positions;     // [B, tokens], [B, past]
    const uint16_t *key, *value;                      // [B, kv_heads, tokens, dim]
    const uint16_t *past_key, *past_value;            // [B, kv_heads, past, dim]
    uint16_t *mixed;                                  // [B, tokens, heads, dim]
    Partials partials;                                // used where splits > 1
    unsigned *counters;                               // [B · kv_heads, tiles]
    int tokens, past, kv_heads, share, dim, block_length;
    int rows, tiles;                                  // of a key head: tokens · share, and how many thread blocks have them
    int chunk_keys, past_chunks, chunks;              // chunks: of past and new keys
    int splits;                                       // thread blocks of a tile: 1, or one per chunk
};

// Where a step's keys are.
struct Step {
    int chunk, start;  // the first key, from the chunk's first
    int keys;          // of the chunk
    const uint16_t *key, *value;
    const int64_t *positions;
};

DMOE_DEVICE Step first_step(const AttendArguments &a, int row_and_head, int chunk) {
    const bool fresh = chunk >= a.past_chunks;
    const int places = fresh ? a.tokens : a.past, first = (fresh ? chunk - a.past_chunks : chunk) * a.chunk_keys;
    const int64_t at = (static_cast<int64_t>(row_and_head) * places + first) * a.dim;
    const int64_t row = row_and_head / a.kv_heads;
    return {chunk, 0, min(a.chunk_keys, places - first), (fresh ? a.key : a.past_key) + at,
            (fresh ? a.value : a.past_value) + at, (fresh ? a.position_ids : a.past_positions) + row * places + first};
}

// The step after, of the same chunk or the next one.
DMOE_DEVICE Step next_step(const AttendArguments &a, int row_and_head, const Step &step) {
    if (step.start + kStepKeys >= step.keys) return first_step(a, row_and_head, min(step.chunk + 1, a.chunks - 1));
    Step next = step;
    next.start += kStepKeys;
    return next;
}

// Positions as 32 bits, saturated: a key is seen where its place is below the query's limit.
DMOE_DEVICE uint32_t key_place(int64_t position) {
    return position < 0 ? kUnseen : static_cast<uint32_t>(min(position, static_cast<int64_t>(kUnseen) - 1));
}
DMOE_DEVICE uint32_t query_limit(int64_t position, int block_length) {
    if (block_length == 0) return kUnseen;
    const int64_t known = min(max(position, static_cast<int64_t>(0)), static_cast<int64_t>(kUnseen));
    return static_cast<uint32_t>(min((known / block_length + 1) * block_length, static_cast<int64_t>(kUnseen)));
}

// A warp's sixteen keys: per eight of them and 32 dimensions the lane's 16 bytes. Zeros where there is none.
template <int SEGMENTS>
DMOE_DEVICE void load_keys(uint4 (&to)[2][SEGMENTS], const Step &step, int dim) {
    const int g = lane_id() / 4, q = lane_id() % 4;
    DMOE_UNROLL
    for (int n = 0; n < 2; ++n) {
        const int at = step.start + warp_id() * 16 + n * 8 + g;
        DMOE_UNROLL
        for (int i = 0; i < SEGMENTS; ++i) {
            const int d = i * 32 + q * 8;
            to[n][i] = make_uint4(0, 0, 0, 0);
            if (at < step.keys && d < dim) {
                to[n][i] = *reinterpret_cast<const uint4 *>(step.key + static_cast<int64_t>(at) * dim + d);
            }
        }
    }
}

// Two columns of 32 keys for each lane; zeros where no row of the tile sees the key (`seen`, a bit per key).
DMOE_DEVICE void load_values(uint32_t (&to)[8], const Step &step, int first, uint32_t seen, int column, int dim) {
    const int q = lane_id() % 4;
    DMOE_UNROLL
    for (int j = 0; j < 8; ++j) {
        const int at = first + 8 * q + j;
        to[j] = 0;
        if (column < dim && (seen >> (8 * q + j) & 1u)) {
            to[j] = *reinterpret_cast<const uint32_t *>(step.value + static_cast<int64_t>(step.start + at) * dim + column);
        }
    }
}

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

// SEGMENTS · 32 is the most dimensions of a head, TILES · 16 the rows of a thread block.
template <class Half, int SEGMENTS, int TILES>
__global__ void __launch_bounds__(kAttendThreads) attend_kernel(AttendArguments a) {
    constexpr int kRows = TILES * 16, kPairs = SEGMENTS / 4, kGroups = kStepKeys / 32;
    constexpr int kQueryPitch = SEGMENTS * 4 + 4, kWeightPitch = kStepKeys / 8 + 4;  // 64 bytes more: no bank conflicts
    DMOE_SHARED(uint4, queries, kRows * kQueryPitch);
    DMOE_SHARED(uint4, weights, kRows * kWeightPitch);
    DMOE_SHARED(float4, warp_rows, kRows * kAttendWarps / 4);  // [row, warp]
    DMOE_SHARED(uint32_t, limits, kRows);
    DMOE_SHARED(uint32_t, places, kStepKeys);

    const int warp = warp_id(), lane = lane_id(), g = lane / 4, q = lane % 4;
    const int tile = static_cast<int>(blockIdx.x) % a.tiles, others = static_cast<int>(blockIdx.x) / a.tiles;
    const int split = others % a.splits, row_and_head = others / a.splits;
    const int first_chunk = a.splits > 1 ? split : 0, last_chunk = a.splits > 1 ? split + 1 : a.chunks;
    const int64_t first_row = static_cast<int64_t>(row_and_head) * a.rows + tile * kRows;
    const int row_count = min(kRows, a.rows - tile * kRows);

    Step step = first_step(a, row_and_head, first_chunk);
    uint4 keys[2][SEGMENTS];
    load_keys(keys, step, a.dim);
    int64_t position = -1;
    const auto load_position = [&](const Step &of) {
        const int at = of.start + static_cast<int>(threadIdx.x);
        return static_cast<int>(threadIdx.x) < kStepKeys && at < of.keys ? of.positions[at] : -1;
    };
    position = load_position(step);

    for (int i = threadIdx.x; i < kRows * kQueryPitch; i += kAttendThreads) {
        const int row = i / kQueryPitch, unit = i % kQueryPitch;
        queries[i] = make_uint4(0, 0, 0, 0);
        if (row < row_count && unit * 8 < a.dim) {
            queries[i] = *reinterpret_cast<const uint4 *>(a.q + (first_row + row) * a.dim + unit * 8);
        }
    }
    if (static_cast<int>(threadIdx.x) < kRows) {
        const int row = threadIdx.x, token = (tile * kRows + row) / a.share;
        const int64_t *const positions = a.position_ids + static_cast<int64_t>(row_and_head / a.kv_heads) * a.tokens;
        limits[row] = row < row_count ? query_limit(positions[token], a.block_length) : 0;  // beyond the last: sees nothing
    }
    __syncthreads();
    const uint32_t most = warp_max(max(limits[lane], limits[kRows - kWarp + lane]));

    Mixture<TILES, kPairs> total, part;
    total.clear();
    part.clear();
    bool any = false;
    while (step.chunk < last_chunk) {
        if (static_cast<int>(threadIdx.x) < kStepKeys) places[threadIdx.x] = key_place(position);
        const bool seen = __syncthreads_or(key_place(position) < most) != 0;
        const bool last_step = step.start + kStepKeys >= step.keys, more = !last_step || step.chunk + 1 < last_chunk;
        const Step next = next_step(a, row_and_head, step);
        any |= seen;
        if (seen) {
            uint32_t group_seen[kGroups], values[kPairs][kGroups][8];
            DMOE_UNROLL
            for (int i = 0; i < kGroups; ++i) group_seen[i] = __ballot_sync(kWholeWarp, places[i * 32 + lane] < most);
            DMOE_UNROLL
            for (int p = 0; p < kPairs; ++p) {
                DMOE_UNROLL
                for (int i = 0; i < kGroups; ++i) {
                    load_values(values[p][i], step, i * 32, group_seen[i], (p * kAttendWarps + warp) * 16 + 2 * g, a.dim);
                }
            }
            float scores[TILES][2][4] = {};
            if (__ballot_sync(kWholeWarp, places[warp * 16 + lane % 16] < most)) score<Half>(scores, keys, queries, a.dim);
            if (more) load_keys(keys, next, a.dim);
            DMOE_UNROLL
            for (int m = 0; m < TILES; ++m) {
                DMOE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int row = m * 16 + half * 8 + g;
                    float peak = -INFINITY;
                    DMOE_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        float &value = scores[m][c / 2][half * 2 + c % 2];
                        if (places[warp * 16 + c / 2 * 8 + 2 * q + c % 2] >= limits[row]) value = -INFINITY;
                        peak = fmaxf(peak, value);
                    }
                    peak = fmaxf(peak, __shfl_xor_sync(kWholeWarp, peak, 1));
                    peak = fmaxf(peak, __shfl_xor_sync(kWholeWarp, peak, 2));
                    if (q == 0) reinterpret_cast<float *>(warp_rows)[row * kAttendWarps + warp] = peak;
                }
            }
            __syncthreads();
            DMOE_UNROLL
            for (int m = 0; m < TILES; ++m) {
                DMOE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int row = m * 16 + half * 8 + g;
                    const float4 low = warp_rows[row * 2], high = warp_rows[row * 2 + 1];
                    const float peak = fmaxf(fmaxf(fmaxf(low.x, low.y), fmaxf(low.z, low.w)),
                                             fmaxf(fmaxf(high.x, high.y), fmaxf(high.z, high.w)));
                    const float base = part.raise(m, half, peak);
                    uint32_t *const to = reinterpret_cast<uint32_t *>(weights + row * kWeightPitch) + warp * 8 + q;
                    DMOE_UNROLL
                    for (int n = 0; n < 2; ++n) {
                        const float left = weight_of(scores[m][n][half * 2], base);
                        const float right = weight_of(scores[m][n][half * 2 + 1], base);
                        part.sum[m][half] += left + right;
                        to[n * 4] = Half::narrow(left) | static_cast<uint32_t>(Half::narrow(right)) << 16;
                    }
                }
            }
            __syncthreads();
            DMOE_UNROLL
            for (int i = 0; i < kGroups; ++i) {
                if (!group_seen[i]) continue;
                DMOE_UNROLL
                for (int p = 0; p < kPairs; ++p) {
                    mix<Half>(part.mixed[p], values[p][i], weights + g * kWeightPitch + i * 4 + q, kWeightPitch);
                }
            }
        } else if (more) {
            load_keys(keys, next, a.dim);
        }
        if (more) position = load_position(next);
        if (last_step && any) {
            sum_of_warps(part, reinterpret_cast<float *>(warp_rows));
            total.fold(part);
            part.clear();
            any = false;
        }
        if (!more) break;
        step = next;
    }

    const PartialTile<kRows> mine{a.partials, row_and_head * a.tiles + tile, a.chunks, a.dim};
    if (a.splits > 1) {
        mine.write(total, split);
        if (!arrives_last(a.counters + row_and_head * a.tiles + tile, static_cast<unsigned>(a.splits))) return;
        mine.read(total);
    }
    write_rows<Half>(total, a.mixed, a.dim, row_count, [&](int row) {
        const int64_t at = tile * kRows + row, heads = static_cast<int64_t>(a.kv_heads) * a.share;
        const int64_t batch = row_and_head / a.kv_heads, head = row_and_head % a.kv_heads;
        return (batch * a.tokens + at / a.share) * heads + head * a.share + at % a.share;
    });
}

}  // namespace dmoe
