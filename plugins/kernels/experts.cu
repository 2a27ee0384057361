// dmoe_experts, dmoe_experts_resident and dmoe_experts_quantised: arguments checked, tokens in chunks, four launches per chunk.
#include "dmoe_kernels.h"
#include "experts_group.cuh"
#include "experts_launch.cuh"
#include "experts_reduce.cuh"

using namespace dmoe;

namespace {

// Bounds the workspace (76 MB for 8 places, H 2048, I' 512); a longer prompt reads its experts once per chunk.
constexpr int kChunk = 1024;
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

int check(const DmoeExpertsShape &s, const DmoeQuantisation &q) {
    if (q.bits != 4 && q.bits != 8) return DMOE_ERROR_ATTRIBUTE;
    if (q.group_size != 32 && q.group_size != 64 && q.group_size != 128) return DMOE_ERROR_ATTRIBUTE;
    return s.hidden % q.group_size || s.width % q.group_size ? DMOE_ERROR_ATTRIBUTE : 0;
}

// Where the experts' weights are: for each product all of them and those in the slots.
struct Weights {
    Matrices gate_up, down, gate_up_pool, down_pool;
    const int32_t *slot_of_expert;
    int slots, bits, group_shift;
};

struct Tensors {
    const uint4 *hidden;
    const int32_t *expert_ids;
    const float *expert_weights;
    uint2 *mixed;
    char *workspace;
};

template <class Half, bool GATE>
int launch_product(const Weights &weights, const ProductArguments &a, int tokens, void *stream) {
    return weights.bits == 16 ? launch_product<Half, PlainRows<Half>, GATE>(a, tokens, stream)
                              : launch_quantised_product<Half, GATE>(weights.bits, a, tokens, stream);
}

template <class Half>
int run_chunk(const DmoeExpertsShape &s, const Workspace &w, const Weights &weights, const Tensors &t, void *stream) {
    const Groups groups{reinterpret_cast<int *>(t.workspace + w.count), reinterpret_cast<int *>(t.workspace + w.first),
                        reinterpret_cast<int *>(t.workspace + w.pairs)};
    auto *const activations = reinterpret_cast<uint16_t *>(t.workspace + w.activations);
    auto *const pair_outputs = reinterpret_cast<float *>(t.workspace + w.pair_outputs);

    const GroupArguments group{t.expert_ids, s.tokens * s.places, s.experts, groups};
    const int warps = (s.experts + 7) / 8 * 8;
    if (const int error = launch(group_kernel, dim3(warps / 4), 128, stream, group)) return error;

    ProductArguments a{};
    a.slot_of_expert = weights.slot_of_expert, a.slots = weights.slots, a.group_shift = weights.group_shift;
    a.groups = groups, a.experts = s.experts, a.places = s.places;

    a.all = weights.gate_up, a.pool = weights.gate_up_pool;
    a.rows = 2 * s.width, a.depth = s.hidden;
    a.tokens = t.hidden, a.activations = activations;
    if (const int error = launch_product<Half, true>(weights, a, s.tokens, stream)) return error;

    a.all = weights.down, a.pool = weights.down_pool;
    a.rows = s.hidden, a.depth = s.width;
    a.tokens = reinterpret_cast<const uint4 *>(activations), a.activations = nullptr;
    a.pair_weights = t.expert_weights, a.pair_outputs = pair_outputs;
    if (const int error = launch_product<Half, false>(weights, a, s.tokens, stream)) return error;

    const ReduceArguments reduce{reinterpret_cast<const float4 *>(pair_outputs), t.expert_ids, s.tokens, s.places,
                                 s.experts, s.hidden / 4, t.mixed};
    const int64_t threads = static_cast<int64_t>(s.tokens) * reduce.quads;
    return launch(reduce_kernel<Half>, dim3(static_cast<unsigned>((threads + kReduceThreads - 1) / kReduceThreads)),
                  kReduceThreads, stream, reduce);
}

bool usable(const void *pointer, uintptr_t alignment = 16) {
    return pointer && reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

// Everything about weights, scales and slots into one struct; 0 or what is wrong with it.
int weights_of(Weights &w, const DmoeExpertsShape &shape, const DmoeQuantisation *q, const DmoeExpertPool *pool,
               const void *gate_up, const void *down) {
    w = Weights{{gate_up, nullptr}, {down, nullptr}, {}, {}, nullptr, 0, 16, 0};
    bool good = usable(gate_up) && usable(down);
    if (q) {
        if (const int error = check(shape, *q)) return error;
        w.bits = q->bits, w.group_shift = q->group_size == 32 ? 5 : q->group_size == 64 ? 6 : 7;
        good = good && usable(q->gate_up_scales) && usable(q->down_scales);
        w.gate_up.scales = static_cast<const uint16_t *>(q->gate_up_scales);
        w.down.scales = static_cast<const uint16_t *>(q->down_scales);
    }
    if (pool) {
        if (pool->slots < 1 || pool->slots > shape.experts) return DMOE_ERROR_SHAPE;
        w.slot_of_expert = pool->slot_of_expert, w.slots = pool->slots;
        w.gate_up_pool.weights = pool->gate_up, w.down_pool.weights = pool->down;
        good = good && usable(pool->slot_of_expert) && usable(pool->gate_up) && usable(pool->down);
    }
    if (pool && q) {
        good = good && usable(q->gate_up_pool_scales) && usable(q->down_pool_scales);
        w.gate_up_pool.scales = static_cast<const uint16_t *>(q->gate_up_pool_scales);
        w.down_pool.scales = static_cast<const uint16_t *>(q->down_pool_scales);
    }
    return good ? 0 : DMOE_ERROR_POINTER;
}

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
    return dmoe_experts_quantised(shape, nullptr, pool, hidden, expert_ids, expert_weights, gate_up, down, mixed,
                                  workspace, stream);
}

extern "C" int dmoe_experts_quantised(const DmoeExpertsShape *shape, const DmoeQuantisation *quantisation,
                                      const DmoeExpertPool *pool, const void *hidden, const int32_t *expert_ids,
                                      const float *expert_weights, const void *gate_up, const void *down, void *mixed,
                                      void *workspace, void *stream) {
    if (!shape) return DMOE_ERROR_POINTER;
    if (const int error = check(*shape)) return error;
    Weights weights;
    const int problem = weights_of(weights, *shape, quantisation, pool, gate_up, down);
    if (problem && problem != DMOE_ERROR_POINTER) return problem;
    if (shape->tokens == 0) return 0;  // tensors without elements have no address
    if (problem || !usable(hidden) || !usable(expert_ids) || !usable(expert_weights) || !usable(mixed) ||
        !usable(workspace, 256)) {
        return DMOE_ERROR_POINTER;
    }
    if (shape->type == DMOE_TYPE_BF16 && !bf16_runs_here()) return DMOE_ERROR_TYPE;

    const Workspace w = workspace_of(*shape);
    for (int32_t start = 0; start < shape->tokens; start += kChunk) {
        DmoeExpertsShape chunk = *shape;
        chunk.tokens = min(static_cast<int32_t>(kChunk), shape->tokens - start);
        const int64_t at = static_cast<int64_t>(start) * shape->hidden;  // a multiple of 8 halfs
        const Tensors t{static_cast<const uint4 *>(hidden) + at / 8,
                        expert_ids + static_cast<int64_t>(start) * shape->places,
                        expert_weights + static_cast<int64_t>(start) * shape->places,
                        static_cast<uint2 *>(mixed) + at / 4, static_cast<char *>(workspace)};
        const int error = shape->type == DMOE_TYPE_FP16 ? run_chunk<Fp16>(chunk, w, weights, t, stream)
                                                        : run_chunk<Bf16>(chunk, w, weights, t, stream);
        if (error) return error;
    }
    return 0;
}
