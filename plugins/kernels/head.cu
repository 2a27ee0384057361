// dmoe_head: arguments checked, wanted tokens in chunks, three launches per chunk.
#include "dmoe_kernels.h"
#include "head_finish.cuh"
#include "head_gather.cuh"
#include "head_product.cuh"

using namespace dmoe;

namespace {

constexpr int kChunk = 1024;                // wanted tokens at a time; bounds the workspace
constexpr int kMaxHidden = 1 << 18;         // keeps every 32-bit index in range, as the other bounds
constexpr int kMaxVocabulary = 1 << 24;
constexpr int64_t kMaxTokens = 1ll << 30;

struct Workspace {
    int64_t normed, best, sum, bytes;
};

int tiles_of(const DmoeHeadShape &s) { return (s.vocabulary + kHeadRows - 1) / kHeadRows; }

int64_t wanted_of(const DmoeHeadShape &s) { return static_cast<int64_t>(s.rows) * s.wanted; }

Workspace workspace_of(const DmoeHeadShape &s) {
    const int64_t count = min(wanted_of(s), static_cast<int64_t>(kChunk));
    Workspace w{};
    const auto part = [&w](int64_t bytes) {
        const int64_t at = w.bytes;
        w.bytes += (bytes + 255) / 256 * 256;
        return at;
    };
    w.normed = part(count * s.hidden * 2);
    w.best = part(count * tiles_of(s) * 8);
    w.sum = part(count * tiles_of(s) * 4);
    return w;
}

int check(const DmoeHeadShape &s) {
    if (s.rows < 0 || s.wanted < 0 || s.tokens < 0 || (wanted_of(s) > 0 && s.tokens < 1) || s.kept < 0 ||
        s.kept > s.wanted || s.hidden < 8 || s.hidden % 8 || s.hidden > kMaxHidden || s.vocabulary < 2 ||
        s.vocabulary > kMaxVocabulary || wanted_of(s) > kMaxTokens ||
        static_cast<int64_t>(s.rows) * s.tokens > kMaxTokens) {
        return DMOE_ERROR_SHAPE;
    }
    return s.type == DMOE_TYPE_FP16 || s.type == DMOE_TYPE_BF16 ? 0 : DMOE_ERROR_TYPE;
}

template <class Half, int TILES, int COLUMNS>
int launch_head(const HeadArguments &a, void *stream) {
    using V = HeadVariant<TILES, COLUMNS>;
    constexpr auto kernel = head_kernel<Half, TILES, COLUMNS>;
    const int items = (a.vocabulary + kHeadRows - 1) / kHeadRows * ((a.count + V::kTokens - 1) / V::kTokens);
    const int resident = max(1, resident_blocks<kernel>(V::kThreads, V::kRingBytes));
    // No more thread blocks than give each the same number of items: they share the memory's speed, so all end together.
    const int rounds = (items + resident - 1) / resident;
    return launch<kernel>(dim3((items + rounds - 1) / rounds), V::kThreads, stream, a, {V::kRingBytes, true});
}

// The least tokens per pass that take all of them in one, as far as a thread block here can have the shared memory.
template <class Half>
int launch_product(const HeadArguments &a, void *stream) {
    const int shared = shared_bytes_per_block();
    if (a.count > 64 && shared >= HeadVariant<8, 2>::kSharedBytes) return launch_head<Half, 8, 2>(a, stream);
    if (a.count > 32 && shared >= HeadVariant<8, 1>::kSharedBytes) return launch_head<Half, 8, 1>(a, stream);
    return launch_head<Half, 4, 1>(a, stream);
}

struct Tensors {
    const void *hidden, *norm, *weight;
    const int64_t *logit_rows;
    int64_t *token_ids;
    float *confidence, *logits;
    char *workspace;
};

template <class Half>
int run_chunk(const DmoeHeadShape &s, const DmoeHeadAttributes &at, const Tensors &t, int first, int count, void *stream) {
    const Workspace w = workspace_of(s);
    auto *const normed = reinterpret_cast<uint4 *>(t.workspace + w.normed);
    auto *const best = reinterpret_cast<uint64_t *>(t.workspace + w.best);
    auto *const sum = reinterpret_cast<float *>(t.workspace + w.sum);

    const GatherArguments gather{static_cast<const uint4 *>(t.hidden), static_cast<const uint4 *>(t.norm), t.logit_rows,
                                 first, s.wanted, s.tokens, s.hidden / 8, at.eps, normed};
    if (const int error = launch<gather_kernel<Half>>(dim3(count), kGatherThreads, stream, gather, {0, true})) return error;

    const HeadArguments a{static_cast<const uint4 *>(t.weight), normed, s.vocabulary, s.hidden / 8, at.mask_id, first,
                          count, s.wanted, s.kept, best, sum, t.logits};
    if (const int error = launch_product<Half>(a, stream)) return error;

    const FinishArguments finish{best, sum, tiles_of(s), t.token_ids + first, t.confidence + first};
    return launch<finish_kernel>(dim3(count), kFinishThreads, stream, finish, {0, true});
}

bool usable(const void *pointer, uintptr_t alignment = 16) {
    return pointer && reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

}  // namespace

extern "C" int64_t dmoe_head_workspace_bytes(const DmoeHeadShape *shape) {
    if (!shape) return DMOE_ERROR_POINTER;
    const int error = check(*shape);
    return error ? error : workspace_of(*shape).bytes;
}

extern "C" int dmoe_head(const DmoeHeadShape *shape, const DmoeHeadAttributes *attributes, const void *hidden,
                         const void *norm, const void *weight, const int64_t *logit_rows, int64_t *token_ids,
                         float *confidence, float *logits, void *workspace, void *stream) {
    if (!shape || !attributes) return DMOE_ERROR_POINTER;
    if (const int error = check(*shape)) return error;
    if (wanted_of(*shape) == 0) return 0;  // tensors without elements have no address
    if (!usable(hidden) || !usable(norm) || !usable(weight) || !usable(logit_rows) || !usable(token_ids) ||
        !usable(confidence) || (shape->kept && !usable(logits)) || !usable(workspace, 256)) {
        return DMOE_ERROR_POINTER;
    }
    if (shape->type == DMOE_TYPE_BF16 && !bf16_runs_here()) return DMOE_ERROR_TYPE;
    const Tensors t{hidden, norm, weight, logit_rows, token_ids, confidence, logits, static_cast<char *>(workspace)};
    for (int64_t first = 0; first < wanted_of(*shape); first += kChunk) {
        const int at = static_cast<int>(first);
        const int count = static_cast<int>(min(static_cast<int64_t>(kChunk), wanted_of(*shape) - first));
        const int error = shape->type == DMOE_TYPE_FP16 ? run_chunk<Fp16>(*shape, *attributes, t, at, count, stream)
                                                        : run_chunk<Bf16>(*shape, *attributes, t, at, count, stream);
        if (error) return error;
    }
    return 0;
}
