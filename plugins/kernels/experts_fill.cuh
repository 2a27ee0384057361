// How a stage of the ring is filled: asynchronous copies of weight rows, of tokens and of scales, by all threads.
#pragma once

#include "experts_items.cuh"

namespace dmoe {

// What a thread copies, at a cursor that runs ahead of the products. BITS: of the routed experts' weights; those of the
// shared expert have 16.
template <int BITS, int TILES, bool GATE>
struct Feeder {
    static constexpr int kMostRows = TILES * kTokenUnits<BITS> * 8 / kProductThreads;
    static constexpr unsigned kNoToken = ~0u;

    Cursor cursor;
    int shared;                  // items of the shared expert
    const char *weights;         // of the thread's first row, from its unit on
    int weight_pitch;            // bytes from one of the thread's rows to its next
    int rows;                    // of the item, or more
    const uint16_t *scales;      // of the item's first row
    unsigned inputs[kMostRows];  // units from a.inputs to the thread's unit of its tokens

    static DMOE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
    DMOE_DEVICE bool plain() const { return BITS == 16 || cursor.index < shared; }
    DMOE_DEVICE int depth(const ProductArguments &a) const { return cursor.index < shared ? a.shared_depth : a.depth; }
    DMOE_DEVICE int chunk() const { return plain() ? kChunk<16> : kChunk<BITS>; }

    // At the start of an item.
    DMOE_DEVICE void open(const ProductArguments &a, const PairLists &lists, int index) {
        const Item item = item_at<TILES>(a, lists, index, shared);
        cursor = {index, item.first, 0};
        plain() ? find_rows<16>(a, item) : find_rows<BITS>(a, item);
    }

    // The one place where an expert's weights are looked up: in the pool, among all experts, or the shared one's.
    template <int WIDTH>
    DMOE_DEVICE void find_rows(const ProductArguments &a, const Item &item) {
        constexpr int kEvery = kProductThreads / kWeightUnits<WIDTH>;
        const int row = item.row + thread() / kWeightUnits<WIDTH>, unit = thread() % kWeightUnits<WIDTH>;
        if (item.shared) {
            // Gate rows, then up rows: here they take turns.
            const int index = GATE ? row / 2 + row % 2 * (a.shared_rows / 2) : row;
            weights = static_cast<const char *>(a.shared_weights) + static_cast<int64_t>(index) * a.shared_depth * 2 + unit * 16;
            weight_pitch = a.shared_depth * 2 * kEvery / (GATE ? 2 : 1);
            rows = a.shared_rows - item.row;
            return;
        }
        const int slot = a.slot_of_expert ? a.slot_of_expert[item.expert] : -1;
        const bool pooled = slot >= 0 && slot < a.slots;
        const Matrices &from = pooled ? a.pool : a.all;
        const int64_t first = static_cast<int64_t>(pooled ? slot : item.expert) * a.rows;
        const int pitch = a.depth / 8 * WIDTH;
        weights = static_cast<const char *>(from.weights) + (first + row) * pitch + unit * 16;
        weight_pitch = pitch * kEvery;
        rows = a.rows - item.row;
        if constexpr (WIDTH != 16) scales = from.scales + (first + item.row) * (a.depth >> a.group_shift);
    }

    // At the start of a pass: which tokens it has.
    DMOE_DEVICE void find_tokens(const ProductArguments &a, const PairLists &lists, int end) {
        plain() ? find_tokens<16>(a, lists, end) : find_tokens<BITS>(a, lists, end);
    }
    template <int WIDTH>
    DMOE_DEVICE void find_tokens(const ProductArguments &a, const PairLists &lists, int end) {
        constexpr int kEvery = kProductThreads / kTokenUnits<WIDTH>;
        DMOE_UNROLL
        for (int i = 0; i < TILES * 8 / kEvery; ++i) {
            const int place = cursor.pair + thread() / kTokenUnits<WIDTH> + i * kEvery;
            unsigned row = place;
            if (cursor.index >= shared && place < end) row = GATE ? lists.pairs[place] / a.places : lists.pairs[place];
            inputs[i] = row * (depth(a) / kUnit) + thread() % kTokenUnits<WIDTH> + (cursor.index < shared ? a.shared_inputs : 0);
            if (place >= end) inputs[i] = kNoToken;
        }
    }

    DMOE_DEVICE void fill_weights(const ProductArguments &a, char *stage) const {
        plain() ? fill_weights<16>(a, stage) : fill_weights<BITS>(a, stage);
    }
    template <int WIDTH>
    DMOE_DEVICE void fill_weights(const ProductArguments &a, char *stage) const {
        constexpr int kEvery = kProductThreads / kWeightUnits<WIDTH>;  // a multiple of 16, so places are that far apart
        const int row = thread() / kWeightUnits<WIDTH>, unit = thread() % kWeightUnits<WIDTH>;
        const bool within = cursor.at + unit * (128 / WIDTH) < depth(a);
        const char *from = weights + cursor.at / 8 * WIDTH;
        char *to = stage + weight_place<WIDTH>(row, unit);
        DMOE_UNROLL
        for (int i = 0; i < kTileRows / kEvery; ++i) {
            copy_async_16(to, from, within && row + i * kEvery < rows);
            from += weight_pitch, to += kEvery * kWeightUnits<WIDTH> * 16;
        }
        if constexpr (WIDTH != 16) fill_scales<WIDTH>(a, stage);
    }
    // Scales are copied in whole words, with what stands beside them: matrices have an even number of scales, so the
    // words are the matrix's own.
    template <int WIDTH>
    DMOE_DEVICE void fill_scales(const ProductArguments &a, char *stage) const {
        const int groups = a.depth >> a.group_shift, first = cursor.at >> a.group_shift;
        const int last = min(groups, (cursor.at + kChunk<WIDTH>) >> a.group_shift) - 1;
        DMOE_UNROLL
        for (int i = 0; i < (kTileRows * kScaleWords<WIDTH> + kProductThreads - 1) / kProductThreads; ++i) {
            const int row = (thread() + i * kProductThreads) / kScaleWords<WIDTH>;
            const int word = (thread() + i * kProductThreads) % kScaleWords<WIDTH> + (row * groups + first) / 2;
            if (row < min(rows, kTileRows) && word <= (row * groups + last) / 2) {
                copy_async_4(stage + scale_place<WIDTH, TILES>(row, word - (row * groups + first) / 2), scales + word * 2, true);
            }
        }
    }

    DMOE_DEVICE void fill_tokens(const ProductArguments &a, char *stage) const {
        plain() ? fill_tokens<16>(a, stage) : fill_tokens<BITS>(a, stage);
    }
    template <int WIDTH>
    DMOE_DEVICE void fill_tokens(const ProductArguments &a, char *stage) const {
        constexpr int kEvery = kProductThreads / kTokenUnits<WIDTH>;  // a multiple of 8
        const int row = thread() / kTokenUnits<WIDTH>, unit = thread() % kTokenUnits<WIDTH>;
        const bool within = cursor.at + unit * kUnit < depth(a);
        char *const to = stage + token_place<WIDTH>(row, unit);
        DMOE_UNROLL
        for (int i = 0; i < TILES * 8 / kEvery; ++i) {
            // Where there is no token, a column of a tile holds what it held; nobody looks at its products.
            if (inputs[i] == kNoToken) continue;
            copy_async_16(to + i * kEvery * kTokenUnits<WIDTH> * 16, a.inputs + inputs[i] + cursor.at / kUnit, within);
        }
    }

    // To the next stage. `items`: how many there are; the block takes every `every`-th.
    DMOE_DEVICE void advance(const ProductArguments &a, const PairLists &lists, int items, int every) {
        cursor.at += chunk();
        if (cursor.at < depth(a)) return;
        int end = item_at<TILES>(a, lists, cursor.index, shared).end;
        cursor.at = 0, cursor.pair += TILES * 8;
        if (cursor.pair >= end) {
            cursor.index += every;
            if (cursor.index >= items) return;
            open(a, lists, cursor.index);
            end = item_at<TILES>(a, lists, cursor.index, shared).end;
        }
        find_tokens(a, lists, end);
    }
};

}  // namespace dmoe
