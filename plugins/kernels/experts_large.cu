// The products for many tokens.
#include "experts_large.cuh"
#include "experts_launch.cuh"

namespace dmoe {

template <class Half, int BITS, bool GATE>
int launch_large_variant(const LargeArguments &arguments, void *stream) {
    constexpr auto kernel = large_product_kernel<Half, BITS, GATE>;
    LargeArguments a = arguments;
    const auto tiles = [](int rows) { return Divisor(max(1, (rows + kLargeRows - 1) / kLargeRows)); };
    a.tiles = tiles(a.rows), a.shared_tiles = tiles(a.shared_rows);
    const int lists = list_bytes(a.experts, pair_count(a));
    a.stages = large_stages<BITS>(lists);
    if (a.stages < 2) return DMOE_ERROR_SHAPE;
    const LaunchOptions options{a.stages * kLargeStageBytes<BITS> + lists, true};
    // At most: how many experts are active is not known here.
    const int items = min(a.experts, pair_count(a)) * static_cast<int>(a.tiles.by) + shared_items<kLargeTiles>(a);
    const int blocks = max(1, min(items, resident_blocks<kernel>(kProductThreads, options.shared)));
    return launch<kernel>(dim3(blocks), kProductThreads, stream, a, options);
}

template <class Half, bool GATE>
int launch_large_product(int bits, const LargeArguments &a, void *stream) {
    return bits == 16  ? launch_large_variant<Half, 16, GATE>(a, stream)
           : bits == 8 ? launch_large_variant<Half, 8, GATE>(a, stream)
                       : launch_large_variant<Half, 4, GATE>(a, stream);
}

template int launch_large_product<Fp16, true>(int, const LargeArguments &, void *);
template int launch_large_product<Fp16, false>(int, const LargeArguments &, void *);
template int launch_large_product<Bf16, true>(int, const LargeArguments &, void *);
template int launch_large_product<Bf16, false>(int, const LargeArguments &, void *);

}  // namespace dmoe
