// The two products of DmoeExperts: rows of an expert's weights times the tokens routed to it.
//
// The weights are read once from device memory, straight into registers, and are operand A of mma.m16n8k16 (16 weight
// rows); the tokens are operand B, eight per tile, read through L1. k may be permuted as long as A and B agree, so a lane
// takes whole pieces of 16 bytes (experts_weights.cuh): words 0 and 1 of eight halfs are its k slots {2q, 2q+1} and
// {2q+8, 2q+9} of one product, words 2 and 3 those of the next. Weight rows may be permuted too: A row g is row 2g and A
// row g+8 is row 2g+1 of the sixteen, so that a lane ends up with two neighbouring rows of the same token: a gate with
// its up, or two neighbouring outputs. See README.md for the picture.
#pragma once

#include "device.cuh"
#include "experts_pairs.cuh"
#include "experts_weights.cuh"

namespace dmoe {

constexpr int kProductWarps = 4;
constexpr int kProductThreads = kProductWarps * kWarp;

// An expert's matrix in many copies: [number, rows, depth] weights and, quantised, [number, rows, depth / group] scales.
struct Matrices {
    const void *weights;
    const uint16_t *scales;
};

struct ProductArguments {
    Matrices all;                   // of every expert; pinned host memory where the pool is the fast tier
    Matrices pool;                  // of every slot
    const int32_t *slot_of_expert;  // [experts], outside 0 … slots − 1 = not in the pool; null = no pool
    int slots;
    int group_shift;       // log2 of the values per scale
    const uint4 *tokens;   // gate_up: hidden [N, depth]; down: activations [grouped pairs, depth]
    Groups groups;
    int experts, rows, depth, places;
    uint16_t *activations;      // gate_up writes silu(gate) · up [grouped pairs, rows / 2]
    const float *pair_weights;  // down: [N·k]
    float *pair_outputs;        // down writes weight · value [N·k, rows]
};

// The one place where an expert's weights are looked up: in the pool, or among all experts.
template <class Rows>
DMOE_DEVICE RowPair rows_of(const ProductArguments &a, int expert, int row) {
    const int slot = a.slot_of_expert ? a.slot_of_expert[expert] : -1;
    const bool pooled = slot >= 0 && slot < a.slots;
    const Matrices &from = pooled ? a.pool : a.all;
    const int64_t index = static_cast<int64_t>(pooled ? slot : expert) * a.rows + row;
    const int64_t pitch = static_cast<int64_t>(a.depth / 8) * Rows::kBits;
    const int groups = Rows::kBits == 16 ? 0 : a.depth >> a.group_shift;
    const char *const even = static_cast<const char *>(from.weights) + index * pitch;
    const uint16_t *const scales = from.scales + index * groups;
    return {{even, even + pitch}, {scales, scales + groups}, a.group_shift, a.depth / kUnit};
}

// The experts with tokens, ascending, into `active`; how many. Thread t looks at experts 8t … 8t+7.
DMOE_DEVICE int list_active(const int *count, int experts, uint16_t *active, int *warp_totals) {
    const int first = static_cast<int>(threadIdx.x) * 8, lane = lane_id();
    int counts[8] = {};
    if (first < experts) {
        const int4 low = reinterpret_cast<const int4 *>(count + first)[0];
        const int4 high = reinterpret_cast<const int4 *>(count + first)[1];
        counts[0] = low.x, counts[1] = low.y, counts[2] = low.z, counts[3] = low.w;
        counts[4] = high.x, counts[5] = high.y, counts[6] = high.z, counts[7] = high.w;
    }
    int mine = 0;
    DMOE_UNROLL
    for (int i = 0; i < 8; ++i) mine += counts[i] > 0;
    int upto = mine;
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int left = __shfl_up_sync(kWholeWarp, upto, distance);
        if (lane >= distance) upto += left;
    }
    if (lane == kWarp - 1) warp_totals[warp_id()] = upto;
    __syncthreads();
    int at = upto - mine, total = 0;
    for (int w = 0; w < kProductWarps; ++w) {
        if (w < warp_id()) at += warp_totals[w];
        total += warp_totals[w];
    }
    DMOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        if (counts[i] > 0) active[at++] = static_cast<uint16_t>(first + i);
    }
    __syncthreads();
    return total;
}

// Adds one step to up to four tiles of eight tokens. `offsets`: units from `tokens` to the lane's token of a tile.
template <class Half, class Rows>
DMOE_DEVICE void multiply(float (*sums)[4], const Rows &rows, const uint4 *tokens, const uint32_t *offsets, int tiles,
                          int at, int units) {
    const int unit = Rows::unit(at, units);
    DMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
        const bool there = !Rows::kPartial || unit + half * Rows::kNext < units;
        uint4 b[4];
        DMOE_UNROLL
        for (int j = 0; j < 4; ++j) {
            if (Rows::kPartial) b[j] = make_uint4(0, 0, 0, 0);
            if (j < tiles && there) b[j] = load_shared_by_many(tokens + (offsets[j] + unit) + half * Rows::kNext);
        }
        const uint4 e = rows.values(0, half), o = rows.values(1, half);
        DMOE_UNROLL
        for (int j = 0; j < 4; ++j) {
            if (j >= tiles) continue;
            Half::mma(sums[j], e.x, o.x, e.y, o.y, b[j].x, b[j].y);
            Half::mma(sums[j], e.z, o.z, e.w, o.w, b[j].z, b[j].w);
        }
    }
}

// Fetches the first steps of two rows: steps first, first + every, … of k.
template <class Rows, int AHEAD>
DMOE_DEVICE void load_ahead(Rows (&ring)[AHEAD], const RowPair &from, int first, int every) {
    DMOE_UNROLL
    for (int i = 0; i < AHEAD; ++i) ring[i].load(from, (first + i * every) * kSegment);
}

// sums += (sixteen weight rows) · (tokens), over steps first, first + every, … of k. `ring` holds the first of them and
// is refilled as it is used up; its places are known at compile time, so it is registers. ptxas has all its loads waited
// for together (README.md), so the ring is that many steps in one go rather than a pipeline.
template <class Half, class Rows, int AHEAD, int TILES>
DMOE_DEVICE void multiply_rows(float (&sums)[TILES][4], Rows (&ring)[AHEAD], const RowPair &from, const uint4 *tokens,
                               const uint32_t (&offsets)[TILES], int tiles, int first, int every) {
    const int stride = every * kSegment;
    int at = first * kSegment;  // first unit of the step
    while (at < from.units) {
        DMOE_UNROLL
        for (int i = 0; i < AHEAD; ++i) {
            if (at < from.units) {
                DMOE_UNROLL
                for (int j = 0; j < TILES; j += 4) {
                    if (j < tiles) multiply<Half>(sums + j, ring[i], tokens, offsets + j, tiles - j, at, from.units);
                }
                ring[i].load(from, at + AHEAD * stride);
                at += stride;
            }
        }
    }
}

// c: rows `row` and `row + 1` of tokens 2q and 2q + 1 of the tile that starts at `token` of the expert's list.
template <class Half, bool GATE>
DMOE_DEVICE void write_tile(const ProductArguments &a, const float (&c)[4], int row, int first, int token, int count) {
    const int q = lane_id() % 4;
    if (row >= a.rows) return;
    DMOE_UNROLL
    for (int i = 0; i < 2; ++i) {
        if (token + 2 * q + i >= count) continue;
        const int64_t slot = first + token + 2 * q + i;
        if constexpr (GATE) {
            const float gate = c[i], up = c[2 + i];
            a.activations[slot * (a.rows / 2) + row / 2] = Half::narrow(gate / (1.0f + expf(-gate)) * up);
        } else {
            const int64_t pair = a.groups.pairs[slot];
            const float weight = a.pair_weights[pair];
            *reinterpret_cast<float2 *>(a.pair_outputs + pair * a.rows + row) =
                make_float2(weight * c[i], weight * c[2 + i]);
        }
    }
}

// Persistent: block b takes items b, b + gridDim.x, …; an item is 64 / SPLIT rows of an active expert. The first weights
// of an item are fetched before the last one's results are written.
// TILES: tiles of eight tokens per pass over the rows. SPLIT 1: a warp has 16 rows of its own. SPLIT 4: the warps share
// 16 rows and take every fourth step of k.
template <class Half, class Rows, int TILES, int SPLIT, bool GATE>
__global__ void __launch_bounds__(kProductThreads, 4) product_kernel(ProductArguments a) {
    static_assert(TILES % 4 == 0 && (SPLIT == 1 || SPLIT == kProductWarps), "tiles are handled in fours");
    constexpr int kRows = kProductWarps * 16 / SPLIT;
    constexpr bool kTwoBuffers = TILES == 4;  // one barrier per item instead of two, where shared memory is cheap
    constexpr int kPartials = kProductWarps * TILES * kWarp;
    DMOE_SHARED(uint16_t, active, kMaxExperts);
    DMOE_SHARED(int, warp_totals, kProductWarps);
    DMOE_SHARED(float4, partials, SPLIT == 1 ? 1 : kTwoBuffers ? 2 * kPartials : kPartials);

    const int warp = warp_id(), lane = lane_id(), g = lane / 4, first_step = SPLIT == 1 ? 0 : warp;
    const int row_units = a.depth / kUnit, row_tiles = (a.rows + kRows - 1) / kRows;
    const int items = list_active(a.groups.count, a.experts, active, warp_totals) * row_tiles;
    const auto row_of = [&](int item) { return item % row_tiles * kRows + (SPLIT == 1 ? warp * 16 : 0) + 2 * g; };
    const auto rows_at = [&](int item) {
        if (item >= items) return RowPair{};  // no units: nothing is fetched
        // Rows beyond the last are products nobody looks at: take the last two instead.
        return rows_of<Rows>(a, active[item / row_tiles], min(row_of(item), a.rows - 2));
    };
    RowPair from = rows_at(blockIdx.x);
    Rows ring[Rows::template kAhead<TILES>];
    load_ahead(ring, from, first_step, SPLIT);
    int buffer = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int expert = active[item / row_tiles], row = row_of(item);
        const int count = a.groups.count[expert], first = a.groups.first[expert];
        for (int token = 0; token < count; token += TILES * 8) {
            const int tiles = min(TILES, (count - token + 7) / 8);
            uint32_t offsets[TILES];
            float sums[TILES][4] = {};
            DMOE_UNROLL
            for (int j = 0; j < TILES; ++j) {
                // Tokens beyond the last are like rows beyond the last.
                const int slot = first + min(token + j * 8 + g, count - 1);
                offsets[j] = static_cast<uint32_t>(GATE ? a.groups.pairs[slot] / a.places : slot) * row_units;
            }
            multiply_rows<Half>(sums, ring, from, a.tokens, offsets, tiles, first_step, SPLIT);
            if (token + TILES * 8 >= count) from = rows_at(item + gridDim.x);
            load_ahead(ring, from, first_step, SPLIT);
            if constexpr (SPLIT == 1) {
                DMOE_UNROLL
                for (int j = 0; j < TILES; ++j) {
                    if (j < tiles) write_tile<Half, GATE>(a, sums[j], row, first, token + j * 8, count);
                }
            } else {
                float4 *const shared = partials + buffer * kPartials;
                DMOE_UNROLL
                for (int j = 0; j < TILES; ++j) {
                    if (j < tiles) {
                        shared[(warp * TILES + j) * kWarp + lane] =
                            make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
                    }
                }
                __syncthreads();
                for (int j = warp; j < tiles; j += kProductWarps) {
                    float c[4] = {};
                    DMOE_UNROLL
                    for (int w = 0; w < kProductWarps; ++w) {
                        const float4 part = shared[(w * TILES + j) * kWarp + lane];
                        c[0] += part.x, c[1] += part.y, c[2] += part.z, c[3] += part.w;
                    }
                    write_tile<Half, GATE>(a, c, row, first, token + j * 8, count);
                }
                if (kTwoBuffers) {
                    buffer ^= 1;
                } else {
                    __syncthreads();
                }
            }
        }
    }
}

}  // namespace dmoe
