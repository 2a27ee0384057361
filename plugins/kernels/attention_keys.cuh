// What a thread block of DmoeSelfAttention's second launch reads: steps of keys, their values and positions, its queries.
#pragma once

#include "attention_fold.cuh"
#include "device.cuh"

namespace dmoe {

constexpr int kAttendWarps = 8;
constexpr int kAttendThreads = kAttendWarps * kWarp;
constexpr int kStepKeys = 16 * kAttendWarps;
constexpr uint32_t kUnseen = 0xffffffffu;  // the place of a key that nobody sees

struct AttendArguments {
    const uint16_t *q;                                // [B, kv_heads, rows, dim], scaled
    const int64_t *position_ids, *past_positions;     // [B, tokens], [B, past]
    const uint16_t *key, *value;                      // [B, kv_heads, tokens, dim]
    const uint16_t *past_key, *past_value;            // [B, kv_heads, past, dim]
    uint16_t *mixed;                                  // [B, tokens, heads, dim]
    Partials partials;                                // used where a thread block has one chunk
    unsigned *counters;                               // [B · kv_heads, tiles]
    int tokens, past, kv_heads, share, dim, block_length;
    int rows, tiles;                                  // of a key head: tokens · share, and how many thread blocks have them
    int chunk_keys, past_chunks, chunks;              // chunks: of past and new keys
};

// Where a step's keys are.
struct Step {
    int chunk, start;  // the first key, from the chunk's first
    int keys;          // of the chunk
    int64_t place;     // of the chunk's first key among all of its kind, new or past
    bool fresh;        // new keys
};

DMOE_DEVICE Step first_step(const AttendArguments &a, int row_and_head, int chunk) {
    const bool fresh = chunk >= a.past_chunks;
    const int places = fresh ? a.tokens : a.past, first = (fresh ? chunk - a.past_chunks : chunk) * a.chunk_keys;
    return {chunk, 0, min(a.chunk_keys, places - first), static_cast<int64_t>(row_and_head) * places + first, fresh};
}

// The step after, of the same chunk or the next one.
DMOE_DEVICE Step next_step(const AttendArguments &a, int row_and_head, const Step &step) {
    if (step.start + kStepKeys >= step.keys) return first_step(a, row_and_head, min(step.chunk + 1, a.chunks - 1));
    Step next = step;
    next.start += kStepKeys;
    return next;
}

// The position of the thread's key; −1 where there is none.
DMOE_DEVICE int64_t load_position(const AttendArguments &a, int row_and_head, const Step &step) {
    const int at = step.start + static_cast<int>(threadIdx.x), places = step.fresh ? a.tokens : a.past;
    if (static_cast<int>(threadIdx.x) >= kStepKeys || at >= step.keys) return -1;
    const int64_t first = step.place - static_cast<int64_t>(row_and_head - row_and_head / a.kv_heads) * places;
    return (step.fresh ? a.position_ids : a.past_positions)[first + at];
}

// Positions as 32 bits, saturated: a key is seen where its place is below the query's limit.
DMOE_DEVICE uint32_t key_place(int64_t position) {
    return position < 0 ? kUnseen : static_cast<uint32_t>(min(position, static_cast<int64_t>(kUnseen) - 1));
}
DMOE_DEVICE uint32_t query_limit(int64_t position, int block_length) {
    if (block_length == 0) return kUnseen;
    const int64_t known = min(max(position, static_cast<int64_t>(0)), static_cast<int64_t>(kUnseen));
    return static_cast<uint32_t>(min((known / block_length + 1) * block_length, static_cast<int64_t>(kUnseen)));
}

// A warp's sixteen keys: per eight of them and 32 dimensions the lane's 16 bytes. Zeros where there is none.
template <int SEGMENTS>
DMOE_DEVICE void load_keys(uint4 (&to)[2][SEGMENTS], const AttendArguments &a, const Step &step) {
    const int g = lane_id() / 4, q = lane_id() % 4, dim = a.dim;
    const uint16_t *const from = (step.fresh ? a.key : a.past_key) + step.place * dim;
    DMOE_UNROLL
    for (int n = 0; n < 2; ++n) {
        const int at = step.start + warp_id() * 16 + n * 8 + g;
        DMOE_UNROLL
        for (int i = 0; i < SEGMENTS; ++i) {
            const int d = i * 32 + q * 8;
            to[n][i] = make_uint4(0, 0, 0, 0);
            if (at < step.keys && d < dim) {
                to[n][i] = *reinterpret_cast<const uint4 *>(from + static_cast<int64_t>(at) * dim + d);
            }
        }
    }
}

// Two columns of 32 keys for each lane; zeros where no row of the tile sees the key (`seen`, a bit per key).
DMOE_DEVICE void load_values(uint32_t (&to)[8], const AttendArguments &a, const Step &step, int first, uint32_t seen,
                             int column) {
    const int q = lane_id() % 4;
    const uint16_t *const from = (step.fresh ? a.value : a.past_value) +
                                 (step.place + step.start + first + 8 * q) * a.dim + column;
    DMOE_UNROLL
    for (int j = 0; j < 8; ++j) {
        to[j] = 0;
        if (column < a.dim && (seen >> (8 * q + j) & 1u)) {
            to[j] = *reinterpret_cast<const uint32_t *>(from + j * a.dim);
        }
    }
}

// The tile's queries, and which places each of its rows sees; rows beyond the last see none.
template <int ROWS, int PITCH>
DMOE_DEVICE void load_tile(uint4 *queries, uint32_t *limits, const AttendArguments &a, int row_and_head, int tile) {
    const int count = min(ROWS, a.rows - tile * ROWS);
    const uint16_t *const from = a.q + (static_cast<int64_t>(row_and_head) * a.rows + tile * ROWS) * a.dim;
    for (int i = threadIdx.x; i < ROWS * PITCH; i += kAttendThreads) {
        const int row = i / PITCH, d = i % PITCH * 8;
        queries[i] = make_uint4(0, 0, 0, 0);
        if (row < count && d < a.dim) {
            queries[i] = *reinterpret_cast<const uint4 *>(from + static_cast<int64_t>(row) * a.dim + d);
        }
    }
    const int row = threadIdx.x;
    if (row >= ROWS) return;
    const int64_t *const positions = a.position_ids + static_cast<int64_t>(row_and_head / a.kv_heads) * a.tokens;
    limits[row] = row < count ? query_limit(positions[(tile * ROWS + row) / a.share], a.block_length) : 0;
}

}  // namespace dmoe
