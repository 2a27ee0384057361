// Which variant of the products a call takes, and its launch. Compiled in three files, because it is most of the work:
// experts.cu has the 16-bit weights, experts_quantised.cu the others, experts_large.cu many tokens.
#pragma once

#include "dmoe_kernels.h"
#include "experts_large_fill.cuh"
#include "experts_product.cuh"

namespace dmoe {

constexpr int kChunkPairs = 8192;  // of one launch, at most; shared memory holds a list of them

// With how many stages a thread block still shares its processor with a second one.
template <int TILES>
constexpr int kFewestStages = TILES == 4 ? 3 : 2;

// Whether a ring fits, its size then in `a`, into the current device's shared memory beside the lists. Two thread blocks
// per processor if each gets `fewest` stages, else one.
template <int BITS, int TILES>
bool ring_fits(ProductArguments &a, int lists, int fewest) {
    const auto most = [](int x, int y) { return x < y ? y : x; };
    a.stage_bytes = most(kStageBytes<BITS, TILES>, kExchangeBytes<TILES>);
    if (a.shared_rows) a.stage_bytes = most(a.stage_bytes, kStageBytes<16, TILES>);
    a.stage_bytes = (a.stage_bytes + 127) / 128 * 128;
    const auto stages_in = [&](int bytes) { return min(kMostStages, (bytes - lists - kStaticBytes) / a.stage_bytes); };
    a.stages = stages_in(shared_bytes_per_processor() / 2 - 1024);
    if (a.stages < fewest) a.stages = stages_in(shared_bytes_per_block());
    return a.stages >= 2;
}

template <class Half, int BITS, int TILES, bool GATE>
int launch_variant(const ProductArguments &a, int lists, void *stream) {
    constexpr auto kernel = product_kernel<Half, BITS, TILES, GATE>;
    const LaunchOptions options{a.stages * a.stage_bytes + lists, true};
    // At most: how many experts are active is not known here.
    const int items = min(a.experts, pair_count(a)) * static_cast<int>(a.tiles.by) + shared_items<TILES>(a);
    const int blocks = max(1, min(items, resident_blocks<kernel>(kProductThreads, options.shared)));
    return launch<kernel>(dim3(blocks), kProductThreads, stream, a, options);
}

// Tiles per pass and stages are the device's and the call's affair: they change no bits.
template <class Half, int BITS, bool GATE>
int launch_product(ProductArguments a, void *stream) {
    const auto tiles = [](int rows) { return Divisor(max(1, (rows + kTileRows - 1) / kTileRows)); };
    a.tiles = tiles(a.rows), a.shared_tiles = tiles(a.shared_rows);
    const int lists = list_bytes(a.experts, pair_count(a));
    if (a.tokens > 32 && ring_fits<BITS, 8>(a, lists, kFewestStages<8>)) return launch_variant<Half, BITS, 8, GATE>(a, lists, stream);
    if (ring_fits<BITS, 4>(a, lists, kFewestStages<4>)) return launch_variant<Half, BITS, 4, GATE>(a, lists, stream);
    return DMOE_ERROR_SHAPE;
}

// As launch_product, with weights of `bits` bits, 4 or 8.
template <class Half, bool GATE>
int launch_quantised_product(int bits, const ProductArguments &a, void *stream);

// How many stages of the ring for many tokens fit into the current device's shared memory beside the lists; it takes at
// least two.
template <int BITS>
int large_stages(int lists) {
    return min(kMostStages, (shared_bytes_per_block() - lists - kStaticBytes) / kLargeStageBytes<BITS>);
}
inline int large_stages(int bits, int lists) {
    return bits == 16 ? large_stages<16>(lists) : bits == 8 ? large_stages<8>(lists) : large_stages<4>(lists);
}

// As launch_product, for many tokens and weights of 16, 8 or 4 bits: the same bits.
template <class Half, bool GATE>
int launch_large_product(int bits, const LargeArguments &a, void *stream);

}  // namespace dmoe
