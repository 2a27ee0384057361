// Attention of new tokens over cached and new keys (dmoe_export/ops/attention/__init__.py).
#pragma once

#include "experts.h"

namespace dmoe::cpu {

// One call of the op. share · T queries of a key head: those of its query heads one after the other.
struct Attention {
    Format values; // of everything but the bias: kFloat or kHalf
    int32_t rows, heads, share, tokens, past, columns; // B, Hkv, share, T, S, D
    int32_t biasTokens; // 1 or T
    void const* q; // [B, Hkv, share · T, D]
    void const* key; // [B, Hkv, T, D]
    void const* value;
    void const* pastKey; // [B, Hkv, S, D]
    void const* pastValue;
    float const* bias; // [B, biasTokens, S + T]
    void* mixed; // [B, Hkv, share · T, D]
};

void runAttention(Attention const& call, Parallel parallel, void* pool);

} // namespace dmoe::cpu
