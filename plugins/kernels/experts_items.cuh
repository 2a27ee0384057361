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
    const uint4 *inputs;         // gate_up: hidden [tokens, depth]; down: activations [pairs, depth]
    const uint4 *shared_inputs;  // gate_up: hidden; down: activations [tokens, shared_depth]
    uint16_t *activations;       // gate_up writes silu(gate) · up [pairs, rows / 2]
    uint16_t *shared_activations;  // [tokens, shared_rows / 2]
    const float *pair_weights;     // down: [tokens, places]
    float *pair_outputs;           // down writes weight · value [pairs, rows]
    float *shared_outputs;         // [tokens, shared_rows]
    int stages, stage_bytes;       // of the ring
};

constexpr int kSharedExpert = -1;

// An item: 64 rows of an expert, multiplied with its tokens in passes of TILES · 8. The shared expert's come first, since
// their weights are known before anything else is, and one per pass, since it has every token.
struct Item {
    int expert;      // or kSharedExpert
    int row;         // the first of 64
    int first;       // where the expert's pairs start in the list; of the shared expert, whose pairs are the tokens, 0
    int token, end;  // of those pairs
    int depth;
};

template <int TILES>
DMOE_DEVICE int shared_items(const ProductArguments &a) {
    return (a.shared_rows + kTileRows - 1) / kTileRows * ((a.tokens + TILES * 8 - 1) / (TILES * 8));
}

template <int TILES>
DMOE_DEVICE Item item_at(const ProductArguments &a, const PairLists &lists, int index, int shared) {
    if (index < shared) {
        const int tiles = (a.shared_rows + kTileRows - 1) / kTileRows, token = index / tiles * TILES * 8;
        return {kSharedExpert, index % tiles * kTileRows, 0, token, min(token + TILES * 8, a.tokens), a.shared_depth};
    }
    const int tiles = (a.rows + kTileRows - 1) / kTileRows, expert = lists.active[(index - shared) / tiles];
    return {expert, (index - shared) % tiles * kTileRows, lists.first(expert), 0, lists.count(expert), a.depth};
}

// A place in the block's sequence of stages: an item, a pass over it (item.token), a chunk of k.
struct Cursor {
    Item item;
    int index, at;  // of the item; of k
};

}  // namespace dmoe
