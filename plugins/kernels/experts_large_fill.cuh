// How a stage of experts_large.cuh is filled: 16-byte copies, a row of 64 bytes by four neighbouring threads.
#pragma once

#include "experts_items.cuh"
#include "experts_large_stage.cuh"

namespace dmoe {

struct LargeArguments : ProductArguments {
    int matrix_rows;  // of an expert; `rows` of them are multiplied here, from where the weights' pointers point on
};

// What a thread copies, at a cursor that runs ahead of the products; `cursor.at` is the stage in the pass (stage_after()).
// BITS: of the routed experts' weights; those of the shared expert have 16.
template <int BITS, bool GATE>
struct LargeFeeder {
    static constexpr int kApart = kProductThreads / kStepUnits;  // rows between two copies of a thread
    static constexpr int kBlockUnits = kBlockBytes / 16;

    Cursor cursor;
    int end;              // of the item's pairs
    int shared;           // items of the shared expert
    const char *weights;  // of the thread's first row, from its unit on
    int weight_pitch;     // bytes from one of the thread's rows to its next
    int rows;             // from the thread's first row to the matrix's last
    const char *scales;   // of the item's first row

    static DMOE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
    static DMOE_DEVICE int unit() { return thread() % kStepUnits; }
    static DMOE_DEVICE int place() { return thread() / kStepUnits; }
    DMOE_DEVICE bool plain() const { return BITS == 16 || cursor.index < shared; }
    DMOE_DEVICE bool wide() const { return BITS == 4 && !plain(); }
    DMOE_DEVICE int steps() const { return wide() ? 2 : 1; }  // of a stage
    DMOE_DEVICE int depth(const ProductArguments &a) const { return cursor.index < shared ? a.shared_depth : a.depth; }
    DMOE_DEVICE int stages(const ProductArguments &a) const { return stages_of(depth(a), wide()); }  // of a pass

    // At the start of an item.
    DMOE_DEVICE void open(const LargeArguments &a, const PairLists &lists, int index) {
        const Item item = item_at<kLargeTiles, kLargeRows>(a, lists, index, shared);
        cursor = {index, item.first, 0}, end = item.end;
        const int first = item.row + (plain() ? row_of_place(place()) : thread() / kBlockUnits * kBand);
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
        weight_pitch = pitch * kApart;  // of integers a thread has one band
        if constexpr (BITS != 16) {
            scales = reinterpret_cast<const char *>(from.scales) + (before + item.row) * (a.depth >> a.group_shift) * 2;
        }
    }

    DMOE_DEVICE void fill(const LargeArguments &a, const PairLists &lists, char *stage) const {
        if (plain()) {
            fill_rows(a, stage + kPlaneBytes);
        } else if constexpr (BITS != 16) {
            fill_bands(a, stage);
        }
        const bool listed = cursor.index >= shared;
        const int units = depth(a) / kUnit, first = cursor.at * steps() * kStepUnits + unit();
        char *const to = stage + large_place(place(), unit());
        DMOE_UNROLL
        for (int i = 0; i < kLargeTokens / kApart; ++i) {
            const int pair = cursor.pair + place() + i * kApart;
            if (pair >= end) continue;  // a column of a tile holds what it held; nobody looks at its products
            unsigned token = pair;
            if (listed) token = GATE ? a.places.quotient(lists.pairs[pair]) : lists.pairs[pair];
            const uint4 *const from = a.inputs + (token * units + (first + (listed ? 0 : a.shared_inputs)));
            DMOE_UNROLL
            for (int step = 0; step < kStepsOfBlock<BITS>; ++step) {
                if (step >= steps()) break;
                copy_async_16(to + step * kPlaneBytes + i * kApart * kStepUnits * 16, from + step * kStepUnits,
                              first + step * kStepUnits < units);
            }
        }
    }
    DMOE_DEVICE void fill_rows(const LargeArguments &a, char *to) const {
        const bool within = cursor.at * kStepUnits + unit() < depth(a) / kUnit;
        const char *from = weights + cursor.at * kStepUnits * 16;
        DMOE_UNROLL
        for (int i = 0; i < kLargeRows / kApart; ++i, from += weight_pitch) {
            copy_async_16(to + large_place(place(), unit()) + i * kApart * kStepUnits * 16, from, within && i * kApart < rows);
        }
    }
    // Whole bands: integers have a multiple of 32 rows. Behind the matrix's last one nothing is read, and nobody looks at the
    // products.
    DMOE_DEVICE void fill_bands(const LargeArguments &a, char *stage) const {
        static_assert(kProductThreads / kBlockUnits == kLargeRows / kBand, "a copy per thread");
        const int block = thread() % kBlockUnits, bytes = a.depth * 2 * BITS;  // of a band
        const bool within = cursor.at * kBlockBytes + block * 16 < bytes;
        copy_async_16(stage + kBlocksAt<BITS> + thread() * 16, weights + cursor.at * kBlockBytes, within && rows > 0);
        constexpr int kUnits = kBandScales / 16;  // of a group
        const int band = thread() / (2 * kUnits), part = thread() % (2 * kUnits), groups = a.depth >> a.group_shift;
        const int k = cursor.at * steps() * kStep, first = k >> a.group_shift;
        const int count = min(groups - first, max(1, steps() * kStep >> a.group_shift));
        if (band >= kLargeRows / kBand || part >= count * kUnits) return;
        const bool there = band * kBand < rows + thread() / kBlockUnits * kBand;
        copy_async_16(stage + large_scale_place<BITS>(band, 0) + part * 16,
                      scales + (band * groups + first) * kBandScales + part * 16, there);
    }

    // To the next stage. `items`: how many there are; the block takes every `every`-th.
    DMOE_DEVICE void advance(const LargeArguments &a, const PairLists &lists, int items, int every) {
        cursor.at = stage_after(cursor.at, stages(a));
        if (cursor.at < stages(a)) return;
        cursor.at = 0, cursor.pair += kLargeTokens;
        if (cursor.pair < end) return;
        cursor.index += every;
        if (cursor.index < items) open(a, lists, cursor.index);
    }
};

}  // namespace dmoe
