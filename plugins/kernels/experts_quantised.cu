// The products with weights of 8 and 4 bits.
#include "experts_launch.cuh"

namespace dmoe {

template <class Half, bool GATE>
int launch_quantised_product(int bits, const ProductArguments &a, int tokens, void *stream) {
    return bits == 8 ? launch_product<Half, QuantisedRows<Half, 8>, GATE>(a, tokens, stream)
                     : launch_product<Half, QuantisedRows<Half, 4>, GATE>(a, tokens, stream);
}

template int launch_quantised_product<Fp16, true>(int, const ProductArguments &, int, void *);
template int launch_quantised_product<Fp16, false>(int, const ProductArguments &, int, void *);
template int launch_quantised_product<Bf16, true>(int, const ProductArguments &, int, void *);
template int launch_quantised_product<Bf16, false>(int, const ProductArguments &, int, void *);

}  // namespace dmoe
