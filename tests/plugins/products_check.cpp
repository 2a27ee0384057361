// The CPU kernels' products against double, for processors that only an emulator stands for here (test_aarch64.py). Prints the
// products of each format; ends with 1 where a result is wrong.
#include "products.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace dmoe::cpu;

namespace {

std::mt19937 rng(1);
int below(int most) { return static_cast<int>(rng() % static_cast<unsigned>(most)); }

float bfloat(uint16_t bits)
{
    uint32_t const wide = uint32_t{bits} << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
}

double weight(Matrix const& m, int r, int k)
{
    uint8_t const* const row = m.values + r * m.rowBytes;
    double const scale = m.scales[r * (m.columns >> m.groupShift) + (k >> m.groupShift)];
    switch (m.format) {
    case Format::kInt8: return (row[k] - 128) * scale;
    case Format::kInt4: return ((k % 2 ? row[k / 2] >> 4 : row[k / 2] & 15) - 8) * scale;
    case Format::kBFloat: return bfloat(reinterpret_cast<uint16_t const*>(row)[k]);
    default: return reinterpret_cast<float const*>(row)[k];
    }
}

// What a product sees of a token.
std::vector<double> seen(Matrix const& m, float const* x, bool rounded)
{
    std::vector<double> q(x, x + m.columns);
    int const group = 1 << m.groupShift;
    for (int begin = 0; rounded && begin < m.columns; begin += group) {
        float most = 0x1p-100f;
        for (int k = begin; k < begin + group; ++k) {
            most = std::max(most, std::abs(x[k]));
        }
        for (int k = begin; k < begin + group; ++k) {
            volatile float const scaled = x[k] * (127.0f / most); // rounded before it is an integer
            q[k] = std::nearbyint(scaled) * double{most / 127.0f};
        }
    }
    return q;
}

bool right(Format format, bool fast)
{
    Products const& p = productsOf(format, fast);
    int const shift = 5 + below(3), columns = (1 << shift) * (1 + below(5)), rows = 1 + below(45), tokens = 1 + below(40);
    int64_t const bytes = rowBytes(format, columns);
    std::vector<uint32_t> words(bytes * rows / 4 + 1);
    std::generate(words.begin(), words.end(), [] { return static_cast<uint32_t>(rng()); });
    std::vector<float> scales(rows * (columns >> shift)), x(tokens * columns), y(tokens * rows);
    std::normal_distribution<float> normal;
    std::generate(scales.begin(), scales.end(), [&] { return normal(rng); });
    std::generate(x.begin(), x.end(), [&] { return normal(rng); });
    for (int64_t i = 0; i < rows * columns && format <= Format::kHalf; ++i) {
        reinterpret_cast<float*>(words.data())[i] = normal(rng);
    }
    for (int64_t i = 0; i < rows * columns && format == Format::kBFloat; ++i) {
        float const v = normal(rng);
        std::memcpy(reinterpret_cast<uint16_t*>(words.data()) + i, reinterpret_cast<char const*>(&v) + 2, 2);
    }
    Matrix const m{reinterpret_cast<uint8_t*>(words.data()), scales.data(), format, shift, columns, bytes};
    int64_t const each = p.tokenBytes(m);
    std::vector<uint8_t> narrowed(each * tokens + 1), panels(panelRoom(p, tokens) * each + 1);
    std::vector<float> unpacked((p.rowBlock + 1) * columns);
    std::vector<void const*> in;
    std::vector<float*> out;
    for (int t = 0; t < tokens; ++t) {
        in.push_back(p.narrow ? static_cast<void*>(narrowed.data() + t * each) : x.data() + t * columns);
        out.push_back(y.data() + t * rows);
        if (p.narrow) {
            p.narrow(m, x.data() + t * columns, narrowed.data() + t * each);
        }
    }
    for (int i = 0; i < panelCount(p, tokens); ++i) {
        p.pack(m, in.data(), tokens, i, panels.data());
    }
    if (panelCount(p, tokens)) {
        p.panelProduct(m, 0, rows, panels.data(), tokens, reinterpret_cast<uint8_t*>(unpacked.data()), out.data());
    } else {
        p.product(m, 0, rows, in.data(), tokens, out.data());
    }
    double worst = 0;
    for (int t = 0; t < tokens; ++t) {
        std::vector<double> const q = seen(m, x.data() + t * columns, std::strcmp(p.name, "float32") != 0);
        for (int r = 0; r < rows; ++r) {
            double want = 0, size = 0;
            for (int k = 0; k < columns; ++k) {
                want += weight(m, r, k) * q[k];
                size += std::abs(weight(m, r, k) * q[k]);
            }
            worst = std::max(worst, std::abs(want - out[t][r]) / size);
        }
    }
    constexpr double kTolerance = 1e-6;
    if (!(worst < kTolerance)) {
        std::printf("format %d, %s, %d x %d, groups of %d, %d tokens: off by %g\n", static_cast<int>(format), p.name, rows,
            columns, 1 << shift, tokens, worst);
    }
    return worst < kTolerance;
}

} // namespace

int main()
{
    bool all = true;
    for (Format const format : {Format::kFloat, Format::kInt8, Format::kInt4, Format::kBFloat}) {
        for (bool const fast : {false, true}) {
            for (int i = 0; i < 60; ++i) {
                all = right(format, fast) && all;
            }
            std::printf("%s\n", productsOf(format, fast).name);
        }
    }
    return all ? 0 : 1;
}
