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

// At most so many rows in one call of an instruction set's panelProduct: what its second-level cache keeps beside a panel.
constexpr int32_t kPanelRows = 20;

// `lost` says that a weight could not be read, then and before (lost_pages.h).
void runLinear(Linear const& call, Parallel parallel, void* pool, std::atomic<bool>& lost);

} // namespace dmoe::cpu
