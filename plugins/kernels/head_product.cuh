// Second launch of DmoeHead: the vocabulary product, which keeps of a tile of logits the best one and a sum.
//
// The weights are read once from device memory, through a ring of stages in shared memory that is filled by asynchronous
// copies; a stage holds 64 k of a tile's weight rows and of the pass's tokens. Weight rows are operand A of mma.m16n8k16,
// tokens operand B. A warp has 32 rows and TILES · 8 tokens; four warps are a tile of 128 rows, and COLUMNS such fours
// share its weights among more tokens. A tile is always those 128 rows and k always ascends, so a token's results
// depend neither on the variant nor on the grid.
#pragma once

#include "head_best.cuh"

namespace dmoe {

constexpr int kHeadRows = 128;     // vocabulary rows of a tile
constexpr int kHeadRowWarps = 4;   // warps a tile's rows are shared among
constexpr int kHeadStages = 3;     // of the ring
constexpr int kStageUnits = 8;     // units of eight halfs of a row in a stage: one 128-byte line

struct HeadArguments {
    const uint4 *weight;  // [vocabulary, units]
    const uint4 *normed;  // [count, units]
    int vocabulary, units, mask_id;
    int first, count;     // places of logit_rows: the first one here, and how many
    int wanted, kept;     // places of a row of logit_rows, and how many of them have logits
    uint64_t *best;       // [count, tiles]
    float *sum;           // [count, tiles]
    float *logits;        // [rows, kept, vocabulary]
};

template <int TILES, int COLUMNS>
struct HeadVariant {
    static constexpr int kThreads = kHeadRowWarps * COLUMNS * kWarp;
    static constexpr int kTokens = TILES * COLUMNS * 8;  // of a pass
    static constexpr int kUnits = (kHeadRows + kTokens) * kStageUnits;  // of a stage
    static constexpr int kRingBytes = kHeadStages * kUnits * 16;
    static constexpr int kSharedBytes = kRingBytes + kHeadRowWarps * kTokens * 12;  // with what the warps tell each other
};

// Where unit `unit` of row `row` is in a stage: permuted so that eight rows of the same unit are in different banks.
DMOE_DEVICE int stage_place(int row, int unit) { return row * kStageUnits + (unit ^ row % kStageUnits); }

// A place in the stream of (tile, pass, k) that a thread block goes through.
struct HeadPlace {
    int item;  // tile · passes + pass, so that the passes of a tile find its weights in L2
    int chunk, row, token;

    DMOE_DEVICE HeadPlace(int item_, int passes, int tokens)
        : item(item_), chunk(0), row(item_ / passes * kHeadRows), token(item_ % passes * tokens) {}
};

// COUNT rows from `first` of a matrix of `rows` rows into a stage; rows and units behind the end are zeros.
template <int COUNT, int THREADS>
DMOE_DEVICE void load_rows(uint4 *stage, const uint4 *matrix, int first, int rows, int units, int chunk) {
    constexpr int kRows = THREADS / kStageUnits;  // that the thread block copies at once
    const int thread = static_cast<int>(threadIdx.x), unit = thread % kStageUnits, place = chunk * kStageUnits + unit;
    int row = thread / kStageUnits;
    const uint4 *from = matrix + static_cast<int64_t>(first + row) * units + place;
    DMOE_UNROLL
    for (int i = 0; i < COUNT / kRows; ++i, row += kRows, from += kRows * units) {
        copy_async_16(stage + stage_place(row, unit), from, first + row < rows && place < units);
    }
}

// sums += 32 weight rows · tokens, 64 k.
template <class Half, int TILES>
DMOE_DEVICE void multiply_stage(float (&sums)[2][TILES][4], const uint4 *weights, const uint4 *tokens) {
    const int lane = lane_id();
    DMOE_UNROLL
    for (int unit = 0; unit < kStageUnits; unit += 2) {
        uint32_t a[2][4];
        DMOE_UNROLL
        for (int m = 0; m < 2; ++m) load_matrices(a[m], weights + stage_place(m * 16 + lane % 16, unit + lane / 16));
        DMOE_UNROLL
        for (int j = 0; j < TILES; j += 2) {
            uint32_t b[4];
            load_matrices(b, tokens + stage_place(j * 8 + lane / 16 * 8 + lane % 8, unit + lane / 8 % 2));
            DMOE_UNROLL
            for (int m = 0; m < 2; ++m) {
                Half::mma(sums[m][j], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                Half::mma(sums[m][j + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
            }
        }
    }
}

// Of a warp's 32 rows from `row` on: the best logit of each of its tokens and the sum of exponentials below it.
// sums[m][j]: rows m·16 + g and m·16 + g + 8 of tokens j·8 + 2q and j·8 + 2q + 1.
template <int TILES>
DMOE_DEVICE void reduce_rows(const HeadArguments &a, const float (&sums)[2][TILES][4], int row, uint64_t *keys,
                             float *totals) {
    const int lane = lane_id(), g = lane / 4, q = lane % 4;
    DMOE_UNROLL
    for (int j = 0; j < TILES; ++j) {
        DMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            uint64_t key = 0;
            DMOE_UNROLL
            for (int r = 0; r < 4; ++r) {
                const int token = row + r * 8 + g;
                if (token < a.vocabulary && token != a.mask_id) key = max(key, best_key(sums[r / 2][j][r % 2 * 2 + i], token));
            }
            DMOE_UNROLL
            for (int distance = 4; distance < kWarp; distance *= 2) key = lane_max(key, distance);
            const float best = logit_of(key);
            float total = 0.0f;
            DMOE_UNROLL
            for (int r = 0; r < 4; ++r) {
                const int token = row + r * 8 + g;
                if (token < a.vocabulary && token != a.mask_id) total += weight_below(sums[r / 2][j][r % 2 * 2 + i], best);
            }
            DMOE_UNROLL
            for (int distance = 4; distance < kWarp; distance *= 2) {
                total += __shfl_xor_sync(kWholeWarp, total, distance);
            }
            if (g == 0) keys[j * 8 + 2 * q + i] = key, totals[j * 8 + 2 * q + i] = total;
        }
    }
}

template <int TILES>
DMOE_DEVICE void write_logits(const HeadArguments &a, const float (&sums)[2][TILES][4], int row, int token) {
    const int g = lane_id() / 4, q = lane_id() % 4;
    DMOE_UNROLL
    for (int j = 0; j < TILES; ++j) {
        DMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int own = token + j * 8 + 2 * q + i, place = a.first + own;
            if (own >= a.count || place % a.wanted >= a.kept) continue;
            float *const to = a.logits + (static_cast<int64_t>(place / a.wanted) * a.kept + place % a.wanted) * a.vocabulary;
            DMOE_UNROLL
            for (int r = 0; r < 4; ++r) {
                if (row + r * 8 + g < a.vocabulary) to[row + r * 8 + g] = sums[r / 2][j][r % 2 * 2 + i];
            }
        }
    }
}

// Persistent: block b takes items b, b + gridDim.x, …, and loads the next item's first stages before it looks at the
// logits of the last one.
template <class Half, int TILES, int COLUMNS>
__global__ void __launch_bounds__(HeadVariant<TILES, COLUMNS>::kThreads, COLUMNS == 1 ? 3 : 2) head_kernel(HeadArguments a) {
    using V = HeadVariant<TILES, COLUMNS>;
    DMOE_SHARED(uint64_t, keys, kHeadRowWarps * V::kTokens);
    DMOE_SHARED(float, totals, kHeadRowWarps * V::kTokens);
    DMOE_DYNAMIC_SHARED(uint4, ring);
    const int tiles = (a.vocabulary + kHeadRows - 1) / kHeadRows, passes = (a.count + V::kTokens - 1) / V::kTokens;
    const int items = tiles * passes, chunks = (a.units + kStageUnits - 1) / kStageUnits;
    const int row_warp = warp_id() % kHeadRowWarps, column = warp_id() / kHeadRowWarps;

    const HeadPlace start(static_cast<int>(blockIdx.x), passes, V::kTokens);
    HeadPlace ahead = start;  // what is loaded next
    const auto advance = [&] {
        if (++ahead.chunk == chunks) ahead = HeadPlace(ahead.item + static_cast<int>(gridDim.x), passes, V::kTokens);
    };
    const auto load_weights = [&](int stage) {
        if (ahead.item >= items) return;
        load_rows<kHeadRows, V::kThreads>(ring + stage * V::kUnits, a.weight, ahead.row, a.vocabulary, a.units, ahead.chunk);
    };
    const auto load_tokens = [&](int stage) {
        if (ahead.item >= items) return;
        load_rows<V::kTokens, V::kThreads>(ring + stage * V::kUnits + kHeadRows * kStageUnits, a.normed, ahead.token,
                                           a.count, a.units, ahead.chunk);
    };
    // The weights do not depend on the launch before this one.
    for (int stage = 0; stage < kHeadStages - 1; ++stage, advance()) load_weights(stage);
    wait_for_predecessor();
    let_successor_start();
    ahead = start;
    for (int stage = 0; stage < kHeadStages - 1; ++stage, advance()) load_tokens(stage), commit_copies();

    int stage = 0, next = kHeadStages - 1;
    for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
        float sums[2][TILES][4] = {};
        for (int chunk = 0; chunk < chunks; ++chunk) {
            wait_for_copies<kHeadStages - 2>();
            __syncthreads();  // all copies of this stage are there, and nobody reads the one before any more
            load_weights(next), load_tokens(next), commit_copies();
            advance();
            const uint4 *const weights = ring + stage * V::kUnits;
            multiply_stage<Half>(sums, weights + row_warp * 32 * kStageUnits,
                                 weights + (kHeadRows + column * TILES * 8) * kStageUnits);
            stage = stage + 1 == kHeadStages ? 0 : stage + 1;
            next = next + 1 == kHeadStages ? 0 : next + 1;
        }
        const int tile = item / passes, token = item % passes * V::kTokens, row = tile * kHeadRows + row_warp * 32;
        if (a.kept) write_logits(a, sums, row, token + column * TILES * 8);
        reduce_rows(a, sums, row, keys + row_warp * V::kTokens + column * TILES * 8,
                    totals + row_warp * V::kTokens + column * TILES * 8);
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < V::kTokens && token + i < a.count; i += V::kThreads) {
            uint64_t key = 0;
            for (int w = 0; w < kHeadRowWarps; ++w) key = max(key, keys[w * V::kTokens + i]);
            float total = 0.0f;
            for (int w = 0; w < kHeadRowWarps; ++w) {
                if (const uint64_t own = keys[w * V::kTokens + i]) {
                    total += totals[w * V::kTokens + i] * weight_below(logit_of(own), logit_of(key));
                }
            }
            const int64_t to = static_cast<int64_t>(token + i) * tiles + tile;
            a.best[to] = key, a.sum[to] = total;
        }
    }
}

}  // namespace dmoe
