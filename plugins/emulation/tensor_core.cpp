// mma.m16n8k16 and half precision in plain C++ (no CUDA headers, no compiler half types).
#include <cmath>

#include "../kernels/device.cuh"

namespace dmoe::emulation {

float widen_fp16(uint16_t half) {
    static const float *const table = [] {
        static float values[65536];
        for (uint32_t bits = 0; bits < 65536; ++bits) {
            const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
            float value = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                          : exponent < 31  ? std::ldexp(static_cast<float>(fraction + 1024), exponent - 25)
                          : fraction == 0  ? INFINITY
                                           : NAN;
            values[bits] = bits & 0x8000u ? -value : value;
        }
        return values;
    }();
    return table[half];
}

uint16_t narrow_fp16(float value) {
    const uint16_t sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000u);
    const float size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7fffu;
    if (size >= 65520.0f) return sign | 0x7c00u;  // half-way beyond the largest, 65504
    if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
    int exponent;
    const float mantissa = std::frexp(size, &exponent);  // in [0.5, 1)
    // A mantissa that rounds up to 2048 carries into the exponent by itself.
    const int rounded = static_cast<int>(std::nearbyint(mantissa * 2048.0f)) - 1024;
    return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + rounded));
}

uint16_t narrow_bf16(float value) { return Bf16::narrow(value); }

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t), const char *what,
         int line) {
    struct Fragments {
        float a[8], b[4];
    } mine;
    for (int i = 0; i < 8; ++i) mine.a[i] = widen(static_cast<uint16_t>(a[i / 2] >> (16 * (i % 2))));
    for (int i = 0; i < 4; ++i) mine.b[i] = widen(static_cast<uint16_t>(b[i / 2] >> (16 * (i % 2))));
    const auto *all = static_cast<const Fragments *>(warp_exchange(what, line, 0xffffffffu, &mine, sizeof mine));
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, q = static_cast<int>(threadIdx.x) % 4;
    for (int out = 0; out < 4; ++out) {
        const int below = out / 2, column = 2 * q + out % 2;  // row g or g + 8 of c
        float sum = c[out];
        for (int k = 0; k < 16; ++k) {
            // Where k lives: lane of the row (or column) with q = k % 8 / 2, upper registers for k >= 8.
            const int part = k % 8 / 2, half = k / 8, word = k % 2;
            sum += all[g * 4 + part].a[half * 4 + below * 2 + word] * all[column * 4 + part].b[half * 2 + word];
        }
        c[out] = sum;
    }
}

}  // namespace dmoe::emulation
