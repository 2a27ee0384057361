// Which variant of the products a call takes, and its launch. Compiled in two files, because it is most of the work:
// experts.cu has the 16-bit weights, experts_quantised.cu the others.
#pragma once

#include "experts_product.cuh"

namespace dmoe {

constexpr int kSplitDepth = 2048;  // from this depth on the warps of a block share 16 rows

template <class Half, class Rows, int TILES, int SPLIT, bool GATE>
int launch_variant(const ProductArguments &a, int pair_count, void *stream) {
    constexpr auto kernel = product_kernel<Half, Rows, TILES, SPLIT, GATE>;
    const int row_tiles = (a.rows + 64 / SPLIT - 1) / (64 / SPLIT);
    const int items = min(a.experts, pair_count) * row_tiles;  // at most: how many experts are active is not known here
    const int blocks = max(1, min(items, resident_blocks<kernel>(kProductThreads)));
    return launch(kernel, dim3(blocks), kProductThreads, stream, a);
}

template <class Half, class Rows, bool GATE>
int launch_product(const ProductArguments &a, int tokens, void *stream) {
    const int pairs = tokens * a.places;
    // The split depends on the depth alone, so a token's bits do not depend on how many others there are.
    if (a.depth >= kSplitDepth) {
        return tokens <= 32 ? launch_variant<Half, Rows, 4, 4, GATE>(a, pairs, stream)
                            : launch_variant<Half, Rows, 8, 4, GATE>(a, pairs, stream);
    }
    return tokens <= 32 ? launch_variant<Half, Rows, 4, 1, GATE>(a, pairs, stream)
                        : launch_variant<Half, Rows, 8, 1, GATE>(a, pairs, stream);
}

// As launch_product, with weights of `bits` bits, 4 or 8.
template <class Half, bool GATE>
int launch_quantised_product(int bits, const ProductArguments &a, int tokens, void *stream);

}  // namespace dmoe
