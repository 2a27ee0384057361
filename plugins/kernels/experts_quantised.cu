// The products with weights of 8 and 4 bits.
#include "experts_launch.cuh"

namespace dmoe {

template <class Half, bool GATE>
int launch_quantised_product(int bits, const ProductArguments &a, void *stream) {
    return bits == 8 ? launch_product<Half, 8, GATE>(a, stream) : launch_product<Half, 4, GATE>(a, stream);
}

template int launch_quantised_product<Fp16, true>(int, const ProductArguments &, void *);
template int launch_quantised_product<Fp16, false>(int, const ProductArguments &, void *);
template int launch_quantised_product<Bf16, true>(int, const ProductArguments &, void *);
template int launch_quantised_product<Bf16, false>(int, const ProductArguments &, void *);

}  // namespace dmoe
