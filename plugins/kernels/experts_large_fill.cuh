// How a stage of experts_large.cuh is filled: 16-byte copies, a line of a row by eight neighbouring threads.
#pragma once

#include "experts_items.cuh"
#include "experts_large_stage.cuh"

namespace dmoe {

struct LargeArguments : ProductArguments {
    int matrix_rows;  // of an expert; `rows` of them are multiplied here, from where the weights' pointers point on
};

// What a thread copies, at a cursor that runs ahead of the products; `cursor.at` counts the stages of a pass. BITS: of the
// routed experts' weights; those of the shared expert have 16.
template <int BITS, bool GATE>
struct LargeFeeder {
    static constexpr int kApart = kProductThreads / kLineUnits;  // rows between two copies of a thread
    static constexpr int kBlockUnits = kLineBlocks<BITS> * kBlockBytes / 16;  // of a band, in a line
    static constexpr int kOfUnit = kLine / kBlockUnits;          // values of k in one

    Cursor cursor;
    int end;              // of the item's pairs
    int shared;           // items of the shared expert
    const char *weights;  // of the thread's first row, from its unit on
    int weight_pitch;     // bytes from one of the thread's rows to its next
    int rows;             // from the thread's first row to the matrix's last
    const char *scales;   // of the item's first row

    static DMOE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
    static DMOE_DEVICE int unit() { return thread() % kLineUnits; }
    static DMOE_DEVICE int row() { return thread() / kLineUnits; }
    DMOE_DEVICE bool plain() const { return BITS == 16 || cursor.index < shared; }
    DMOE_DEVICE int depth(const ProductArguments &a) const { return cursor.index < shared ? a.shared_depth : a.depth; }

    // At the start of an item.
    DMOE_DEVICE void open(const LargeArguments &a, const PairLists &lists, int index) {
        const Item item = item_at<kLargeTiles, kLargeRows>(a, lists, index, shared);
        cursor = {index, item.first, 0}, end = item.end;
        const int first = item.row + (plain() ? row() : thread() / kBlockUnits * kBand);
        rows = (item.shared ? a.shared_rows : a.rows) - first;
        if (item.shared) {
            // Gate rows, then up rows: here they take turns.
            const int from = GATE ? first / 2 + first % 2 * (a.shared_rows / 2) : first;
            weights = static_cast<const char *>(a.shared_weights) + static_cast<int64_t>(from) * a.shared_depth * 2 + unit() * 16;
            weight_pitch = a.shared_depth * 2 * kApart / (GATE ? 2 : 1);
            return;
        }
        const int slot = a.slot_of_expert ? a.slot_of_expert[item.expert] : -1;
        const bool pooled = slot >= 0 && slot < a.slots;
        const Matrices &from = pooled ? a.pool : a.all;
        const int64_t before = static_cast<int64_t>(pooled ? slot : item.expert) * a.matrix_rows;
        const int pitch = a.depth / 8 * BITS;  // a band is as long as its rows together
        weights = static_cast<const char *>(from.weights) + (before + first) * pitch;
        weights += (BITS == 16 ? unit() : thread() % kBlockUnits) * 16;
        weight_pitch = BITS == 16 ? pitch * kApart : pitch * (kProductThreads / kBlockUnits * kBand);
        if constexpr (BITS != 16) {
            scales = reinterpret_cast<const char *>(from.scales) + (before + item.row) * (a.depth >> a.group_shift) * 2;
        }
    }

    DMOE_DEVICE void fill(const LargeArguments &a, const PairLists &lists, char *stage) const {
        const int units = depth(a) / kUnit, line = line_at(cursor.at, lines_of(depth(a)), BITS == 4 && !plain());
        const bool within = line * kLineUnits + unit() < units;
        if (plain()) {
            fill_rows(stage + large_weight_place(row(), unit()), line, within);
        } else if constexpr (BITS != 16) {
            fill_bands(a, stage, line);
        }
        const bool listed = cursor.index >= shared;
        char *const to = stage + large_token_place(row(), unit());
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
    DMOE_DEVICE void fill_rows(char *to, int line, bool within) const {
        const char *from = weights + line * kLineUnits * 16;
        DMOE_UNROLL
        for (int i = 0; i < kLargeRows / kApart; ++i, from += weight_pitch) {
            copy_async_16(to + i * kApart * kLineUnits * 16, from, within && i * kApart < rows);
        }
    }
    // Whole bands: integers have a multiple of 32 rows.
    DMOE_DEVICE void fill_bands(const LargeArguments &a, char *stage, int line) const {
        constexpr int kBands = kProductThreads / kBlockUnits;  // that the thread block copies at once
        const bool within = line * kLine + thread() % kBlockUnits * kOfUnit < a.depth;
        const char *from = weights + line * kBlockUnits * 16;
        DMOE_UNROLL
        for (int i = 0; i < kLargeRows / kBand / kBands; ++i, from += weight_pitch) {
            copy_async_16(stage + (thread() + i * kProductThreads) * 16, from, within && i * kBands * kBand < rows);
        }
        constexpr int kUnits = kBandScales / 16;  // of a group
        const int band = thread() / (2 * kUnits), part = thread() % (2 * kUnits), groups = a.depth >> a.group_shift;
        const int first = line * kLine >> a.group_shift, count = min(groups - first, max(1, kLine >> a.group_shift));
        if (band >= kLargeRows / kBand || part >= count * kUnits) return;
        // Behind the matrix's last row nothing is read, and nobody looks at the products.
        const bool there = band * kBand < rows + thread() / kBlockUnits * kBand;
        copy_async_16(stage + large_scale_place<BITS>(band, 0) + part * 16,
                      scales + (band * groups + first) * kBandScales + part * 16, there);
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
