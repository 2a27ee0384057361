// The best of many logits as one 64-bit number: a key that orders floats, above the complement of the token, so that the
// larger number is the larger logit and, of equal ones, the lower token. 0 is below every logit: none was looked at.
#pragma once

#include "device.cuh"

namespace dmoe {

// NaN is above everything, as for torch.max; −0 equals 0.
DMOE_DEVICE uint64_t best_key(float logit, int token) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);
    uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if ((bits & 0x7fffffffu) > 0x7f800000u) ordered = 0xffffffffu;
    return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(token);
}

DMOE_DEVICE int token_of(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

DMOE_DEVICE float logit_of(uint64_t key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

// exp(logit − best). Equal infinities count as equal; a best logit that is not finite has no confidence in the end.
DMOE_DEVICE float weight_below(float logit, float best) { return logit == best ? 1.0f : expf(logit - best); }

DMOE_DEVICE uint64_t lane_max(uint64_t key, int distance) {
    return max(key, __shfl_xor_sync(kWholeWarp, key, distance));
}

}  // namespace dmoe
