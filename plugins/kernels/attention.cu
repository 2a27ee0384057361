// dmoe_self_attention: arguments checked, two launches.
#include <cmath>
#include <cstdint>

#include "attention_attend.cuh"
#include "attention_prepare.cuh"
#include "dmoe_kernels.h"

using namespace dmoe;

namespace {

constexpr int kMostPastChunks = 16;
constexpr int kSplitRows = 64 * 64;   // of all key heads: from so many on, a thread block takes all chunks of its tile
constexpr int kFewBlocks = 128;       // below, tiles are small, so that there are more
constexpr int64_t kMost = INT32_MAX - 65536;

struct Plan {
    int chunk_keys, past_chunks, chunks, tile_rows, tiles;
    bool whole;      // a thread block has all chunks of its tile, not one
    int64_t heads;   // rows · kv_heads
    int64_t blocks;  // of the second launch
};

// The chunk depends on S alone, and chunks decide a row's bits; who has them and tiles do not, and follow what fills a GPU.
Plan plan_of(const DmoeSelfAttentionShape &s) {
    Plan p{};
    const auto parts = [](int64_t all, int64_t each) { return static_cast<int>((all + each - 1) / each); };
    // Eight chunks of past keys up to 4096 of them, then up to sixteen: more are folded for longer than they save.
    p.chunk_keys = kStepKeys * max(min(parts(s.past, 8 * kStepKeys), 4), parts(s.past, kMostPastChunks * kStepKeys));
    p.past_chunks = parts(s.past, p.chunk_keys);
    p.chunks = p.past_chunks + parts(s.tokens, p.chunk_keys);
    p.heads = static_cast<int64_t>(s.rows) * s.kv_heads;
    const int64_t rows = static_cast<int64_t>(s.tokens) * (s.heads / s.kv_heads);
    p.whole = p.heads * parts(rows, 64) * 64 >= kSplitRows;
    const int splits = p.whole ? 1 : p.chunks;
    p.tile_rows = s.head_dim <= 128 && p.heads * parts(rows, 64) * splits >= kFewBlocks ? 64 : 32;
    p.tiles = parts(rows, p.tile_rows);
    p.blocks = p.heads * p.tiles * splits;
    return p;
}

struct Layout {
    int64_t q, counters, stats, mixed, bytes;
};

// Enough for every smaller shape, too: TensorRT asks for the largest only.
Layout layout_of(const DmoeSelfAttentionShape &s) {
    const auto up = [](int64_t value, int64_t to) { return (value + to - 1) / to * to; };
    const int64_t heads = static_cast<int64_t>(s.rows) * s.kv_heads;
    const int64_t rows = static_cast<int64_t>(s.tokens) * (s.heads / s.kv_heads);
    const int64_t chunks = min(up(s.past, kStepKeys) / kStepKeys, int64_t{kMostPastChunks}) + up(s.tokens, kStepKeys) / kStepKeys;
    const int64_t partial_rows = min(heads * up(rows, 64), int64_t{kSplitRows}) * chunks;
    Layout w{};
    const auto part = [&w, &up](int64_t bytes) {
        const int64_t at = w.bytes;
        w.bytes += up(bytes, 256);
        return at;
    };
    w.q = part(heads * rows * s.head_dim * 2);
    w.counters = part(heads * up(rows, 32) / 32 * 4);
    w.stats = part(partial_rows * 8);
    w.mixed = part(partial_rows * s.head_dim * 4);
    return w;
}

int check(const DmoeSelfAttentionShape &s) {
    if (s.rows < 0 || s.tokens < 0 || s.past < 1 || s.past > kMost || s.kv_heads < 1 || s.heads < s.kv_heads ||
        s.heads % s.kv_heads || s.head_dim < 8 || s.head_dim > 256 || s.head_dim % 8 || s.rotary_dim < 2 ||
        s.rotary_dim % 2 || s.rotary_dim > s.head_dim) {
        return DMOE_ERROR_SHAPE;
    }
    if (s.heads > 65536 || (s.rows && s.tokens > kMost / s.rows / (3 * static_cast<int64_t>(s.heads)))) return DMOE_ERROR_SHAPE;
    if (s.block_length < 0 || !(s.eps > 0.0f)) return DMOE_ERROR_ATTRIBUTE;
    if (s.type != DMOE_TYPE_FP16 && s.type != DMOE_TYPE_BF16) return DMOE_ERROR_TYPE;
    return s.rows == 0 || plan_of(s).blocks <= kMost ? 0 : DMOE_ERROR_SHAPE;
}

bool usable(const void *pointer, uintptr_t alignment = 16) {
    return pointer && reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

template <class Half, bool WHOLE>
int launch_attend(const Plan &plan, const AttendArguments &a, void *stream) {
    const dim3 grid(static_cast<unsigned>(plan.blocks));
    const LaunchOptions options{0, true};
    if (a.dim > 128) return launch<attend_kernel<Half, 8, 2, WHOLE>>(grid, kAttendThreads, stream, a, options);
    return plan.tile_rows == 32 ? launch<attend_kernel<Half, 4, 2, WHOLE>>(grid, kAttendThreads, stream, a, options)
                                : launch<attend_kernel<Half, 4, 4, WHOLE>>(grid, kAttendThreads, stream, a, options);
}

template <class Half>
int run(const Plan &plan, const PrepareArguments &prepare, const AttendArguments &attend, void *stream) {
    const dim3 grid(static_cast<unsigned>((prepare.count + kPrepareWarps - 1) / kPrepareWarps));
    if (const int error = launch<prepare_kernel<Half>>(grid, kPrepareThreads, stream, prepare, LaunchOptions{0, true})) {
        return error;
    }
    return plan.whole ? launch_attend<Half, true>(plan, attend, stream) : launch_attend<Half, false>(plan, attend, stream);
}

}  // namespace

extern "C" int64_t dmoe_self_attention_workspace_bytes(const DmoeSelfAttentionShape *shape) {
    if (!shape) return DMOE_ERROR_POINTER;
    const int error = check(*shape);
    return error ? error : layout_of(*shape).bytes;
}

extern "C" int dmoe_self_attention(const DmoeSelfAttentionShape *shape, const void *qkv, const float *cos, const float *sin,
                                   const int64_t *position_ids, const int64_t *past_positions, const void *past_key,
                                   const void *past_value, const void *q_norm, const void *k_norm, void *mixed, void *key,
                                   void *value, void *workspace, void *stream) {
    if (!shape) return DMOE_ERROR_POINTER;
    const DmoeSelfAttentionShape &s = *shape;
    if (const int error = check(s)) return error;
    if (s.rows == 0 || s.tokens == 0) return 0;  // tensors without elements have no address
    for (const void *pointer : {qkv, static_cast<const void *>(cos), static_cast<const void *>(sin), past_key, past_value,
                                static_cast<const void *>(position_ids), static_cast<const void *>(past_positions),
                                static_cast<const void *>(mixed), static_cast<const void *>(key),
                                static_cast<const void *>(value)}) {
        if (!usable(pointer)) return DMOE_ERROR_POINTER;
    }
    const bool norms = q_norm || k_norm;
    if ((norms && (!usable(q_norm) || !usable(k_norm))) || !usable(workspace, 256)) return DMOE_ERROR_POINTER;
    if (s.type == DMOE_TYPE_BF16 && !bf16_runs_here()) return DMOE_ERROR_TYPE;

    const Plan plan = plan_of(s);
    const Layout w = layout_of(s);
    char *const memory = static_cast<char *>(workspace);
    const auto halfs = [](const void *from) { return static_cast<const uint16_t *>(from); };
    const int share = s.heads / s.kv_heads, of_token = s.heads + 2 * s.kv_heads;
    PrepareArguments p{};
    p.qkv = halfs(qkv), p.cos = cos, p.sin = sin, p.q_norm = halfs(q_norm), p.k_norm = halfs(k_norm);
    p.q = reinterpret_cast<uint16_t *>(memory + w.q);
    p.key = static_cast<uint16_t *>(key), p.value = static_cast<uint16_t *>(value);
    p.counters = reinterpret_cast<unsigned *>(memory + w.counters);
    p.counter_count = static_cast<int>(plan.heads * plan.tiles);
    p.tokens = s.tokens, p.heads = s.heads, p.kv_heads = s.kv_heads, p.dim = s.head_dim, p.half = s.rotary_dim / 2;
    p.count = s.rows * s.tokens * of_token, p.eps = s.eps;
    p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(s.head_dim)));

    AttendArguments a{};
    a.q = p.q, a.position_ids = position_ids, a.past_positions = past_positions, a.key = p.key, a.value = p.value;
    a.past_key = halfs(past_key), a.past_value = halfs(past_value), a.mixed = static_cast<uint16_t *>(mixed);
    a.partials = {reinterpret_cast<float2 *>(memory + w.stats), reinterpret_cast<float4 *>(memory + w.mixed)};
    a.counters = p.counters;
    a.tokens = s.tokens, a.past = s.past, a.kv_heads = s.kv_heads, a.share = share, a.dim = s.head_dim;
    a.block_length = s.block_length, a.rows = s.tokens * share, a.tiles = plan.tiles;
    a.chunk_keys = plan.chunk_keys, a.past_chunks = plan.past_chunks, a.chunks = plan.chunks;
    return s.type == DMOE_TYPE_FP16 ? run<Fp16>(plan, p, a, stream) : run<Bf16>(plan, p, a, stream);
}
