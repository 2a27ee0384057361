// The two products of the experts: rows of an expert's weights times the tokens routed to it.
//
// Persistent thread blocks take items in turn (experts_items.cuh). Weights and tokens pass through a ring of stages in
// shared memory, which asynchronous copies keep full across passes and items; a stage is waited for by itself, while the
// later ones are under way. README.md has the picture.
#pragma once

#include "experts_fill.cuh"
#include "experts_multiply.cuh"

namespace dmoe {

constexpr int kMostStages = 6;
constexpr int kStaticBytes = 128;  // at least what group_pairs() has beside the ring and the lists

// Until the oldest of the ring's stages has arrived; all but one are under way.
DMOE_DEVICE void wait_for_stage(int stages) {
    if (stages == 4) return wait_for_copies<2>();
    if (stages == 3) return wait_for_copies<1>();
    if (stages == 2) return wait_for_copies<0>();
    if (stages == 5) return wait_for_copies<3>();
    wait_for_copies<4>();
}

// silu(x) = x / (1 + e^−x), and so is x / 2 · (1 + tanh y) with 2 y for x in the exponent, y = √(2/π) · (x + 0.044715 x³).
DMOE_DEVICE float activated(float x, bool gelu) {
    constexpr float kTwiceRoot = 1.59576912f, kCubic = 0.0713548163f;  // the second is 0.044715 times the first
    return x / (1.0f + expf(-(gelu ? x * fmaf(kCubic, x * x, kTwiceRoot) : x)));
}

// Where the products of a pair (a token, when shared) go.
template <bool GATE>
struct Target {
    int rows;
    bool gelu;               // the activation, else silu
    float weight;            // of the pair
    uint16_t *activations;   // its first one
    float *outputs;          // its first one

    DMOE_DEVICE Target(const ProductArguments &a, const PairLists &lists, const Item &item, int place) {
        rows = item.shared ? a.shared_rows : a.rows;
        const int64_t to = item.shared ? place : lists.pairs[place];
        if constexpr (GATE) {
            gelu = a.gelu;
            activations = (item.shared ? a.shared_activations : a.activations) + to * (rows / 2);
        } else {
            weight = item.shared ? 1.0f : a.pair_weights[to];
            outputs = (item.shared ? a.shared_outputs : a.pair_outputs) + to * rows;
        }
    }

    // The values of two neighbouring rows: a gate with its up, or two outputs.
    template <class Half>
    DMOE_DEVICE void write(int row, float first, float second) const {
        if constexpr (GATE) {
            activations[row / 2] = Half::narrow(activated(first, gelu) * second);
        } else {
            *reinterpret_cast<float2 *>(outputs + row) = make_float2(weight * first, weight * second);
        }
    }
};

// c: rows `row` and `row + 1` of pairs 2q and 2q + 1 of the tile that starts at `pair`.
template <class Half, bool GATE>
DMOE_DEVICE void write_tile(const ProductArguments &a, const PairLists &lists, const Item &item, const float (&c)[4], int row,
                            int pair) {
    if (row >= (item.shared ? a.shared_rows : a.rows)) return;
    DMOE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const int place = pair + 2 * (lane_id() % 4) + i;
        if (place < item.end) Target<GATE>(a, lists, item, place).template write<Half>(row, c[i], c[2 + i]);
    }
}

DMOE_DEVICE void add(float (&sum)[4], const float4 &part) {
    sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
}

// The four warps that share rows have a sum each, ((0 + 1) + 2) + 3, and each adds up and writes a quarter of the tiles. They
// hand over what is not theirs, one sixteen of the rows after the other. `memory`: the stage that was multiplied last; a
// barrier follows before it is filled again.
template <class Half, int TILES, bool GATE>
DMOE_DEVICE void finish_pass(const ProductArguments &a, const PairLists &lists, const Item &item, int pair,
                             const Sums<TILES> &sums, int tiles, char *memory) {
    constexpr int kShare = TILES / kSplit;
    const int warp = warp_id(), lane = lane_id(), mine = warp % kSplit;
    // Between warps `one` and `other` of those that share rows: both know it, and its two directions take turns.
    const auto part_of = [&](int one, int other, int j) -> float4 & {
        return reinterpret_cast<float4 *>(memory)[(((warp / kSplit * kSplit + one) * kSplit + other) * kShare + j) * kWarp + lane];
    };
    __syncthreads();  // the last stage has been multiplied
    DMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
        const auto slot = [&](bool given, int other, int j) -> float4 & {  // given here, the other warp takes it
            return given == (half == 0) ? part_of(mine, other, j) : part_of(other, mine, j);
        };
        DMOE_UNROLL
        for (int w = 0; w < kSplit; ++w) {
            DMOE_UNROLL
            for (int j = 0; j < kShare; ++j) {
                const float(&c)[4] = sums[half][w * kShare + j];
                if (w != mine && w * kShare + j < tiles) slot(true, w, j) = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
        __syncthreads();
        const int row = item.row + warp / kSplit * 32 + half * 16 + lane / 4 * 2;
        DMOE_UNROLL
        for (int j = 0; j < kShare; ++j) {
            if (mine * kShare + j >= tiles) continue;
            float sum[4] = {};
            DMOE_UNROLL
            for (int w = 0; w < kSplit; ++w) {
                const float(&c)[4] = sums[half][w * kShare + j];
                add(sum, w == mine ? make_float4(c[0], c[1], c[2], c[3]) : slot(false, w, j));
            }
            write_tile<Half, GATE>(a, lists, item, sum, row, pair + (mine * kShare + j) * 8);
        }
    }
}

// BITS: of the routed experts' weights. TILES: tiles of eight tokens per pass.
template <class Half, int BITS, int TILES, bool GATE>
__global__ void __launch_bounds__(kProductThreads, 2) product_kernel(ProductArguments a) {
    static_assert(TILES % kSplit == 0, "finish_pass() shares them out");
    DMOE_DYNAMIC_SHARED(char, memory);
    DMOE_SHARED(uint64_t, barriers, kMostStages);
    const Arrivals arrivals = arrivals_at(barriers);
    const bool bulk = BITS != 16 && has_bulk_copies();  // then stages have barriers, else groups of copies
    if (bulk) {
        if (threadIdx.x == 0) {
            DMOE_UNROLL
            for (int s = 0; s < kMostStages; ++s) init_arrivals(arrivals[s], kProductThreads);
            publish_arrivals();
        }
        __syncthreads();
    }
    const PairLists lists = lists_at(memory + a.stages * a.stage_bytes, a.experts);
    const auto stage_at = [&](int slot) { return memory + slot * a.stage_bytes; };
    const int every = static_cast<int>(gridDim.x), start = static_cast<int>(blockIdx.x);
    const auto next = [&](int slot) { return slot + 1 == a.stages ? 0 : slot + 1; };
    const auto group = [&] { return group_pairs(lists, a.expert_ids, pair_count(a), a.experts) * static_cast<int>(a.tiles.by); };

    // Before the last launch has ended: what does not depend on it. Weights never do; which ones are wanted the shared
    // expert's items know at once, and those of `down` from ids that gate_up has been able to read.
    Feeder<BITS, TILES, GATE> feeder;
    feeder.shared = shared_items<TILES>(a);
    int items = feeder.shared, early = 0;
    if (!GATE) items += group();
    const bool opened = start < items;
    if (opened) {
        feeder.open(a, lists, start);
        for (; early < a.stages - 1 && feeder.cursor.at < feeder.depth(a); ++early) {
            feeder.fill_weights(a, stage_at(early), early, arrivals[early]);
            feeder.cursor.at += feeder.chunk();
        }
        feeder.cursor.at = 0;
    }
    wait_for_predecessor();
    let_successor_start();
    if (GATE) items += group();
    if (start >= items) return;
    if (!opened) feeder.open(a, lists, start);
    feeder.find_tokens(a, lists);
    Cursor cursor = feeder.cursor;
    int tiles = min(TILES, (feeder.end - cursor.pair + 7) / 8);

    const auto places = LanePlaces<BITS == 16 ? 8 : BITS>::template of<TILES>();
    Sums<TILES> sums = {};
    int slot = 0, empty = 0;
    unsigned parity = 0;
    for (int step = 1 - a.stages;; ++step) {
        if (step >= 0) {
            if (!bulk) wait_for_stage(a.stages);
            __syncthreads();  // everybody is done with the stage before; without barriers: everybody's copies have arrived
        }
        if (feeder.cursor.index < items) {
            if (early > 0) {
                --early;
            } else {
                feeder.fill_weights(a, stage_at(empty), empty, arrivals[empty]);
            }
            feeder.fill_tokens(a, stage_at(empty));
            if (bulk) arrive_with_copies(arrivals[empty]);
            feeder.advance(a, lists, items, every);
        }
        if (!bulk) commit_copies();
        empty = next(empty);
        if (step < 0) continue;
        if (bulk) wait_for_arrivals(arrivals[slot], parity);
        char *const stage = stage_at(slot);
        const bool shared = cursor.index < feeder.shared;
        const int depth = shared ? a.shared_depth : a.depth;
        if (BITS == 16 || shared) {
            multiply_plain<Half, TILES>(sums, stage, tiles, depth - cursor.at);
            cursor.at += kChunk<16>;
        } else if constexpr (BITS != 16) {
            multiply_integers<Half, BITS, TILES>(sums, places, stage, tiles, depth - cursor.at, a.group_shift);
            cursor.at += kChunk<BITS>;
        }
        if (cursor.at >= depth) {
            Item item = item_at<TILES>(a, lists, cursor.index, feeder.shared);
            finish_pass<Half, TILES, GATE>(a, lists, item, cursor.pair, sums, tiles, stage);
            DMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                DMOE_UNROLL
                for (int j = 0; j < TILES; ++j) {
                    DMOE_UNROLL
                    for (int i = 0; i < 4; ++i) sums[half][j][i] = 0.0f;
                }
            }
            cursor.at = 0, cursor.pair += TILES * 8;
            if (cursor.pair >= item.end) {
                cursor.index += every;
                if (cursor.index >= items) break;
                item = item_at<TILES>(a, lists, cursor.index, feeder.shared);
                cursor.pair = item.first;
            }
            tiles = min(TILES, (item.end - cursor.pair + 7) / 8);
        }
        slot = next(slot);
        parity ^= slot == 0;
    }
}

}  // namespace dmoe
