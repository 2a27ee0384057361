// dmoe_add_norm: arguments checked, one launch.
#include "add_norm.cuh"

#include "dmoe_kernels.h"

using namespace dmoe;

namespace {

bool usable(const void *pointer) { return pointer && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

extern "C" int dmoe_add_norm(const DmoeAddNormShape *shape, float eps, const void *x, const void *delta,
                             const void *weight, void *total, void *normed, void *stream) {
    if (!shape) return DMOE_ERROR_POINTER;
    if (shape->type != DMOE_TYPE_FP16 && shape->type != DMOE_TYPE_BF16) return DMOE_ERROR_TYPE;
    if (shape->tokens < 0 || shape->hidden < 8 || shape->hidden % 8 != 0 || shape->hidden > 1 << 18) {
        return DMOE_ERROR_SHAPE;
    }
    if (!(eps >= 0.0f)) return DMOE_ERROR_ATTRIBUTE;
    if (shape->tokens == 0) return 0;
    if (!usable(x) || !usable(delta) || !usable(weight) || !usable(total) || !usable(normed)) return DMOE_ERROR_POINTER;
    if (shape->type == DMOE_TYPE_BF16 && !bf16_runs_here()) return DMOE_ERROR_TYPE;
    const int units = shape->hidden / 8, threads = min(kAddNormThreads, (units + kWarp - 1) / kWarp * kWarp);
    const AddNormArguments a{static_cast<const uint4 *>(x),
                             static_cast<const uint4 *>(delta),
                             static_cast<const uint4 *>(weight),
                             static_cast<uint4 *>(total),
                             static_cast<uint4 *>(normed),
                             units,
                             static_cast<float>(shape->hidden),
                             eps};
    return shape->type == DMOE_TYPE_FP16
               ? launch<add_norm_kernel<Fp16>>(dim3(shape->tokens), threads, stream, a, LaunchOptions{0, true})
               : launch<add_norm_kernel<Bf16>>(dim3(shape->tokens), threads, stream, a, LaunchOptions{0, true});
}
