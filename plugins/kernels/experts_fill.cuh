// How a stage of the ring is filled: asynchronous copies of weight rows, of tokens and of scales, by all threads.
#pragma once

#include "experts_items.cuh"

namespace dmoe {

// What a thread copies, at a cursor that runs ahead of the products. BITS: of the routed experts' weights; those of the
// shared expert have 16.
template <int BITS, int TILES, bool GATE>
struct Feeder {
    static constexpr int kThreads = 16;  // that copy a token together, every sixteenth unit each
    static constexpr int kEvery = kProductThreads / kThreads, kTokens = TILES * 8 / kEvery;
    static constexpr int kScaleThreads = kProductThreads / kTileRows;  // that copy the scales of a row together
    static constexpr unsigned kNoToken = ~0u;

    Cursor cursor;
    int end;                     // of the item's pairs
    int shared;                  // items of the shared expert
    const char *weights;         // of the thread's first row, from its unit on
    int weight_pitch;            // bytes from one of the thread's rows to its next
    int rows;                    // from the thread's first row to the matrix's last
    int weights_to, inputs_to;   // where the thread's first units go in a stage
    const uint16_t *scales;      // of the item's first row
    int scales_before;           // from there to those of the thread's row; negative: it has no row
    unsigned inputs[kTokens];    // units from a.inputs to the thread's first unit of its tokens

    static DMOE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
    DMOE_DEVICE bool plain() const { return BITS == 16 || cursor.index < shared; }
    DMOE_DEVICE int depth(const ProductArguments &a) const { return cursor.index < shared ? a.shared_depth : a.depth; }
    DMOE_DEVICE int chunk() const { return plain() ? kChunk<16> : kChunk<BITS>; }

    // At the start of an item.
    DMOE_DEVICE void open(const ProductArguments &a, const PairLists &lists, int index) {
        const Item item = item_at<TILES>(a, lists, index, shared);
        cursor = {index, item.first, 0}, end = item.end;
        plain() ? find_rows<16>(a, item) : find_rows<BITS>(a, item);
    }

    // The one place where an expert's weights are looked up: in the pool, among all experts, or the shared one's.
    template <int WIDTH>
    DMOE_DEVICE void find_rows(const ProductArguments &a, const Item &item) {
        constexpr int kApart = kProductThreads / kWeightUnits<WIDTH>;
        const int row = item.row + thread() / kWeightUnits<WIDTH>, unit = thread() % kWeightUnits<WIDTH>;
        rows = (item.shared ? a.shared_rows : a.rows) - row;
        weights_to = weight_place<WIDTH>(row - item.row, unit);
        inputs_to = token_place<WIDTH>(thread() / kThreads, thread() % kThreads);
        if (item.shared) {
            // Gate rows, then up rows: here they take turns.
            const int index = GATE ? row / 2 + row % 2 * (a.shared_rows / 2) : row;
            weights = static_cast<const char *>(a.shared_weights) + static_cast<int64_t>(index) * a.shared_depth * 2 + unit * 16;
            weight_pitch = a.shared_depth * 2 * kApart / (GATE ? 2 : 1);
            return;
        }
        const int slot = a.slot_of_expert ? a.slot_of_expert[item.expert] : -1;
        const bool pooled = slot >= 0 && slot < a.slots;
        const Matrices &from = pooled ? a.pool : a.all;
        const int64_t first = static_cast<int64_t>(pooled ? slot : item.expert) * a.rows;
        const int pitch = a.depth / 8 * WIDTH;
        weights = static_cast<const char *>(from.weights) + (first + row) * pitch + unit * 16;
        weight_pitch = pitch * kApart;
        if constexpr (WIDTH != 16) {
            const int groups = a.depth >> a.group_shift;
            scales = from.scales + (first + item.row) * groups;
            scales_before = item.row + thread() / kScaleThreads < a.rows ? thread() / kScaleThreads * groups : -1;
        }
    }

    // At the start of a pass: which tokens it has.
    DMOE_DEVICE void find_tokens(const ProductArguments &a, const PairLists &lists) {
        const bool listed = cursor.index >= shared;
        DMOE_UNROLL
        for (int i = 0; i < kTokens; ++i) {
            const int place = cursor.pair + thread() / kThreads + i * kEvery;
            unsigned row = place;
            if (listed && place < end) row = GATE ? a.places.quotient(lists.pairs[place]) : lists.pairs[place];
            inputs[i] = row * (depth(a) / kUnit) + thread() % kThreads + (listed ? 0 : a.shared_inputs);
            if (place >= end) inputs[i] = kNoToken;
        }
    }

    DMOE_DEVICE void fill_weights(const ProductArguments &a, char *stage) const {
        plain() ? fill_weights<16>(a, stage) : fill_weights<BITS>(a, stage);
    }
    template <int WIDTH>
    DMOE_DEVICE void fill_weights(const ProductArguments &a, char *stage) const {
        constexpr int kApart = kProductThreads / kWeightUnits<WIDTH>;  // a multiple of 16: one order of units
        const unsigned at = cursor.at, unit = thread() % kWeightUnits<WIDTH>;
        const bool within = at + unit * (128 / WIDTH) < static_cast<unsigned>(depth(a));
        const char *from = weights + at * WIDTH / 8;
        DMOE_UNROLL
        for (int i = 0; i < kTileRows / kApart; ++i, from += weight_pitch) {
            copy_async_16(stage + weights_to + i * kApart * kWeightUnits<WIDTH> * 16, from, within && i * kApart < rows);
        }
        if constexpr (WIDTH != 16) fill_scales<WIDTH>(a, stage);
    }
    // Scales are copied in whole words, with what stands beside them: matrices have an even number of scales, so the
    // words are the matrix's own.
    template <int WIDTH>
    DMOE_DEVICE void fill_scales(const ProductArguments &a, char *stage) const {
        if (scales_before < 0) return;
        const unsigned groups = a.depth >> a.group_shift, first = cursor.at >> a.group_shift;
        const unsigned beyond = min(groups, first + (kChunk<WIDTH> >> a.group_shift));
        const unsigned word = (scales_before + first) / 2, last = (scales_before + beyond - 1) / 2;
        const int row = thread() / kScaleThreads, w = thread() % kScaleThreads;
        char *const to = stage + scale_place<WIDTH, TILES>(row, w);
        if (w < kScaleWords<WIDTH> && word + w <= last) copy_async_4(to, scales + (word + w) * 2, true);
        if (word + kScaleThreads <= last && w == 0) copy_async_4(to + kScaleThreads * 4, scales + (word + kScaleThreads) * 2, true);
    }

    DMOE_DEVICE void fill_tokens(const ProductArguments &a, char *stage) const {
        plain() ? fill_tokens<16>(a, stage) : fill_tokens<BITS>(a, stage);
    }
    template <int WIDTH>
    DMOE_DEVICE void fill_tokens(const ProductArguments &a, char *stage) const {
        const unsigned at = cursor.at, unit = thread() % kThreads, units = depth(a) / kUnit;
        DMOE_UNROLL
        for (int i = 0; i < kTokens; ++i) {
            // Where there is no token, a column of a tile holds what it held; nobody looks at its products.
            if (inputs[i] == kNoToken) continue;
            DMOE_UNROLL
            for (int u = 0; u < kTokenUnits<WIDTH>; u += kThreads) {
                copy_async_16(stage + inputs_to + (i * kEvery * kTokenUnits<WIDTH> + u) * 16,
                              a.inputs + (inputs[i] + at / kUnit) + u, at / kUnit + unit + u < units);
            }
        }
    }

    // To the next stage. `items`: how many there are; the block takes every `every`-th.
    DMOE_DEVICE void advance(const ProductArguments &a, const PairLists &lists, int items, int every) {
        cursor.at += chunk();
        if (cursor.at < depth(a)) return;
        cursor.at = 0, cursor.pair += TILES * 8;
        if (cursor.pair >= end) {
            cursor.index += every;
            if (cursor.index >= items) return;
            open(a, lists, cursor.index);
        }
        find_tokens(a, lists);
    }
};

}  // namespace dmoe
