// What the products' thread blocks work on, and in which order: 64 rows of an expert, times its tokens.
#pragma once

#include "experts_pairs.cuh"
#include "experts_stage.cuh"

namespace dmoe {

// Division of numbers below 2^31 by one that the host knows.
struct Divisor {
    unsigned by = 1, factor = 1u << 31;
    int shift = 31;

    Divisor() = default;
    explicit Divisor(int divisor) : by(static_cast<unsigned>(divisor)) {
        while (1ull << (shift - 31) < by) ++shift;
        factor = static_cast<unsigned>(((1ull << shift) + by - 1) / by);  // by > 2^(shift − 32), so it fits
    }
    DMOE_DEVICE int quotient(int number) const {
        return static_cast<int>(static_cast<unsigned long long>(number) * factor >> shift);
    }
    DMOE_DEVICE int remainder(int number) const { return number - quotient(number) * static_cast<int>(by); }
};

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
    int tokens, experts;
    Divisor places, tiles, shared_tiles;  // tiles: of 64 rows
    const uint4 *inputs;     // gate_up: hidden [tokens, depth]; down: activations [pairs, depth]
    unsigned shared_inputs;  // units from there to those of the shared expert: hidden, or activations [tokens, shared_depth]
    bool gelu;                     // gelu(gate), else silu(gate)
    uint16_t *activations;         // gate_up writes it times up [pairs, rows / 2]
    uint16_t *shared_activations;  // [tokens, shared_rows / 2]
    const float *pair_weights;     // down: [tokens, places]
    float *pair_outputs;           // down writes weight · value [pairs, rows]
    float *shared_outputs;         // [tokens, shared_rows]
    int stages, stage_bytes;       // of the ring
};

inline __device__ __host__ int pair_count(const ProductArguments &a) { return a.tokens * static_cast<int>(a.places.by); }

// An item: 64 rows of an expert, multiplied with its tokens in passes of TILES · 8. The shared expert's items come first,
// since their weights are known before anything else is, and are one pass each, since it has every token.
struct Item {
    bool shared;
    int expert;      // unless shared
    int row;         // the first of 64
    int first, end;  // the expert's pairs in the list; all tokens, when shared
};

template <int TILES>
inline __device__ __host__ int shared_items(const ProductArguments &a) {
    return a.shared_rows ? static_cast<int>(a.shared_tiles.by) * ((a.tokens + TILES * 8 - 1) / (TILES * 8)) : 0;
}

// `shared`: how many items the shared expert has. ROWS: weight rows of an item.
template <int TILES, int ROWS = kTileRows>
DMOE_DEVICE Item item_at(const ProductArguments &a, const PairLists &lists, int index, int shared) {
    if (index < shared) {
        const int first = a.shared_tiles.quotient(index) * TILES * 8;
        return {true, 0, a.shared_tiles.remainder(index) * ROWS, first, min(first + TILES * 8, a.tokens)};
    }
    const int expert = lists.active[a.tiles.quotient(index - shared)];
    return {false, expert, a.tiles.remainder(index - shared) * ROWS, lists.first(expert), lists.end(expert)};
}

// A place in the block's sequence of stages. Few registers: the item itself is looked up where a pass starts or ends.
struct Cursor {
    int index;  // of the item
    int pair;   // the first one of the pass
    int at;     // of k
};

}  // namespace dmoe
