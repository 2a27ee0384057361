// What a warp knows of the mixtures of a tile's rows, how chunks of keys are folded together, and partial mixtures in memory.
//
// A lane has rows g and g + 8 of each sixteen (g = lane / 4, q = lane % 4), and of the warp's columns, sixteen per pair of
// tensor-core tiles, 4q … 4q + 3: tile j of a pair has the columns 2c + j.
#pragma once

#include "device.cuh"

namespace dmoe {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kFoldWarps = 8;

// exp(score − base); `base` is finite, or infinite or NaN if a score is.
DMOE_DEVICE float weight_of(float score, float base) { return fast_exp2((score - base) * kLog2E); }

template <int TILES, int PAIRS>
struct Mixture {
    float peak[TILES][2];             // the largest score; −infinity: none yet
    float sum[TILES][2];              // of exp(score − peak); 0: no key is seen
    float mixed[PAIRS][TILES][2][4];  // of exp(score − peak) · value, as mma leaves it

    DMOE_DEVICE void clear() {
        DMOE_UNROLL
        for (int m = 0; m < TILES; ++m) {
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                peak[m][half] = -INFINITY;
                sum[m][half] = 0.0f;
                DMOE_UNROLL
                for (int p = 0; p < PAIRS; ++p) {
                    DMOE_UNROLL
                    for (int c = 0; c < 4; ++c) at(p, m, half, c) = 0.0f;
                }
            }
        }
    }

    // Column 4q + c of a row.
    DMOE_DEVICE float &at(int pair, int m, int half, int c) { return mixed[pair][m][c % 2][half * 2 + c / 2]; }

    // Takes a new score into a row's peak; returns what to take weights from.
    DMOE_DEVICE float raise(int m, int half, float score) {
        const float now = fmaxf(peak[m][half], score), base = now == -INFINITY ? 0.0f : now;
        const float keep = weight_of(peak[m][half], base);
        peak[m][half] = now;
        sum[m][half] *= keep;
        DMOE_UNROLL
        for (int p = 0; p < PAIRS; ++p) {
            DMOE_UNROLL
            for (int c = 0; c < 4; ++c) at(p, m, half, c) *= keep;
        }
        return base;
    }

    // Adds the mixture of other keys; into an empty one: the very same bits. No branches, so that loads of many parts can be
    // under way. A part whose sum is 0 changes nothing, whatever its other numbers are.
    DMOE_DEVICE void fold(Mixture &part) {
        DMOE_UNROLL
        for (int m = 0; m < TILES; ++m) {
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const bool none = part.sum[m][half] == 0.0f;
                const float now = fmaxf(peak[m][half], part.peak[m][half]), base = now == -INFINITY ? 0.0f : now;
                const float keep = weight_of(peak[m][half], base), add = weight_of(part.peak[m][half], base);
                peak[m][half] = none ? peak[m][half] : now;
                sum[m][half] = none ? sum[m][half] : fmaf(sum[m][half], keep, part.sum[m][half] * add);
                DMOE_UNROLL
                for (int p = 0; p < PAIRS; ++p) {
                    DMOE_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        const float both = fmaf(at(p, m, half, c), keep, part.at(p, m, half, c) * add);
                        at(p, m, half, c) = none ? at(p, m, half, c) : both;
                    }
                }
            }
        }
    }
};

// Each lane's sums of its own keys become the rows' sums, in the order of lanes and warps. All threads of the block call it.
template <int TILES, int PAIRS>
DMOE_DEVICE void sum_of_warps(Mixture<TILES, PAIRS> &part, float *warp_rows) {
    const int g = lane_id() / 4;
    DMOE_UNROLL
    for (int m = 0; m < TILES; ++m) {
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            float sum = part.sum[m][half];
            sum += __shfl_xor_sync(kWholeWarp, sum, 1);
            sum += __shfl_xor_sync(kWholeWarp, sum, 2);
            if (lane_id() % 4 == 0) warp_rows[(m * 16 + half * 8 + g) * kFoldWarps + warp_id()] = sum;
        }
    }
    __syncthreads();
    DMOE_UNROLL
    for (int m = 0; m < TILES; ++m) {
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float *const of_row = warp_rows + (m * 16 + half * 8 + g) * kFoldWarps;
            float sum = 0.0f;
            DMOE_UNROLL
            for (int w = 0; w < kFoldWarps; ++w) sum += of_row[w];
            part.sum[m][half] = sum;
        }
    }
}

struct Partials {
    float2 *stats;  // [tiles, chunks, rows of a tile]: peak and sum
    float4 *mixed;  // [tiles, chunks, rows of a tile, dim / 4]; not written where the sum is 0
};

// The partial mixtures of one tile, one per chunk.
template <int ROWS>
class PartialTile {
public:
    DMOE_DEVICE PartialTile(const Partials &partials, int tile_, int chunks_, int dim_)
        : all(partials), tile(tile_), chunks(chunks_), dim(dim_) {}

    template <int TILES, int PAIRS>
    DMOE_DEVICE void write(Mixture<TILES, PAIRS> &from, int chunk) const {
        float2 *const stats = all.stats + row_of(chunk);
        float4 *const mixed = all.mixed + row_of(chunk) * (dim / 4);
        DMOE_UNROLL
        for (int m = 0; m < TILES; ++m) {
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                if (warp_id() == 0 && lane_id() % 4 == 0) {
                    stats[offset(m, half)] = make_float2(from.peak[m][half], from.sum[m][half]);
                }
                if (from.sum[m][half] == 0.0f) continue;
                DMOE_UNROLL
                for (int p = 0; p < PAIRS; ++p) {
                    if (column(p) >= dim) continue;
                    mixed[(offset(m, half) * dim + column(p)) / 4] =
                        make_float4(from.at(p, m, half, 0), from.at(p, m, half, 1), from.at(p, m, half, 2),
                                    from.at(p, m, half, 3));
                }
            }
        }
    }

    // All chunks folded in order.
    template <int TILES, int PAIRS>
    DMOE_DEVICE void read(Mixture<TILES, PAIRS> &to) const {
        constexpr int kAhead = 3;  // loads that one wait is for; more do not fit into registers
        to.clear();
        for (int first = 0; first < chunks; first += kAhead) {
            Mixture<TILES, PAIRS> parts[kAhead];
            DMOE_UNROLL
            for (int i = 0; i < kAhead; ++i) load(parts[i], min(first + i, chunks - 1));
            DMOE_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                if (first + i < chunks) to.fold(parts[i]);
            }
        }
    }

private:
    // The lane's first row of a chunk; its others are at `offset(m, half)`.
    DMOE_DEVICE int64_t row_of(int chunk) const {
        return (static_cast<int64_t>(tile) * chunks + chunk) * ROWS + lane_id() / 4;
    }
    static DMOE_DEVICE int offset(int m, int half) { return m * 16 + half * 8; }
    DMOE_DEVICE int column(int pair) const { return (pair * kFoldWarps + warp_id()) * 16 + lane_id() % 4 * 4; }

    // Also where the sum is 0: then what comes means nothing, but nothing has to wait for the sums.
    template <int TILES, int PAIRS>
    DMOE_DEVICE void load(Mixture<TILES, PAIRS> &part, int chunk) const {
        const float2 *const stats = all.stats + row_of(chunk);
        const float4 *const mixed = all.mixed + row_of(chunk) * (dim / 4);
        DMOE_UNROLL
        for (int m = 0; m < TILES; ++m) {
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float2 of_row = stats[offset(m, half)];
                part.peak[m][half] = of_row.x, part.sum[m][half] = of_row.y;
                DMOE_UNROLL
                for (int p = 0; p < PAIRS; ++p) {
                    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (column(p) < dim) v = mixed[(offset(m, half) * dim + column(p)) / 4];
                    part.at(p, m, half, 0) = v.x, part.at(p, m, half, 1) = v.y;
                    part.at(p, m, half, 2) = v.z, part.at(p, m, half, 3) = v.w;
                }
            }
        }
    }

    Partials all;
    int tile, chunks, dim;
};

// Rows of the result, rounded; zeros for a row that sees no key. `place_of(row)`: a row's place among those of `mixed`.
template <class Half, int TILES, int PAIRS, class Place>
DMOE_DEVICE void write_rows(Mixture<TILES, PAIRS> &from, uint16_t *mixed, int dim, int rows, Place place_of) {
    DMOE_UNROLL
    for (int m = 0; m < TILES; ++m) {
        DMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = m * 16 + half * 8 + lane_id() / 4;
            if (row >= rows) continue;
            const float sum = from.sum[m][half], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            DMOE_UNROLL
            for (int p = 0; p < PAIRS; ++p) {
                const int column = (p * kFoldWarps + warp_id()) * 16 + lane_id() % 4 * 4;
                if (column >= dim) continue;
                uint32_t words[2];
                DMOE_UNROLL
                for (int i = 0; i < 2; ++i) {
                    words[i] = Half::narrow(from.at(p, m, half, 2 * i) * inverse) |
                               static_cast<uint32_t>(Half::narrow(from.at(p, m, half, 2 * i + 1) * inverse)) << 16;
                }
                *reinterpret_cast<uint2 *>(mixed + place_of(row) * dim + column) = make_uint2(words[0], words[1]);
            }
        }
    }
}

}  // namespace dmoe
