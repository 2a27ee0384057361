// What the products' thread blocks work on, and in which order: 64 rows of an expert, times its tokens.
#pragma once

#include "experts_pairs.cuh"
#include "experts_stage.cuh"

namespace dmoe {

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
    int group_shift;  // log2 of the values per scale
    int rows, depth;  // of an expert's matrix
    const void *shared_weights;     // [shared_rows, shared_depth] of the shared expert
    int shared_rows, shared_depth;  // 0 rows = there is none
    const int32_t *expert_ids;      // [tokens, places]
    int tokens, places, experts;
    const uint4 *inputs;     // gate_up: hidden [tokens, depth]; down: activations [pairs, depth]
    unsigned shared_inputs;  // units from there to those of the shared expert: hidden, or activations [tokens, shared_depth]
    uint16_t *activations;         // gate_up writes silu(gate) · up [pairs, rows / 2]
    uint16_t *shared_activations;  // [tokens, shared_rows / 2]
    const float *pair_weights;     // down: [tokens, places]
    float *pair_outputs;           // down writes weight · value [pairs, rows]
    float *shared_outputs;         // [tokens, shared_rows]
    int stages, stage_bytes;       // of the ring
};

constexpr int kSharedExpert = -1;

// An item: 64 rows of an expert, multiplied with its tokens in passes of TILES · 8. The shared expert's items come first,
// since their weights are known before anything else is, and are one pass each, since it has every token.
struct Item {
    bool shared;
    int expert;      // unless shared
    int row;         // the first of 64
    int first, end;  // the expert's pairs in the list; all tokens, when shared
};

template <int TILES>
DMOE_DEVICE int shared_items(const ProductArguments &a) {
    return (a.shared_rows + kTileRows - 1) / kTileRows * ((a.tokens + TILES * 8 - 1) / (TILES * 8));
}

// `shared`: how many items the shared expert has.
template <int TILES>
DMOE_DEVICE Item item_at(const ProductArguments &a, const PairLists &lists, int index, int shared) {
    if (index < shared) {
        const int tiles = (a.shared_rows + kTileRows - 1) / kTileRows, first = index / tiles * TILES * 8;
        return {true, 0, index % tiles * kTileRows, first, min(first + TILES * 8, a.tokens)};
    }
    const int tiles = (a.rows + kTileRows - 1) / kTileRows, expert = lists.active[(index - shared) / tiles];
    return {false, expert, (index - shared) % tiles * kTileRows, lists.first(expert), lists.end(expert)};
}

// A place in the block's sequence of stages. Few registers: the item itself is looked up where a pass starts or ends.
struct Cursor {
    int index;  // of the item
    int pair;   // the first one of the pass
    int at;     // of k
};

}  // namespace dmoe
