// What a processor multiplies weights with, and in what form it wants activations for it.
#pragma once

#include "experts.h"

extern "C" {

// What products of weights of this format (dmoe::cpu::Format by number) run on here, such as "float32"; with `fast`, where
// activations may be rounded. Empty for a number that is no format.
__attribute__((visibility("default"))) char const* dmoe_cpu_products(int32_t format, int32_t fast);
}

namespace dmoe::cpu {

// Ways to compute out[t][r − first] = Σ_k matrix[r, k] · x[t][k] for rows first … last − 1 and `tokens` vectors x.
// Exact: in float32. Fast: x is rounded, so that integer or bfloat16 instructions can multiply it.
//   int8, int4: every group of a token to q = round(x · 127 / max|x|), −127 … 127, and a scale max|x| / 127 in float32; sums
//     of a group are exact, those over groups in float32. A group with a value that is not finite is NaN.
//   bfloat16: to nearest, ties to even; sums in float32. Subnormal numbers count as zero.
// Each result is one sum in a fixed order. Exact products have the same for any number of tokens; of fast ones it depends on
// that number: on whether there are more than `few`, and with integers than a quarter and half of the lanes of a vector.
struct Products {
    char const* name;
    int32_t few; // up to so many tokens meet a matrix one by one; more in panels, in which they lie side by side
    int32_t panelTokens; // of a panel; the last one has half the width if that is enough
    int32_t rowBlock; // rows that meet a panel at a time
    int32_t unpackedBytes; // of a value of such rows
    int64_t (*tokenBytes)(Matrix const& matrix); // of a narrowed token, alone or in a panel
    void (*narrow)(Matrix const& matrix, float const* x, uint8_t* narrowed); // null: float32 as it lies
    // Panel `index` of `tokens` narrowed ones; `panels` has room for so many, rounded up to a panel.
    void (*pack)(Matrix const& matrix, void const* const* narrowed, int32_t tokens, int32_t index, uint8_t* panels);
    void (*product)(Matrix const& matrix, int32_t first, int32_t last, void const* const* narrowed, int32_t tokens,
        float* const* out);
    // `unpacked` has room for rowBlock rows of unpackedBytes, and one more.
    void (*panelProduct)(Matrix const& matrix, int32_t first, int32_t last, uint8_t const* panels, int32_t tokens,
        uint8_t* unpacked, float* const* out);
};

// For weights of a format; the exact ones where a processor has no fast ones. Of a matrix they read before `product` what
// is not in memory: format, group and columns.
Products const& productsOf(Format format, bool fast);
Products const* fastProducts(Format format); // null where there are none (isa.cpp)

// Panels that so many tokens make, 0 for few, and tokens that have room in them.
inline int32_t panelCount(Products const& p, int32_t tokens)
{
    return tokens > p.few ? (tokens + p.panelTokens - 1) / p.panelTokens : 0;
}
inline int32_t panelRoom(Products const& p, int32_t tokens) { return panelCount(p, tokens) * p.panelTokens; }

} // namespace dmoe::cpu
