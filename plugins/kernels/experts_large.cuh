// The two products for many tokens: 128 weight rows times 128 tokens per pass, bound by arithmetic.
//
// Each sum is added in the order of experts_product.cuh, so both kernels give the same bits: there the steps of 32 k (of 4
// bits: two neighbours) with the same index mod 4 are a warp, here one warp has all four and goes through k in two halves,
// first 0 and 1 mod 4, then 2 and 3. README.md has the counts.
#pragma once

#include "experts_large_fill.cuh"
#include "experts_large_multiply.cuh"
#include "experts_product.cuh"

namespace dmoe {

// What `use` does for every sum of a warp.
template <class Use>
DMOE_DEVICE void for_each_sum(const Use &use) {
    DMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
        DMOE_UNROLL
        for (int j = 0; j < kWarpTiles; ++j) {
            DMOE_UNROLL
            for (int i = 0; i < 4; ++i) use(half, j, i);
        }
    }
}

template <class Half, bool GATE>
DMOE_DEVICE void write_large(const LargeArguments &a, const PairLists &lists, const Item &item, const LargeSums &sums, int pair) {
    const int g = lane_id() / 4, q = lane_id() % 4, rows = item.shared ? a.shared_rows : a.rows;
    DMOE_UNROLL
    for (int j = 0; j < kWarpTiles; ++j) {
        DMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int place = pair + large_column() + j * 8 + 2 * q + i;
            if (place >= item.end) continue;
            const Target<GATE> to(a, lists, item, place);
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = item.row + large_row() + half * 16 + 2 * g;
                if (row < rows) to.template write<Half>(row, sums[half][j][i], sums[half][j][2 + i]);
            }
        }
    }
}

// BITS: of the routed experts' weights.
template <class Half, int BITS, bool GATE>
__global__ void __launch_bounds__(kProductThreads, 1) large_product_kernel(LargeArguments a) {
    if (!has_async_copies()) return;  // 7.5 has no room for the ring (large_stages()), so it needs no code
    DMOE_DYNAMIC_SHARED(char, memory);
    const PairLists lists = lists_at(memory + a.stages * kLargeStageBytes, a.experts);
    const int every = static_cast<int>(gridDim.x), start = static_cast<int>(blockIdx.x);
    const auto next = [&](int slot) { return slot + 1 == a.stages ? 0 : slot + 1; };

    wait_for_predecessor();
    let_successor_start();
    LargeFeeder<BITS, GATE> feeder;
    feeder.shared = shared_items<kLargeTiles>(a);
    const int items =
        feeder.shared + group_pairs(lists, a.expert_ids, pair_count(a), a.experts) * static_cast<int>(a.tiles.by);
    if (start >= items) return;
    feeder.open(a, lists, start);
    Cursor cursor = feeder.cursor;
    int tiles = (feeder.end - cursor.pair - large_column() + 7) / 8;  // of the warp in this pass; more than it has: all

    LargeSums sums[2] = {}, first;  // first: what the first lines gave
    int slot = 0, empty = 0;
    for (int step = 1 - a.stages;; ++step) {
        if (step >= 0) {
            wait_for_stage(a.stages);
            __syncthreads();  // everybody's copies have arrived, and everybody is done with the stage before
        }
        if (feeder.cursor.index < items) {
            feeder.fill(a, lists, memory + empty * kLargeStageBytes);
            feeder.advance(a, lists, items, every);
        }
        commit_copies();
        empty = next(empty);
        if (step < 0) continue;
        const bool plain = BITS == 16 || cursor.index < feeder.shared, pairs = BITS == 4 && !plain;
        const int depth = cursor.index < feeder.shared ? a.shared_depth : a.depth, lines = lines_of(depth);
        const int line = line_at(cursor.at, lines, pairs), steps = depth - line * kLine > kStep ? 2 : 1;
        if (tiles > 0) {
            multiply_large<Half, BITS>(sums, memory + slot * kLargeStageBytes, plain, line, steps, tiles, a.group_shift);
        }
        if (++cursor.at == first_lines(lines, pairs)) {
            for_each_sum([&](int half, int j, int i) {
                first[half][j][i] = sums[0][half][j][i] + sums[1][half][j][i];
                sums[0][half][j][i] = sums[1][half][j][i] = 0.0f;
            });
        }
        if (cursor.at == lines) {
            for_each_sum([&](int half, int j, int i) {
                first[half][j][i] += sums[0][half][j][i] + sums[1][half][j][i];
                sums[0][half][j][i] = sums[1][half][j][i] = 0.0f;
            });
            Item item = item_at<kLargeTiles, kLargeRows>(a, lists, cursor.index, feeder.shared);
            write_large<Half, GATE>(a, lists, item, first, cursor.pair);
            cursor.at = 0, cursor.pair += kLargeTokens;
            if (cursor.pair >= item.end) {
                cursor.index += every;
                if (cursor.index >= items) break;
                item = item_at<kLargeTiles, kLargeRows>(a, lists, cursor.index, feeder.shared);
                cursor.pair = item.first;
            }
            tiles = (item.end - cursor.pair - large_column() + 7) / 8;
        }
        slot = next(slot);
    }
}

}  // namespace dmoe
