// How the products cut a call, the size of their rings and the layout, for tests that count bytes under way and accesses.
#include "../kernels/experts_plan.cuh"
#include "dmoe_emulation.h"

namespace {

template <int BITS, int TILES>
int ring(int lists, int32_t *out) {
    dmoe::ProductArguments a{};
    a.shared_rows = 64;
    if (!dmoe::ring_fits<BITS, TILES>(a, lists, dmoe::kFewestStages<TILES>)) return DMOE_ERROR_SHAPE;
    out[0] = a.stages;
    out[1] = dmoe::kTokensAt<BITS>;
    out[2] = a.stages * a.stage_bytes + lists + dmoe::kStaticBytes <= dmoe::shared_bytes_per_processor() / 2 - 1024 ? 2 : 1;
    return 0;
}

template <int BITS>
int place(int32_t kind, int32_t row, int32_t unit) {
    if (kind == 1) return dmoe::token_place<BITS>(row, unit);
    if (kind == 2) return dmoe::scale_place<BITS, 4>(row, unit);
    return BITS == 16 ? dmoe::weight_place(row, unit) : dmoe::block_place<BITS>(row, unit);
}

}  // namespace

extern "C" int dmoe_emulation_place(int32_t kind, int32_t bits, int32_t row, int32_t unit) {
    return bits == 16 ? place<16>(kind, row, unit) : bits == 8 ? place<8>(kind, row, unit) : place<4>(kind, row, unit);
}

extern "C" int dmoe_emulation_ring(int32_t bits, int32_t tiles, int32_t experts, int32_t pairs, int32_t *out) {
    const int lists = dmoe::list_bytes(experts, pairs);
    switch (bits * 10 + tiles) {
        case 164: return ring<16, 4>(lists, out);
        case 168: return ring<16, 8>(lists, out);
        case 84: return ring<8, 4>(lists, out);
        case 88: return ring<8, 8>(lists, out);
        case 44: return ring<4, 4>(lists, out);
        case 48: return ring<4, 8>(lists, out);
        default: return DMOE_ERROR_ATTRIBUTE;
    }
}

extern "C" int dmoe_emulation_plan(const DmoeExpertsShape *shape, int32_t bits, int32_t *plan) {
    const dmoe::Plan p = dmoe::plan_of(*shape, bits);
    const int tokens = min(p.tokens, shape->tokens);
    plan[0] = p.large, plan[1] = p.tokens, plan[2] = p.down_rows;
    plan[3] = p.large ? dmoe::large_stages(bits, dmoe::list_bytes(shape->experts, tokens * shape->places)) : 0;
    return 0;
}

extern "C" int dmoe_emulation_large_place(int32_t row, int32_t unit) { return dmoe::large_place(row, unit); }
