// How a stage of the ring is filled: asynchronous copies of weight rows, of tokens and of scales, by all threads; of
// integers and their scales bulk copies by one thread, where the device has them.
#pragma once

#include "experts_items.cuh"

namespace dmoe {

// What a thread copies, at a cursor that runs ahead of the products. BITS: of the routed experts' weights; those of the
// shared expert have 16.
template <int BITS, int TILES, bool GATE>
struct Feeder {
    static constexpr int kThreads = 16;  // that copy a token together, every sixteenth unit each
    static constexpr int kEvery = kProductThreads / kThreads, kTokens = TILES * 8 / kEvery;
    static constexpr unsigned kNoToken = ~0u;

    Cursor cursor;
    int end;                     // of the item's pairs
    int shared;                  // items of the shared expert
    const char *weights;         // the thread's first unit at k = 0; bulk copies: the item's first band
    int weight_pitch;            // bytes from one of the thread's units, or of the bands, to the next
    int rows;                    // from the thread's, or the item's, first row to the matrix's last
    int weights_to, inputs_to;   // where the thread's first units go in a stage
    const char *scales;          // the thread's unit of scales at k = 0; bulk copies: the item's first
    bool has_scales;
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

    // Which unit the thread copies, of how many: of a row, or of a band of integers; and of how many rows later its next
    // one is.
    template <int WIDTH>
    static constexpr int kUnits = WIDTH == 16 ? kWeightUnits<16> : kBlocks<WIDTH> * kBlockBytes / 16;
    template <int WIDTH>
    static constexpr int kApart = kProductThreads / kUnits<WIDTH> * (WIDTH == 16 ? 1 : kBand);
    static constexpr int kScaleUnits = BITS == 16 ? 1 : kScaleBytes<BITS> / 16;  // of a band

    // The one place where an expert's weights are looked up: in the pool, among all experts, or the shared one's.
    template <int WIDTH>
    DMOE_DEVICE void find_rows(const ProductArguments &a, const Item &item) {
        const int part = thread() / kUnits<WIDTH>, unit = thread() % kUnits<WIDTH>;
        const int row = item.row + part * (WIDTH == 16 ? 1 : kBand);
        rows = (item.shared ? a.shared_rows : a.rows) - row;
        weights_to = WIDTH == 16 ? weight_place(part, unit) : thread() * 16;
        inputs_to = token_place<WIDTH>(thread() / kThreads, thread() % kThreads);
        if (item.shared) {
            // Gate rows, then up rows: here they take turns.
            const int index = GATE ? row / 2 + row % 2 * (a.shared_rows / 2) : row;
            weights = static_cast<const char *>(a.shared_weights) + static_cast<int64_t>(index) * a.shared_depth * 2 + unit * 16;
            weight_pitch = a.shared_depth * 2 * kApart<16> / (GATE ? 2 : 1);
            return;
        }
        const int slot = a.slot_of_expert ? a.slot_of_expert[item.expert] : -1;
        const bool pooled = slot >= 0 && slot < a.slots;
        const Matrices &from = pooled ? a.pool : a.all;
        const int64_t first = static_cast<int64_t>(pooled ? slot : item.expert) * a.rows;
        const int pitch = a.depth / 8 * WIDTH;  // a band is as long as its rows together
        weights = static_cast<const char *>(from.weights) + (first + row) * pitch + unit * 16;
        weight_pitch = pitch * kApart<WIDTH>;
        if constexpr (WIDTH != 16) {
            const int groups = a.depth >> a.group_shift;
            if (has_bulk_copies()) {
                rows = a.rows - item.row;
                weights = static_cast<const char *>(from.weights) + (first + item.row) * pitch;
                weight_pitch = pitch * kBand;
                scales = reinterpret_cast<const char *>(from.scales) + (first + item.row) * groups * 2;
                return;
            }
            const int row_of_scales = item.row + thread() / kScaleUnits * kBand;
            has_scales = thread() < kTileRows / kBand * kScaleUnits && row_of_scales < a.rows;
            scales = reinterpret_cast<const char *>(from.scales) + (first + row_of_scales) * groups * 2 + thread() % kScaleUnits * 16;
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

    // slot: of the stage; its warp asks for bulk copies, so that all have their turn. barrier: of the stage, for those.
    DMOE_DEVICE void fill_weights(const ProductArguments &a, char *stage, int slot, Arrivals barrier) const {
        if (plain()) return fill_weights<16>(a, stage);
        if constexpr (BITS != 16) {
            if (!has_bulk_copies()) return fill_weights<BITS>(a, stage);
            if (warp_id() == slot && elected()) fill_bands(a, stage, barrier);
        }
    }
    DMOE_DEVICE void fill_bands(const ProductArguments &a, char *stage, Arrivals barrier) const {
        const int k = min(kChunk<BITS>, a.depth - cursor.at), groups = k >> a.group_shift;
        const int bands = min(kTileRows, rows) / kBand, scale_pitch = (a.depth >> a.group_shift) * kBandScales;
        const char *from = weights + cursor.at * kBandBytes<BITS>;
        const char *from_scales = scales + (cursor.at >> a.group_shift) * kBandScales;
        fence_bulk_copies();
        expect_bytes(barrier, bands * (k * kBandBytes<BITS> + groups * kBandScales));
        DMOE_UNROLL
        for (int band = 0; band < kTileRows / kBand; ++band, from += weight_pitch, from_scales += scale_pitch) {
            if (band >= bands) break;
            copy_bulk(stage + block_place<BITS>(band, 0), from, k * kBandBytes<BITS>, barrier);
            copy_bulk(stage + scale_place<BITS, TILES>(band, 0), from_scales, groups * kBandScales, barrier);
        }
    }
    template <int WIDTH>
    DMOE_DEVICE void fill_weights(const ProductArguments &a, char *stage) const {
        constexpr int kOfUnit = 128 / WIDTH / (WIDTH == 16 ? 1 : kBand);  // values of k
        const unsigned at = cursor.at, unit = thread() % kUnits<WIDTH>;
        const bool within = at + unit * kOfUnit < static_cast<unsigned>(depth(a));
        const char *from = weights + at * (16 / kOfUnit);
        DMOE_UNROLL
        for (int i = 0; i < kTileRows / kApart<WIDTH>; ++i, from += weight_pitch) {
            copy_async_16(stage + weights_to + i * kProductThreads * 16, from, within && i * kApart<WIDTH> < rows);
        }
        if constexpr (WIDTH != 16) fill_scales(a, stage);
    }
    DMOE_DEVICE void fill_scales(const ProductArguments &a, char *stage) const {
        const int first = cursor.at >> a.group_shift, unit = thread() % kScaleUnits;
        const int groups = min(a.depth >> a.group_shift, first + (kChunk<BITS> >> a.group_shift)) - first;
        if (!has_scales || unit * 16 >= groups * kBandScales) return;
        copy_async_16(stage + kScalesAt<BITS, TILES> + thread() * 16, scales + first * kBandScales, true);
    }

    DMOE_DEVICE void fill_tokens(const ProductArguments &a, char *stage) const {
        plain() ? fill_tokens<16>(a, stage) : fill_tokens<BITS>(a, stage);
    }
    template <int WIDTH>
    DMOE_DEVICE void fill_tokens(const ProductArguments &a, char *stage) const {
        const unsigned at = cursor.at, unit = thread() % kThreads, units = depth(a) / kUnit;
        DMOE_UNROLL
        for (int i = 0; i < kTokens; ++i) {
            DMOE_UNROLL
            for (int u = 0; u < kTokenUnits<WIDTH>; u += kThreads) {
                // Where there is no token, a column of a tile holds what it held; nobody looks at its products.
                copy_async_16(stage + inputs_to + (i * kEvery * kTokenUnits<WIDTH> + u) * 16,
                              a.inputs + (inputs[i] + at / kUnit) + u, at / kUnit + unit + u < units, inputs[i] != kNoToken);
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
