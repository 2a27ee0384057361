// Fast products: activations are rounded so that a processor's integer or bfloat16 instructions can multiply them.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

// What depends on the instruction set. Activations of a token are narrowed once; up to `few` tokens meet a matrix as they are
// then, more in panels of `panelTokens`, one after the other, the last one of half the width if that is enough.
//   int8, int4: every group of a token to q = round(x · 127 / max|x|), −127 … 127, and a scale max|x| / 127 in float32; sums
//     of a group are exact, those over groups in float32. A group with a value that is not finite is NaN.
//   bfloat16: rounded to nearest, ties to even; sums in float32. Subnormal numbers count as zero.
// Each result is one sum in a fixed order: it depends on the other tokens only by whether there are more than `few`.
struct FastProducts {
    char const* name; // of the instructions
    char const* form; // that activations get: "int8", "bfloat16"
    int32_t few, panelTokens;
    int32_t unpackedRows; // of bytes that `unpacked` below has room for; 0: none are
    int64_t (*narrowBytes)(Matrix const& matrix); // of a token, whole cache lines; a token in a panel has as many
    void (*narrow)(Matrix const& matrix, float const* x, uint8_t* narrowed);
    // Panel `index` of `tokens` narrowed ones. `panels` has room for so many, rounded up to a panel.
    void (*pack)(Matrix const& matrix, uint8_t const* const* narrowed, int32_t tokens, int32_t index, uint8_t* panels);
    // out[t][r − first] as in InstructionSet; both need of the matrix all it has.
    void (*product)(Matrix const& matrix, int32_t first, int32_t last, uint8_t const* const* narrowed, int32_t tokens,
        float* const* out);
    void (*panelProduct)(Matrix const& matrix, int32_t first, int32_t last, uint8_t const* panels, int32_t tokens,
        uint8_t* unpacked, float* const* out);
};

// The best that this processor has for weights of a format; null where they have none: the exact ones are taken then.
FastProducts const* fastProducts(Format format);

} // namespace dmoe::cpu
