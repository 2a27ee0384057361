// The names of the products that weights meet activations in, for people.
#include "products.h"

#include "experts.h"

char const* dmoe_cpu_products(int32_t format, int32_t fast)
{
    static_cast<void>(fast); // all products are in float32 yet
    return format >= 0 && format <= static_cast<int32_t>(dmoe::cpu::Format::kBFloat) ? "float32" : "";
}
