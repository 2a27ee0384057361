// dmoe_error_string and dmoe_build_id.
#include "device.cuh"
#include "dmoe_build_id.h"  // written by the build: cmake/build_id.cmake
#include "dmoe_kernels.h"

extern "C" const char *dmoe_error_string(int code) {
    switch (code) {
        case 0: return "no error";
        case DMOE_ERROR_SHAPE: return "a size is outside the kernel's limits: experts 1..1024, at most 65535 rows, "
                                      "hidden size and expert width multiples of 8, slots 1..experts, a vocabulary of 2..2^24; "
                                      "attention: heads a multiple of key heads, a head of 8..256 dimensions in "
                                      "eights, an even number of them rotated, at least one cached place";
        case DMOE_ERROR_ATTRIBUTE: return "an attribute does not fit: block length 1..256, experts per token 1..32, "
                                          "groups a divisor of the experts, kept groups 1..groups; an activation "
                                          "that is silu or gelu_tanh; quantised "
                                          "weights of 4 or 8 bits in groups of 32, 64 or 128 that divide hidden size "
                                          "and expert width; attention: block length 0 or more, eps above 0";
        case DMOE_ERROR_TYPE: return "the element type is not fp16 or bf16, or this GPU is too old for bf16 "
                                     "(it needs compute capability 8.0)";
        case DMOE_ERROR_POINTER: return "a tensor pointer is null or not aligned to 16 bytes (workspace: 256)";
        case DMOE_ERROR_EMULATION: return "the emulated thread block was misused; see dmoe_emulation_message()";
        default: return code > 0 ? dmoe::machine_error_string(code) : "unknown error code";
    }
}

extern "C" const char *dmoe_build_id(void) { return DMOE_BUILD_ID; }
