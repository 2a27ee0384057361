// A linear layer of a few tokens: y = x · Wᵀ + b, the weights as they lie in their file.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

// All arrays in one format, kFloat or kHalf; sums are in float32.
struct Linear {
    Format format;
    int32_t tokens, columns, rows;
    void const* x; // [tokens, columns]
    void const* weight; // [rows, columns]
    void const* bias; // [rows], or null
    void* y; // [tokens, rows]
};

// `lost` says that a weight could not be read, then and before (lost_pages.h).
void runLinear(Linear const& call, Parallel parallel, void* pool, std::atomic<bool>& lost);

} // namespace dmoe::cpu
