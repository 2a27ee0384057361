// A linear layer of a few tokens: y = x · Wᵀ + b, the weights as they lie in their file.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

// Sums are in float32.
struct Linear {
    Format values; // of x, scales, bias and y: kFloat or kHalf
    Format weights;
    int32_t groupShift; // of quantised weights: group = 1 << groupShift
    bool fast; // integer or bfloat16 products are allowed, where there are any
    int32_t tokens, columns, rows;
    void const* x; // [tokens, columns]
    void const* weight; // [rows, columns], quantised ones packed as in dmoe_export/ops/experts/__init__.py
    void const* scales; // [rows, columns / group], or null
    void const* bias; // [rows], or null
    void* y; // [tokens, rows]
};

// `lost` says that a weight could not be read, then and before (lost_pages.h).
void runLinear(Linear const& call, Parallel parallel, void* pool, std::atomic<bool>& lost);

} // namespace dmoe::cpu
