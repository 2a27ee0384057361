// Which instruction set's products are taken.
#include "experts.h"

#include <cstdlib>
#include <string>

namespace dmoe::cpu {

extern InstructionSet const kGeneric;
#if defined(__x86_64__)
extern InstructionSet const kAvx2, kAvx512;
#endif

InstructionSet const& instructionSet()
{
    static InstructionSet const& chosen = []() -> InstructionSet const& {
        char const* const wanted = std::getenv("DMOE_CPU_ISA");
        [[maybe_unused]] auto const fits = [&](InstructionSet const& set) {
            return !wanted || std::string(wanted) == set.name;
        };
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && fits(kAvx512)) {
            return kAvx512;
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
            && fits(kAvx2)) {
            return kAvx2;
        }
#endif
        return kGeneric;
    }();
    return chosen;
}

} // namespace dmoe::cpu
