// The two products for many tokens: 128 weight rows times 128 tokens per pass, bound by arithmetic.
//
// Each sum is added in the order of experts_product.cuh, so both kernels give the same bits: there the steps of 32 k with
// the same index mod 4 are a warp, here one warp has all four and goes through k twice, first the lines of steps 0 and 1 mod
// 4, then those of 2 and 3. 16-bit weights only. README.md has the counts.
#pragma once

#include "experts_large_fill.cuh"
#include "experts_product.cuh"

namespace dmoe {

// A warp has 64 rows and 32 tokens: [sixteens of rows][tile][as mma's c].
using LargeSums = float[4][4][4];

DMOE_DEVICE int large_row() { return warp_id() % 2 * 64; }      // of the item
DMOE_DEVICE int large_column() { return warp_id() / 2 * 32; }   // of the pass's tokens

// One line of k: sums[0] gets its first step, sums[1] the second. `tokens`: those of the warp; `depth`: k from here on.
template <class Half>
DMOE_DEVICE void multiply_large(LargeSums (&sums)[2], const char *stage, int tokens, int depth) {
    const int lane = lane_id();
    // Sixteen rows or tokens further units have the same order, and so two units further is an xor.
    const int weights_at = large_weight_place(large_row() + lane % 8 * 2 + (lane / 8 & 1), lane / 16);
    const int tokens_at = large_token_place(large_column() + lane / 16 * 8 + lane % 8, lane / 8 & 1);
    DMOE_UNROLL
    for (int unit = 0; unit < kLineUnits; unit += 2) {
        if (unit * 8 >= (depth + kStep - 1) / kStep * kStep) break;
        uint32_t a[4][4];
        DMOE_UNROLL
        for (int m = 0; m < 4; ++m) {  // the matrices: even rows, odd rows, the same of the next unit
            load_matrices(a[m], stage + (weights_at ^ unit * 16) + m * 16 * kLineUnits * 16);
        }
        LargeSums &sum = sums[unit / 4];
        DMOE_UNROLL
        for (int j = 0; j < 4; j += 2) {
            if (j * 8 >= tokens) break;
            uint32_t b[4];  // the matrices: two units of eight tokens, the same of the next eight
            load_matrices(b, stage + (tokens_at ^ unit * 16) + j * 8 * kLineUnits * 16);
            DMOE_UNROLL
            for (int m = 0; m < 4; ++m) {
                Half::mma(sum[m][j], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                Half::mma(sum[m][j + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
            }
        }
    }
}

// What `use` does for every sum of a warp.
template <class Use>
DMOE_DEVICE void for_each_sum(const Use &use) {
    DMOE_UNROLL
    for (int m = 0; m < 4; ++m) {
        DMOE_UNROLL
        for (int j = 0; j < 4; ++j) {
            DMOE_UNROLL
            for (int i = 0; i < 4; ++i) use(m, j, i);
        }
    }
}

template <class Half, bool GATE>
DMOE_DEVICE void write_large(const LargeArguments &a, const PairLists &lists, const Item &item, const LargeSums &sums, int pair) {
    const int g = lane_id() / 4, q = lane_id() % 4, rows = item.shared ? a.shared_rows : a.rows;
    DMOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        DMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int place = pair + large_column() + j * 8 + 2 * q + i;
            if (place >= item.end) continue;
            const Target<GATE> to(a, lists, item, place);
            DMOE_UNROLL
            for (int m = 0; m < 4; ++m) {
                const int row = item.row + large_row() + m * 16 + 2 * g;
                if (row < rows) to.template write<Half>(row, sums[m][j][i], sums[m][j][2 + i]);
            }
        }
    }
}

template <class Half, bool GATE>
__global__ void __launch_bounds__(kProductThreads, 1) large_product_kernel(LargeArguments a) {
    DMOE_DYNAMIC_SHARED(char, memory);
    const PairLists lists = lists_at(memory + a.stages * kLargeStageBytes, a.experts);
    const int every = static_cast<int>(gridDim.x), start = static_cast<int>(blockIdx.x);
    const auto next = [&](int slot) { return slot + 1 == a.stages ? 0 : slot + 1; };

    wait_for_predecessor();
    let_successor_start();
    LargeFeeder<GATE> feeder;
    feeder.shared = shared_items<kLargeTiles>(a);
    const int items =
        feeder.shared + group_pairs(lists, a.expert_ids, pair_count(a), a.experts) * static_cast<int>(a.tiles.by);
    if (start >= items) return;
    feeder.open(a, lists, start);
    Cursor cursor = feeder.cursor;
    int tokens = feeder.end - cursor.pair - large_column();  // the warp's, in this pass

    LargeSums sums[2] = {}, half;  // half: what the even lines gave
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
        const int depth = cursor.index < feeder.shared ? a.shared_depth : a.depth, lines = lines_of(depth);
        if (tokens > 0) {
            multiply_large<Half>(sums, memory + slot * kLargeStageBytes, tokens, depth - line_at(cursor.at, lines) * kLine);
        }
        if (++cursor.at == even_lines(lines)) {
            for_each_sum([&](int m, int j, int i) {
                half[m][j][i] = sums[0][m][j][i] + sums[1][m][j][i], sums[0][m][j][i] = sums[1][m][j][i] = 0.0f;
            });
        }
        if (cursor.at == lines) {
            for_each_sum([&](int m, int j, int i) {
                half[m][j][i] += sums[0][m][j][i] + sums[1][m][j][i], sums[0][m][j][i] = sums[1][m][j][i] = 0.0f;
            });
            Item item = item_at<kLargeTiles, kLargeRows>(a, lists, cursor.index, feeder.shared);
            write_large<Half, GATE>(a, lists, item, half, cursor.pair);
            cursor.at = 0, cursor.pair += kLargeTokens;
            if (cursor.pair >= item.end) {
                cursor.index += every;
                if (cursor.index >= items) break;
                item = item_at<kLargeTiles, kLargeRows>(a, lists, cursor.index, feeder.shared);
                cursor.pair = item.first;
            }
            tokens = item.end - cursor.pair - large_column();
        }
        slot = next(slot);
    }
}

}  // namespace dmoe
