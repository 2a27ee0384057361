// How a stage of the ring is filled: asynchronous copies of weight rows, of tokens and of scales, by all threads.
#pragma once

#include "experts_items.cuh"

namespace dmoe {

// What a thread copies, at a cursor that runs ahead of the products. Weights are BITS wide, the shared expert's 16.
template <int BITS, int TILES, bool GATE>
struct Feeder {
    static constexpr int kRows = TILES * kChunk<BITS> / 256;  // of tokens, that a thread copies a unit of, at most

    Cursor cursor;
    const char *weights;        // of the thread's first row, from its unit on
    int64_t weight_pitch;       // bytes from one of the thread's rows to its next
    const uint16_t *scales;     // of the item's first row
    const uint4 *inputs[kRows]; // of the thread's rows of tokens, from its unit on; null: no token

    static DMOE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }

    DMOE_DEVICE bool plain() const { return BITS == 16 || cursor.item.expert == kSharedExpert; }

    // At the start of item `index`.
    DMOE_DEVICE void open(const ProductArguments &a, const PairLists &lists, int index, int shared) {
        cursor = {item_at<TILES>(a, lists, index, shared), index, 0};
        plain() ? find_rows<16>(a) : find_rows<BITS>(a);
    }

    // The one place where an expert's weights are looked up: in the pool, among all experts, or the shared one's.
    template <int WIDTH>
    DMOE_DEVICE void find_rows(const ProductArguments &a) {
        constexpr int kEvery = kProductThreads / kWeightUnits<WIDTH>;
        const int row = cursor.item.row + thread() / kWeightUnits<WIDTH>, unit = thread() % kWeightUnits<WIDTH>;
        if (cursor.item.expert == kSharedExpert) {
            // Gate rows, then up rows: here they take turns.
            const int64_t pitch = static_cast<int64_t>(a.shared_depth) * 2;
            const int64_t index = GATE ? row / 2 + row % 2 * (a.shared_rows / 2) : row;
            weights = static_cast<const char *>(a.shared_weights) + index * pitch + unit * 16;
            weight_pitch = pitch * kEvery / (GATE ? 2 : 1);
            return;
        }
        const int expert = cursor.item.expert, slot = a.slot_of_expert ? a.slot_of_expert[expert] : -1;
        const bool pooled = slot >= 0 && slot < a.slots;
        const Matrices &from = pooled ? a.pool : a.all;
        const int64_t number = pooled ? slot : expert, pitch = static_cast<int64_t>(a.depth / 8) * WIDTH;
        weights = static_cast<const char *>(from.weights) + (number * a.rows + row) * pitch + unit * 16;
        weight_pitch = pitch * kEvery;
        if constexpr (WIDTH != 16) {
            scales = from.scales + (number * a.rows + cursor.item.row) * (a.depth >> a.group_shift);
        }
    }

    // At the start of a pass: which tokens it has.
    DMOE_DEVICE void find_tokens(const ProductArguments &a, const PairLists &lists) {
        plain() ? find_tokens<16>(a, lists) : find_tokens<BITS>(a, lists);
    }
    template <int WIDTH>
    DMOE_DEVICE void find_tokens(const ProductArguments &a, const PairLists &lists) {
        constexpr int kEvery = kProductThreads / kTokenUnits<WIDTH>;
        const int unit = thread() % kTokenUnits<WIDTH>;
        const bool shared = cursor.item.expert == kSharedExpert;
        DMOE_UNROLL
        for (int i = 0; i < TILES * 8 / kEvery; ++i) {
            const int token = cursor.item.token + thread() / kTokenUnits<WIDTH> + i * kEvery;
            inputs[i] = nullptr;
            if (token >= cursor.item.end) continue;
            int row = token;
            if (!shared) row = lists.pairs[cursor.item.first + token];
            if (GATE && !shared) row /= a.places;
            inputs[i] = (shared ? a.shared_inputs : a.inputs) + static_cast<int64_t>(row) * (cursor.item.depth / kUnit) + unit;
        }
    }

    DMOE_DEVICE void fill_weights(const ProductArguments &a, char *stage) const {
        plain() ? fill_weights<16>(a, stage) : fill_weights<BITS>(a, stage);
    }
    template <int WIDTH>
    DMOE_DEVICE void fill_weights(const ProductArguments &a, char *stage) const {
        constexpr int kEvery = kProductThreads / kWeightUnits<WIDTH>, kUnitValues = 128 / WIDTH;
        const int row = thread() / kWeightUnits<WIDTH>, unit = thread() % kWeightUnits<WIDTH>;
        const int rows = (cursor.item.expert == kSharedExpert ? a.shared_rows : a.rows) - cursor.item.row;
        const bool within = cursor.at + unit * kUnitValues < cursor.item.depth;
        const char *from = weights + static_cast<int64_t>(cursor.at / 8) * WIDTH;
        DMOE_UNROLL
        for (int i = 0; i < kTileRows / kEvery; ++i, from += weight_pitch) {
            copy_async_16(stage + weight_place<WIDTH>(row + i * kEvery, unit), from, within && row + i * kEvery < rows);
        }
        if constexpr (WIDTH != 16) fill_scales<WIDTH>(a, stage, rows);
    }
    // Scales are copied in whole words, with what stands beside them: matrices have an even number of scales, so the
    // words are the matrix's own.
    template <int WIDTH>
    DMOE_DEVICE void fill_scales(const ProductArguments &a, char *stage, int rows) const {
        const int groups = a.depth >> a.group_shift, first = cursor.at >> a.group_shift;
        const int last = min(groups, (cursor.at + kChunk<WIDTH>) >> a.group_shift) - 1;
        DMOE_UNROLL
        for (int i = 0; i < (kTileRows * kScaleWords<WIDTH> + kProductThreads - 1) / kProductThreads; ++i) {
            const int row = (thread() + i * kProductThreads) / kScaleWords<WIDTH>;
            const int word = (thread() + i * kProductThreads) % kScaleWords<WIDTH>;
            const int64_t start = static_cast<int64_t>(row) * groups + first;
            if (row < min(rows, kTileRows) && start / 2 + word <= (start - first + last) / 2) {
                copy_async_4(stage + scale_place<WIDTH, TILES>(row, word), scales + (start / 2 + word) * 2, true);
            }
        }
    }

    DMOE_DEVICE void fill_tokens(char *stage) const { plain() ? fill_tokens<16>(stage) : fill_tokens<BITS>(stage); }
    template <int WIDTH>
    DMOE_DEVICE void fill_tokens(char *stage) const {
        constexpr int kEvery = kProductThreads / kTokenUnits<WIDTH>;
        const int row = thread() / kTokenUnits<WIDTH>, unit = thread() % kTokenUnits<WIDTH>;
        const bool within = cursor.at + unit * kUnit < cursor.item.depth;
        DMOE_UNROLL
        for (int i = 0; i < TILES * 8 / kEvery; ++i) {
            // Where there is no token, a column of a tile holds what it held; nobody looks at its products.
            if (inputs[i]) copy_async_16(stage + token_place<WIDTH>(row + i * kEvery, unit), inputs[i] + cursor.at / kUnit, within);
        }
    }

    // To the next chunk. `items`: how many there are; the block takes every `every`-th.
    DMOE_DEVICE void advance(const ProductArguments &a, const PairLists &lists, int items, int every, int shared) {
        cursor.at += plain() ? kChunk<16> : kChunk<BITS>;
        if (cursor.at < cursor.item.depth) return;
        cursor.at = 0;
        cursor.item.token += TILES * 8;
        if (cursor.item.token >= cursor.item.end) {
            cursor.index += every;
            if (cursor.index >= items) return;
            open(a, lists, cursor.index, shared);
        }
        find_tokens(a, lists);
    }
};

}  // namespace dmoe
