// Which instruction set's products are taken: the best that this processor has. DMOE_CPU_ISA=name takes none above that one.
#include "products.h"

#include <cstdlib>
#include <initializer_list>
#include <string>
#include <utility>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dmoe::cpu {

extern InstructionSet const kGeneric;
#if defined(__x86_64__)
extern InstructionSet const kAvx2, kAvx512;
#endif

// Null where the compiler was too old for their file (CMakeLists.txt).
#define DMOE_OPTIONAL extern __attribute__((weak)) Products const
#if defined(__x86_64__)
DMOE_OPTIONAL kAvx2Integer, kAvxVnni, kAvx512Vnni, kAvx512Bf16;
#elif defined(__aarch64__)
DMOE_OPTIONAL kNeonDotprod;
#endif

namespace {

// In the order of what DMOE_CPU_ISA allows.
enum Level { kBase, kHasAvx2, kHasAvxVnni, kHasAvx512, kHasAvx512Vnni, kHasAvx512Bf16, kHasDotprod, kLevels };
constexpr char const* kNames[] = {"generic", "avx2", "avx-vnni", "avx512", "avx512-vnni", "avx512-bf16", "neon-dotprod"};

bool processorHas(Level level)
{
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kAvxVnniBit = 1u << 4;
    bool const avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool const avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (level) {
    case kBase: return true;
    case kHasAvx2: return avx2;
    case kHasAvxVnni: return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnniBit) != 0;
    case kHasAvx512: return avx512;
    case kHasAvx512Vnni: return avx512 && __builtin_cpu_supports("avx512vnni");
    case kHasAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    default: return false;
    }
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long kDotprodBit = 1ul << 20; // HWCAP_ASIMDDP
    return level == kBase || (level == kHasDotprod && (getauxval(AT_HWCAP) & kDotprodBit) != 0);
#else
    return level == kBase;
#endif
}

struct Processor {
    bool has[kLevels];
    Processor()
    {
        char const* const wanted = std::getenv("DMOE_CPU_ISA");
        int32_t most = wanted ? kBase : kLevels - 1;
        for (int32_t level = 0; wanted && level < kLevels; ++level) {
            most = std::string(wanted) == kNames[level] ? level : most;
        }
        for (int32_t level = 0; level < kLevels; ++level) {
            has[level] = level <= most && processorHas(static_cast<Level>(level));
        }
    }
};

bool has(Level level)
{
    static Processor const processor;
    return processor.has[level];
}

} // namespace

InstructionSet const& instructionSet()
{
#if defined(__x86_64__)
    static InstructionSet const& chosen = has(kHasAvx512) ? kAvx512 : has(kHasAvx2) ? kAvx2 : kGeneric;
    return chosen;
#else
    return kGeneric;
#endif
}

Products const* fastProducts(Format format)
{
    [[maybe_unused]] auto const first = [](std::initializer_list<std::pair<Level, Products const*>> all) -> Products const* {
        for (auto const& [level, products] : all) {
            if (products && has(level)) {
                return products;
            }
        }
        return nullptr;
    };
    bool const integers = format == Format::kInt8 || format == Format::kInt4;
#if defined(__x86_64__)
    if (integers) {
        return first({{kHasAvx512Vnni, &kAvx512Vnni}, {kHasAvxVnni, &kAvxVnni}, {kHasAvx2, &kAvx2Integer}});
    }
    return format == Format::kBFloat ? first({{kHasAvx512Bf16, &kAvx512Bf16}}) : nullptr;
#elif defined(__aarch64__)
    return integers ? first({{kHasDotprod, &kNeonDotprod}}) : nullptr;
#else
    static_cast<void>(integers);
    return nullptr;
#endif
}

} // namespace dmoe::cpu
