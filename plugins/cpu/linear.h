// A linear layer of a few tokens: y = x · Wᵀ + b in float32, the weights as they lie in their file.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

struct Linear {
    int32_t tokens, columns, rows;
    float const* x; // [tokens, columns]
    float const* weight; // [rows, columns]
    float const* bias; // [rows], or null
    float* y; // [tokens, rows]
};

// `lost` says that a weight could not be read, then and before (lost_pages.h).
void runLinear(Linear const& call, Parallel parallel, void* pool, std::atomic<bool>& lost);

} // namespace dmoe::cpu
