// dmoe_mixture and the functions it has grown from: arguments checked, tokens in chunks, three launches per chunk; more
// where outputs go in slices.
#include "dmoe_kernels.h"
#include "experts_plan.cuh"
#include "experts_reduce.cuh"

using namespace dmoe;

namespace {

constexpr int kMaxSize = 1 << 18;  // of H and I'; keeps every 32-bit index in range

struct Workspace {
    int64_t activations, pair_outputs, shared_activations, shared_outputs, bytes;
};

// For every plan of the shape and of fewer tokens.
Workspace workspace_of(const DmoeExpertsShape &s, int shared_width) {
    const int64_t tokens = min(s.tokens, min(kManyTokens, kManyPairs / s.places)), pairs = tokens * s.places;
    const int64_t outputs = max(min(pairs, static_cast<int64_t>(kChunkPairs)) * s.hidden, pairs * min(s.hidden, kLargeRows));
    Workspace w{};
    const auto part = [&w](int64_t bytes) {
        const int64_t at = w.bytes;
        w.bytes += (bytes + 255) / 256 * 256;
        return at;
    };
    w.activations = part(pairs * s.width * 2);
    w.pair_outputs = part(outputs * 4);
    w.shared_activations = part(tokens * shared_width * 2);
    w.shared_outputs = part(shared_width ? (outputs + s.places - 1) / s.places * 4 : 0);
    w.bytes = max(w.bytes, static_cast<int64_t>(256));
    return w;
}

int check(const DmoeExpertsShape &s) {
    if (s.tokens < 0 || s.places < 1 || s.places > 32 || s.experts < 1 || s.experts > kMaxExperts || s.hidden < 8 ||
        s.hidden % 8 || s.hidden > kMaxSize || s.width < 8 || s.width % 8 || s.width > kMaxSize) {
        return DMOE_ERROR_SHAPE;
    }
    if (s.activation != DMOE_ACTIVATION_SILU && s.activation != DMOE_ACTIVATION_GELU_TANH) return DMOE_ERROR_ATTRIBUTE;
    return s.type == DMOE_TYPE_FP16 || s.type == DMOE_TYPE_BF16 ? 0 : DMOE_ERROR_TYPE;
}

int check(const DmoeExpertsShape &s, const DmoeQuantisation &q) {
    if (q.bits != 4 && q.bits != 8) return DMOE_ERROR_ATTRIBUTE;
    if (q.group_size != 32 && q.group_size != 64 && q.group_size != 128) return DMOE_ERROR_ATTRIBUTE;
    // So matrices have a multiple of 32 rows, which are whole bands, and of 32 k.
    return s.hidden % q.group_size || s.width % q.group_size ? DMOE_ERROR_ATTRIBUTE : 0;
}

int check(const DmoeSharedExpert &shared) {
    return shared.width < 8 || shared.width % 8 || shared.width > kMaxSize ? DMOE_ERROR_SHAPE : 0;
}

// Where the experts' weights are: for each product all of them and those in the slots.
struct Weights {
    Matrices gate_up, down, gate_up_pool, down_pool;
    const int32_t *slot_of_expert;
    int slots, bits, group_shift;
    DmoeSharedExpert shared;  // width 0 = none
};

struct Tensors {
    const uint4 *hidden;
    const int32_t *expert_ids;
    const float *expert_weights;
    uint2 *mixed;
    char *workspace;
};

// `from` without its first rows; of integers a multiple of 16.
Matrices rows_from(const Matrices &from, int64_t row, const Weights &weights, int depth) {
    if (!from.weights) return from;
    return {static_cast<const char *>(from.weights) + row * depth * weights.bits / 8,
            from.scales ? from.scales + row * (depth >> weights.group_shift) : nullptr};
}

template <class Half, bool GATE>
int launch_product(const Plan &plan, const Weights &weights, const LargeArguments &a, void *stream) {
    return plan.large           ? launch_large_product<Half, GATE>(weights.bits, a, stream)
           : weights.bits == 16 ? launch_product<Half, 16, GATE>(a, stream)
                                : launch_quantised_product<Half, GATE>(weights.bits, a, stream);
}

template <class Half>
int run_chunk(const DmoeExpertsShape &s, const Plan &plan, const Workspace &w, const Weights &weights, const Tensors &t,
              void *stream) {
    auto *const activations = reinterpret_cast<uint16_t *>(t.workspace + w.activations);
    auto *const shared_activations = reinterpret_cast<uint16_t *>(t.workspace + w.shared_activations);
    auto *const pair_outputs = reinterpret_cast<float *>(t.workspace + w.pair_outputs);
    auto *const shared_outputs = reinterpret_cast<float *>(t.workspace + w.shared_outputs);

    LargeArguments a{};
    a.slot_of_expert = weights.slot_of_expert, a.slots = weights.slots, a.group_shift = weights.group_shift;
    a.expert_ids = t.expert_ids, a.tokens = s.tokens, a.places = Divisor(s.places), a.experts = s.experts;

    a.all = weights.gate_up, a.pool = weights.gate_up_pool, a.shared_weights = weights.shared.gate_up;
    a.rows = a.matrix_rows = 2 * s.width, a.depth = s.hidden;
    a.shared_rows = 2 * weights.shared.width, a.shared_depth = s.hidden;
    a.inputs = t.hidden, a.shared_inputs = 0;
    a.gelu = s.activation == DMOE_ACTIVATION_GELU_TANH;
    a.activations = activations, a.shared_activations = shared_activations;
    if (const int error = launch_product<Half, true>(plan, weights, a, stream)) return error;

    a.matrix_rows = s.hidden, a.depth = s.width, a.shared_depth = weights.shared.width;
    a.inputs = reinterpret_cast<const uint4 *>(activations);
    a.shared_inputs = static_cast<unsigned>((w.shared_activations - w.activations) / 16);
    a.pair_weights = t.expert_weights, a.pair_outputs = pair_outputs, a.shared_outputs = shared_outputs;
    for (int row = 0; row < s.hidden; row += plan.down_rows) {
        a.all = rows_from(weights.down, row, weights, a.depth), a.pool = rows_from(weights.down_pool, row, weights, a.depth);
        a.shared_weights = static_cast<const char *>(weights.shared.down) + static_cast<int64_t>(row) * a.shared_depth * 2;
        a.rows = min(plan.down_rows, s.hidden - row), a.shared_rows = weights.shared.width ? a.rows : 0;
        if (const int error = launch_product<Half, false>(plan, weights, a, stream)) return error;

        const ReduceArguments reduce{reinterpret_cast<const float4 *>(pair_outputs),
                                     weights.shared.width ? reinterpret_cast<const float4 *>(shared_outputs) : nullptr,
                                     t.expert_ids, s.tokens, s.places, s.experts, a.rows / 4, t.mixed + row / 4, s.hidden / 4};
        const int64_t threads = static_cast<int64_t>(s.tokens) * reduce.quads;
        const dim3 blocks(static_cast<unsigned>((threads + kReduceThreads - 1) / kReduceThreads));
        if (const int error = launch<reduce_kernel<Half>>(blocks, kReduceThreads, stream, reduce, {0, true})) return error;
    }
    return 0;
}

bool usable(const void *pointer, uintptr_t alignment = 16) {
    return pointer && reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

// Everything about weights, scales and slots into one struct; 0 or what is wrong with it.
int weights_of(Weights &w, const DmoeExpertsShape &shape, const DmoeQuantisation *q, const DmoeExpertPool *pool,
               const DmoeSharedExpert *shared, const void *gate_up, const void *down) {
    w = Weights{{gate_up, nullptr}, {down, nullptr}, {}, {}, nullptr, 0, 16, 0, {}};
    bool good = usable(gate_up) && usable(down);
    if (shared) {
        if (const int error = check(*shared)) return error;
        w.shared = *shared;
        good = good && usable(shared->gate_up) && usable(shared->down);
    }
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

extern "C" int64_t dmoe_mixture_workspace_bytes(const DmoeExpertsShape *shape, const DmoeSharedExpert *shared) {
    if (!shape) return DMOE_ERROR_POINTER;
    if (const int error = check(*shape)) return error;
    if (shared) {
        if (const int error = check(*shared)) return error;
    }
    return workspace_of(*shape, shared ? shared->width : 0).bytes;
}

extern "C" int dmoe_mixture(const DmoeExpertsShape *shape, const DmoeSharedExpert *shared,
                            const DmoeQuantisation *quantisation, const DmoeExpertPool *pool, const void *hidden,
                            const int32_t *expert_ids, const float *expert_weights, const void *gate_up, const void *down,
                            void *mixed, void *workspace, void *stream) {
    if (!shape) return DMOE_ERROR_POINTER;
    if (const int error = check(*shape)) return error;
    Weights weights;
    const int problem = weights_of(weights, *shape, quantisation, pool, shared, gate_up, down);
    if (problem && problem != DMOE_ERROR_POINTER) return problem;
    if (shape->tokens == 0) return 0;  // tensors without elements have no address
    if (problem || !usable(hidden) || !usable(expert_ids) || !usable(expert_weights) || !usable(mixed) ||
        !usable(workspace, 256)) {
        return DMOE_ERROR_POINTER;
    }
    if (const int error = device_error()) return error;
    if (shape->type == DMOE_TYPE_BF16 && !bf16_runs_here()) return DMOE_ERROR_TYPE;

    const Workspace w = workspace_of(*shape, weights.shared.width);
    const Plan plan = plan_of(*shape, weights.bits);
    for (int32_t start = 0; start < shape->tokens; start += plan.tokens) {
        DmoeExpertsShape chunk = *shape;
        chunk.tokens = min(plan.tokens, shape->tokens - start);
        const int64_t at = static_cast<int64_t>(start) * shape->hidden;  // a multiple of 8 halfs
        const int64_t pairs = static_cast<int64_t>(start) * shape->places;
        const Tensors t{static_cast<const uint4 *>(hidden) + at / 8, expert_ids + pairs, expert_weights + pairs,
                        static_cast<uint2 *>(mixed) + at / 4, static_cast<char *>(workspace)};
        const int error = shape->type == DMOE_TYPE_FP16 ? run_chunk<Fp16>(chunk, plan, w, weights, t, stream)
                                                        : run_chunk<Bf16>(chunk, plan, w, weights, t, stream);
        if (error) return error;
    }
    return 0;
}

// The same without a shared expert, without integers, without a pool.
extern "C" int64_t dmoe_experts_workspace_bytes(const DmoeExpertsShape *shape) {
    return dmoe_mixture_workspace_bytes(shape, nullptr);
}

extern "C" int dmoe_experts_quantised(const DmoeExpertsShape *shape, const DmoeQuantisation *quantisation,
                                      const DmoeExpertPool *pool, const void *hidden, const int32_t *expert_ids,
                                      const float *expert_weights, const void *gate_up, const void *down, void *mixed,
                                      void *workspace, void *stream) {
    return dmoe_mixture(shape, nullptr, quantisation, pool, hidden, expert_ids, expert_weights, gate_up, down, mixed,
                        workspace, stream);
}

extern "C" int dmoe_experts_resident(const DmoeExpertsShape *shape, const DmoeExpertPool *pool, const void *hidden,
                                     const int32_t *expert_ids, const float *expert_weights, const void *gate_up,
                                     const void *down, void *mixed, void *workspace, void *stream) {
    return dmoe_mixture(shape, nullptr, nullptr, pool, hidden, expert_ids, expert_weights, gate_up, down, mixed,
                        workspace, stream);
}

extern "C" int dmoe_experts(const DmoeExpertsShape *shape, const void *hidden, const int32_t *expert_ids,
                            const float *expert_weights, const void *gate_up, const void *down, void *mixed,
                            void *workspace, void *stream) {
    return dmoe_mixture(shape, nullptr, nullptr, nullptr, hidden, expert_ids, expert_weights, gate_up, down, mixed,
                        workspace, stream);
}
