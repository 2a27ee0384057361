// dmoe_experts and dmoe_experts_resident: arguments checked, tokens in chunks, four launches per chunk.
#include "dmoe_kernels.h"
#include "experts_group.cuh"
#include "experts_product.cuh"
#include "experts_reduce.cuh"

using namespace dmoe;

namespace {

// Bounds the workspace (76 MB for 8 places, H 2048, I' 512); a longer prompt reads its experts once per chunk.
constexpr int kChunk = 1024;
constexpr int kSplitDepth = 2048;  // from this depth on the warps of a block share 16 rows
constexpr int kMaxSize = 1 << 18;  // of H and I'; keeps every 32-bit index in range

struct Workspace {
    int64_t count, first, pairs, activations, pair_outputs, bytes;
};

Workspace workspace_of(const DmoeExpertsShape &s) {
    const int64_t pair_count = static_cast<int64_t>(min(s.tokens, static_cast<int32_t>(kChunk))) * s.places;
    Workspace w{};
    const auto part = [&w](int64_t bytes) {
        const int64_t at = w.bytes;
        w.bytes += (bytes + 255) / 256 * 256;
        return at;
    };
    w.count = part(kMaxExperts * 4);
    w.first = part(kMaxExperts * 4);
    w.pairs = part(pair_count * 4);
    w.activations = part(pair_count * s.width * 2);
    w.pair_outputs = part(pair_count * s.hidden * 4);
    return w;
}

int check(const DmoeExpertsShape &s) {
    if (s.tokens < 0 || s.places < 1 || s.places > 32 || s.experts < 1 || s.experts > kMaxExperts || s.hidden < 8 ||
        s.hidden % 8 || s.hidden > kMaxSize || s.width < 8 || s.width % 8 || s.width > kMaxSize) {
        return DMOE_ERROR_SHAPE;
    }
    return s.type == DMOE_TYPE_FP16 || s.type == DMOE_TYPE_BF16 ? 0 : DMOE_ERROR_TYPE;
}

template <class Half, int TILES, int SPLIT, bool GATE>
int launch_product(const ProductArguments &a, int pair_count, void *stream) {
    constexpr auto kernel = product_kernel<Half, TILES, SPLIT, GATE>;
    const int row_tiles = (a.rows + 64 / SPLIT - 1) / (64 / SPLIT);
    const int items = min(a.experts, pair_count) * row_tiles;  // at most: how many experts are active is not known here
    const int blocks = max(1, min(items, resident_blocks<kernel>(kProductThreads)));
    return launch(kernel, dim3(blocks), kProductThreads, stream, a);
}

template <class Half, bool GATE>
int launch_product(const ProductArguments &a, int tokens, void *stream) {
    const int pairs = tokens * a.places;
    if (a.depth >= kSplitDepth) {
        return tokens <= 32 ? launch_product<Half, 4, 4, GATE>(a, pairs, stream)
                            : launch_product<Half, 8, 4, GATE>(a, pairs, stream);
    }
    return tokens <= 32 ? launch_product<Half, 4, 1, GATE>(a, pairs, stream)
                        : launch_product<Half, 8, 1, GATE>(a, pairs, stream);
}

// What the kernels need of a DmoeExpertPool; all null and 0 without one.
struct Pool {
    const int32_t *slot_of_expert;
    const uint4 *gate_up, *down;
    int slots;
};

struct Tensors {
    const uint4 *hidden;
    const int32_t *expert_ids;
    const float *expert_weights;
    const uint4 *gate_up, *down;
    uint2 *mixed;
    char *workspace;
    Pool pool;
};

template <class Half>
int run_chunk(const DmoeExpertsShape &s, const Workspace &w, const Tensors &t, void *stream) {
    const Groups groups{reinterpret_cast<int *>(t.workspace + w.count), reinterpret_cast<int *>(t.workspace + w.first),
                        reinterpret_cast<int *>(t.workspace + w.pairs)};
    auto *const activations = reinterpret_cast<uint16_t *>(t.workspace + w.activations);
    auto *const pair_outputs = reinterpret_cast<float *>(t.workspace + w.pair_outputs);

    const GroupArguments group{t.expert_ids, s.tokens * s.places, s.experts, groups};
    const int warps = (s.experts + 7) / 8 * 8;
    if (const int error = launch(group_kernel, dim3(warps / 4), 128, stream, group)) return error;

    const Pool &pool = t.pool;
    const ProductArguments gate_up{t.gate_up, pool.gate_up, pool.slot_of_expert, pool.slots, t.hidden,
                                   groups,    s.experts,    2 * s.width,         s.hidden,   s.places,
                                   activations, nullptr,    nullptr};
    if (const int error = launch_product<Half, true>(gate_up, s.tokens, stream)) return error;

    const ProductArguments down{t.down,   pool.down, pool.slot_of_expert, pool.slots,
                                reinterpret_cast<const uint4 *>(activations), groups, s.experts, s.hidden,
                                s.width,  s.places,  nullptr, t.expert_weights, pair_outputs};
    if (const int error = launch_product<Half, false>(down, s.tokens, stream)) return error;

    const ReduceArguments reduce{reinterpret_cast<const float4 *>(pair_outputs), t.expert_ids, s.tokens, s.places,
                                 s.experts, s.hidden / 4, t.mixed};
    const int64_t threads = static_cast<int64_t>(s.tokens) * reduce.quads;
    return launch(reduce_kernel<Half>, dim3(static_cast<unsigned>((threads + kReduceThreads - 1) / kReduceThreads)),
                  kReduceThreads, stream, reduce);
}

bool misaligned(const void *pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; }

}  // namespace

extern "C" int64_t dmoe_experts_workspace_bytes(const DmoeExpertsShape *shape) {
    if (!shape) return DMOE_ERROR_POINTER;
    const int error = check(*shape);
    return error ? error : workspace_of(*shape).bytes;
}

extern "C" int dmoe_experts(const DmoeExpertsShape *shape, const void *hidden, const int32_t *expert_ids,
                            const float *expert_weights, const void *gate_up, const void *down, void *mixed,
                            void *workspace, void *stream) {
    return dmoe_experts_resident(shape, nullptr, hidden, expert_ids, expert_weights, gate_up, down, mixed, workspace,
                                 stream);
}

extern "C" int dmoe_experts_resident(const DmoeExpertsShape *shape, const DmoeExpertPool *pool, const void *hidden,
                                     const int32_t *expert_ids, const float *expert_weights, const void *gate_up,
                                     const void *down, void *mixed, void *workspace, void *stream) {
    if (!shape) return DMOE_ERROR_POINTER;
    if (const int error = check(*shape)) return error;
    if (pool && (pool->slots < 1 || pool->slots > shape->experts)) return DMOE_ERROR_SHAPE;
    if (shape->tokens == 0) return 0;
    for (const void *pointer : {hidden, static_cast<const void *>(expert_ids), static_cast<const void *>(expert_weights),
                                gate_up, down, static_cast<const void *>(mixed), static_cast<const void *>(workspace)}) {
        if (!pointer || misaligned(pointer, 16)) return DMOE_ERROR_POINTER;
    }
    Pool slots{};
    if (pool) {
        for (const void *pointer : {static_cast<const void *>(pool->slot_of_expert), pool->gate_up, pool->down}) {
            if (!pointer || misaligned(pointer, 16)) return DMOE_ERROR_POINTER;
        }
        slots = {pool->slot_of_expert, static_cast<const uint4 *>(pool->gate_up),
                 static_cast<const uint4 *>(pool->down), pool->slots};
    }
    if (misaligned(workspace, 256)) return DMOE_ERROR_POINTER;
    if (shape->type == DMOE_TYPE_BF16 && !bf16_runs_here()) return DMOE_ERROR_TYPE;

    const Workspace w = workspace_of(*shape);
    for (int32_t start = 0; start < shape->tokens; start += kChunk) {
        DmoeExpertsShape chunk = *shape;
        chunk.tokens = min(static_cast<int32_t>(kChunk), shape->tokens - start);
        const int64_t at = static_cast<int64_t>(start) * shape->hidden;  // a multiple of 8 halfs
        const Tensors t{static_cast<const uint4 *>(hidden) + at / 8,
                        expert_ids + static_cast<int64_t>(start) * shape->places,
                        expert_weights + static_cast<int64_t>(start) * shape->places,
                        static_cast<const uint4 *>(gate_up),
                        static_cast<const uint4 *>(down),
                        static_cast<uint2 *>(mixed) + at / 4,
                        static_cast<char *>(workspace),
                        slots};
        const int error = shape->type == DMOE_TYPE_FP16 ? run_chunk<Fp16>(chunk, w, t, stream)
                                                        : run_chunk<Bf16>(chunk, w, t, stream);
        if (error) return error;
    }
    return 0;
}
