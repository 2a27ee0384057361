// The exact products behind the interface that the fast ones have, and which are taken.
#include "products.h"

namespace dmoe::cpu {
namespace {

constexpr int32_t kMostLanes = 16;

int64_t tokenBytes(Matrix const& m) { return 4 * int64_t{m.columns}; }

void orderForInt4(Matrix const& m, float const* x, uint8_t* narrowed)
{
    auto* const out = reinterpret_cast<float*>(narrowed);
    for (int32_t i = 0; i < m.columns; ++i) {
        out[placeInt4(i)] = x[i];
    }
}

// Tokens from `first` on, as many as a panel has places.
struct Some {
    float const* x[2 * kMostLanes];
    Some(void const* const* narrowed, int32_t first, int32_t tokens)
    {
        int32_t const most = 2 * instructionSet().lanes, left = tokens - first;
        for (int32_t t = 0; t < (left < most ? left : most); ++t) {
            x[t] = static_cast<float const*>(narrowed[first + t]);
        }
    }
};

void pack(Matrix const& m, void const* const* narrowed, int32_t tokens, int32_t index, uint8_t* panels)
{
    int32_t const first = index * 2 * instructionSet().lanes, left = tokens - first;
    auto* const panel = reinterpret_cast<float*>(panels) + int64_t{first} * m.columns;
    instructionSet().packPanel(m, Some(narrowed, first, tokens).x, left, tokens, panel);
}

void product(Matrix const& m, int32_t first, int32_t last, void const* const* narrowed, int32_t tokens, float* const* out)
{
    instructionSet().product(m, first, last, Some(narrowed, 0, tokens).x, tokens, out);
}

void panelProduct(Matrix const& m, int32_t first, int32_t last, uint8_t const* panels, int32_t tokens, uint8_t* unpacked,
    float* const* out)
{
    instructionSet().panelProduct(m, first, last, reinterpret_cast<float const*>(panels), tokens,
        reinterpret_cast<float*>(unpacked), out);
}

// Sums are the same for more tokens than `few`: from there on panels are faster; earlier for int4, which is slow to unpack.
Products exact(void (*narrow)(Matrix const&, float const*, uint8_t*))
{
    int32_t const lanes = instructionSet().lanes, few = narrow ? lanes * 5 / 4 : lanes * 3 / 2;
    return {"float32", few, 2 * lanes, kPanelRows, 4, tokenBytes, narrow, pack, product, panelProduct};
}

} // namespace

Products const& productsOf(Format format, bool fast)
{
    static Products const plain = exact(nullptr), int4 = exact(orderForInt4);
    Products const* const found = fast ? fastProducts(format) : nullptr;
    return found ? *found : format == Format::kInt4 ? int4 : plain;
}

} // namespace dmoe::cpu

char const* dmoe_cpu_products(int32_t format, int32_t fast)
{
    using dmoe::cpu::Format;
    bool const known = format >= 0 && format <= static_cast<int32_t>(Format::kBFloat);
    return known ? dmoe::cpu::productsOf(static_cast<Format>(format), fast != 0).name : "";
}
