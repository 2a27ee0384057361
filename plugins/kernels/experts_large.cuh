// The two products for many tokens: 128 weight rows times 192 tokens per pass, bound by arithmetic.
//
// Each sum is added in the order of experts_product.cuh, so both kernels give the same bits: there the steps of 32 k (of 4
// bits: two neighbours) with the same index mod 4 are a warp, and the four are added one after the other; here a warp goes
// through k in four quarters, 0 mod 4 first. README.md has the counts.
#pragma once

#include "experts_large_fill.cuh"
#include "experts_large_multiply.cuh"
#include "experts_product.cuh"

namespace dmoe {

// What `use` does for every sum of a warp.
template <int BITS, class Use>
DMOE_DEVICE void for_each_sum(const Use &use) {
    DMOE_UNROLL
    for (int half = 0; half < kWarpHalves<BITS>; ++half) {
        DMOE_UNROLL
        for (int j = 0; j < kWarpTiles<BITS>; ++j) {
            DMOE_UNROLL
            for (int i = 0; i < 4; ++i) use(half, j, i);
        }
    }
}

template <class Half, int BITS, bool GATE>
DMOE_DEVICE void write_large(const LargeArguments &a, const PairLists &lists, const Item &item, const LargeSums<BITS> &sums,
                             int pair) {
    const int g = lane_id() / 4, q = lane_id() % 4, rows = item.shared ? a.shared_rows : a.rows;
    DMOE_UNROLL
    for (int j = 0; j < kWarpTiles<BITS>; ++j) {
        DMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int place = pair + (large_column<BITS>() + j * kColumns<BITS>) * 8 + 2 * q + i;
            if (place >= item.end) continue;
            const Target<GATE> to(a, lists, item, place);
            DMOE_UNROLL
            for (int half = 0; half < kWarpHalves<BITS>; ++half) {
                const int row = item.row + (large_band<BITS>() + half) * kBand + 2 * g;
                if (row < rows) to.template write<Half>(row, sums[half][j][i], sums[half][j][2 + i]);
            }
        }
    }
}

// BITS: of the routed experts' weights.
template <class Half, int BITS, bool GATE>
__global__ void __launch_bounds__(kProductThreads, 1) large_product_kernel(LargeArguments a) {
    if (!has_async_copies()) return;  // 7.5 takes the other product (plan_of()), so it needs no code
    DMOE_DYNAMIC_SHARED(char, memory);
    const PairLists lists = lists_at(memory + a.stages * kLargeStageBytes<BITS>, a.experts);
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
    int tiles = large_tiles<BITS>(feeder.end - cursor.pair);

    LargeSums<BITS> sums = {}, total = {};  // of the quarter, and of those before
    int slot = 0, empty = 0;
    for (int step = 1 - a.stages;; ++step) {
        if (step >= 0) {
            wait_for_stage(a.stages);
            __syncthreads();  // everybody's copies have arrived, and everybody is done with the stage before
        }
        if (feeder.cursor.index < items) {
            feeder.fill(a, lists, memory + empty * kLargeStageBytes<BITS>);
            feeder.advance(a, lists, items, every);
        }
        commit_copies();
        empty = next(empty);
        if (step < 0) continue;
        const char *const stage = memory + slot * kLargeStageBytes<BITS>;
        const bool shared = cursor.index < feeder.shared, plain = BITS == 16 || shared;
        const int depth = shared ? a.shared_depth : a.depth, quarter = cursor.at % 4;
        const int stages = stages_of(depth, BITS == 4 && !plain);
        if (tiles > 0) {
            if (plain) {
                multiply_large_rows<Half, BITS>(sums, stage, tiles);
            } else if constexpr (BITS != 16) {
                multiply_large_blocks<Half, BITS>(sums, stage, tiles, depth - cursor.at * kStepsOfBlock<BITS> * kStep, a.group_shift);
            }
        }
        cursor.at = stage_after(cursor.at, stages);
        if (cursor.at == stages || cursor.at % 4 != quarter) {
            for_each_sum<BITS>([&](int half, int j, int i) { total[half][j][i] += sums[half][j][i], sums[half][j][i] = 0.0f; });
        }
        if (cursor.at == stages) {
            Item item = item_at<kLargeTiles, kLargeRows>(a, lists, cursor.index, feeder.shared);
            write_large<Half, BITS, GATE>(a, lists, item, total, cursor.pair);
            for_each_sum<BITS>([&](int half, int j, int i) { total[half][j][i] = 0.0f; });
            cursor.at = 0, cursor.pair += kLargeTokens;
            if (cursor.pair >= item.end) {
                cursor.index += every;
                if (cursor.index >= items) break;
                item = item_at<kLargeTiles, kLargeRows>(a, lists, cursor.index, feeder.shared);
                cursor.pair = item.first;
            }
            tiles = large_tiles<BITS>(item.end - cursor.pair);
        }
        slot = next(slot);
    }
}

}  // namespace dmoe
