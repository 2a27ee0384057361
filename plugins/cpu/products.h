// What a processor multiplies weights with.
#pragma once

#include <cstdint>

extern "C" {

// What products of weights of this format (dmoe::cpu::Format by number) run on here, such as "float32"; with `fast`, where
// activations may be rounded. Empty for a number that is no format.
__attribute__((visibility("default"))) char const* dmoe_cpu_products(int32_t format, int32_t fast);
}
