// How a stage of experts_large.cuh is filled: 16-byte copies, a line of a row by eight neighbouring threads.
#pragma once

#include "experts_items.cuh"
#include "experts_large_stage.cuh"

namespace dmoe {

struct LargeArguments : ProductArguments {
    int matrix_rows;  // of an expert; `rows` of them are multiplied here, from where the weights' pointers point on
};

DMOE_DEVICE int lines_of(int depth) { return (depth + kLine - 1) / kLine; }

// What a thread copies, at a cursor that runs ahead of the products; `cursor.at` counts the stages of a pass.
template <bool GATE>
struct LargeFeeder {
    static constexpr int kApart = kProductThreads / kLineUnits;  // rows between two copies of a thread

    Cursor cursor;
    int end;              // of the item's pairs
    int shared;           // items of the shared expert
    const char *weights;  // of the thread's first row, from its unit on
    int weight_pitch;     // bytes from one of the thread's rows to its next
    int rows;             // from the thread's first row to the matrix's last

    static DMOE_DEVICE int unit() { return static_cast<int>(threadIdx.x) % kLineUnits; }
    static DMOE_DEVICE int row() { return static_cast<int>(threadIdx.x) / kLineUnits; }
    DMOE_DEVICE int depth(const ProductArguments &a) const { return cursor.index < shared ? a.shared_depth : a.depth; }

    // At the start of an item.
    DMOE_DEVICE void open(const LargeArguments &a, const PairLists &lists, int index) {
        const Item item = item_at<kLargeTiles, kLargeRows>(a, lists, index, shared);
        cursor = {index, item.first, 0}, end = item.end;
        const int first = item.row + row();
        if (item.shared) {
            rows = a.shared_rows - first;
            // Gate rows, then up rows: here they take turns.
            const int from = GATE ? first / 2 + first % 2 * (a.shared_rows / 2) : first;
            weights = static_cast<const char *>(a.shared_weights) + static_cast<int64_t>(from) * a.shared_depth * 2 + unit() * 16;
            weight_pitch = a.shared_depth * 2 * kApart / (GATE ? 2 : 1);
            return;
        }
        rows = a.rows - first;
        const int slot = a.slot_of_expert ? a.slot_of_expert[item.expert] : -1;
        const bool pooled = slot >= 0 && slot < a.slots;
        const int64_t from = static_cast<int64_t>(pooled ? slot : item.expert) * a.matrix_rows + first;
        weights = static_cast<const char *>(pooled ? a.pool.weights : a.all.weights) + from * a.depth * 2 + unit() * 16;
        weight_pitch = a.depth * 2 * kApart;
    }

    DMOE_DEVICE void fill(const LargeArguments &a, const PairLists &lists, char *stage) const {
        const bool listed = cursor.index >= shared;
        const int units = depth(a) / 8, line = line_at(cursor.at, lines_of(depth(a)));
        const bool within = line * kLineUnits + unit() < units;
        const char *from = weights + line * kLineUnits * 16;
        char *to = stage + large_weight_place(row(), unit());
        DMOE_UNROLL
        for (int i = 0; i < kLargeRows / kApart; ++i, from += weight_pitch) {
            copy_async_16(to + i * kApart * kLineUnits * 16, from, within && i * kApart < rows);
        }
        to = stage + large_token_place(row(), unit());
        const unsigned before = line * kLineUnits + unit() + (listed ? 0 : a.shared_inputs);
        DMOE_UNROLL
        for (int i = 0; i < kLargeTokens / kApart; ++i) {
            const int place = cursor.pair + row() + i * kApart;
            if (place >= end) continue;  // a column of a tile holds what it held; nobody looks at its products
            unsigned token = place;
            if (listed) token = GATE ? a.places.quotient(lists.pairs[place]) : lists.pairs[place];
            copy_async_16(to + i * kApart * kLineUnits * 16, a.inputs + (token * units + before), within);
        }
    }

    // To the next stage. `items`: how many there are; the block takes every `every`-th.
    DMOE_DEVICE void advance(const LargeArguments &a, const PairLists &lists, int items, int every) {
        if (++cursor.at < lines_of(depth(a))) return;
        cursor.at = 0, cursor.pair += kLargeTokens;
        if (cursor.pair < end) return;
        cursor.index += every;
        if (cursor.index < items) open(a, lists, cursor.index);
    }
};

}  // namespace dmoe
