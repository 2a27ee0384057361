// dmoe_candidates: arguments checked, two launches.
#include "candidates.cuh"

#include "dmoe_kernels.h"

using namespace dmoe;

namespace {

constexpr int kMaxVocabulary = 1 << 24;

int group_of(int vocabulary) {
    const int units = (vocabulary + kGroupUnit - 1) / kGroupUnit;
    return (units + kMostGroups - 1) / kMostGroups * kGroupUnit;
}

int groups_of(int vocabulary) { return (vocabulary + group_of(vocabulary) - 1) / group_of(vocabulary); }

int64_t places_of(const DmoeCandidatesShape &s) { return static_cast<int64_t>(s.rows) * s.wanted; }

int check(const DmoeCandidatesShape &s) {
    const bool sizes = s.rows >= 0 && s.wanted >= 0 && s.kept >= s.wanted && s.vocabulary >= 2 &&
                       s.vocabulary <= kMaxVocabulary && s.candidates >= 1 && s.candidates <= kMostCandidates;
    return sizes && places_of(s) * groups_of(s.vocabulary) <= 1ll << 30 ? 0 : DMOE_ERROR_SHAPE;
}

bool usable(const void *pointer, uintptr_t alignment = 16) {
    return pointer && reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

}  // namespace

extern "C" int64_t dmoe_candidates_workspace_bytes(const DmoeCandidatesShape *shape) {
    if (!shape) return DMOE_ERROR_POINTER;
    const int error = check(*shape);
    return error ? error : places_of(*shape) * groups_of(shape->vocabulary) * 4;
}

extern "C" int dmoe_candidates(const DmoeCandidatesShape *shape, int32_t mask_id, const float *logits,
                               int32_t *token_ids, float *values, void *workspace, void *stream) {
    if (!shape) return DMOE_ERROR_POINTER;
    if (const int error = check(*shape)) return error;
    if (places_of(*shape) == 0) return 0;  // tensors without elements have no address
    if (!usable(logits) || !usable(token_ids) || !usable(values) || !usable(workspace, 256)) return DMOE_ERROR_POINTER;
    const int group = group_of(shape->vocabulary), groups = groups_of(shape->vocabulary);
    const CandidatesArguments a{logits, shape->wanted, shape->kept, shape->vocabulary, mask_id, shape->candidates,
                                group, groups, static_cast<uint32_t *>(workspace), token_ids, values};
    const int places = static_cast<int>(places_of(*shape));
    const dim3 grid(places, (groups + kGroupsAtOnce - 1) / kGroupsAtOnce);
    if (const int error = launch(candidates_best_kernel, grid, kBestThreads, stream, a)) return error;
    return launch<candidates_rank_kernel>(dim3(places), kRankThreads, stream, a, {0, true});
}
