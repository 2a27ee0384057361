// A linear layer over the instruction set's products, in what pieces it is done.
#include "linear.h"
#include "lost_pages.h"
#include "products.h"
#include "scratch.h"

#include <algorithm>
#include <vector>

namespace dmoe::cpu {
namespace {

constexpr int32_t kDotRows = 64; // of a piece of few tokens

class Call {
public:
    Call(Linear const& l, std::atomic<bool>& lost)
        : l(l), set(instructionSet()), p(productsOf(l.weights, l.fast)), half(l.values == Format::kHalf),
          matrix{static_cast<uint8_t const*>(l.weight), nullptr, l.weights, l.groupShift, l.columns,
              rowBytes(l.weights, l.columns)},
          lost(lost)
    {
    }

    void run(Parallel parallel, void* pool)
    {
        struct Memory {
            std::vector<float> in, narrow, panels;
        };
        auto& [inMemory, narrowMemory, panelMemory] = ofThread<Memory>();
        wide = static_cast<float const*>(l.x);
        if (half) {
            int64_t const count = int64_t{l.tokens} * l.columns;
            float* const floats = room(inMemory, count);
            set.fromHalf(static_cast<uint16_t const*>(l.x), count, floats);
            wide = floats;
        }
        int64_t const bytes = p.tokenBytes(matrix);
        if (p.narrow) {
            narrowed = roomForBytes(narrowMemory, l.tokens * bytes);
            parallel(pool, l.tokens, [](void* call, size_t t) { static_cast<Call*>(call)->narrow(t); }, this);
        }
        x.resize(l.tokens);
        for (int32_t t = 0; t < l.tokens; ++t) {
            x[t] = narrowed ? static_cast<void const*>(narrowed + t * bytes) : wide + int64_t{t} * l.columns;
        }
        chunk = kDotRows;
        if (int32_t const count = panelCount(p, l.tokens)) {
            chunk = p.rowBlock;
            panels = roomForBytes(panelMemory, panelRoom(p, l.tokens) * bytes);
            parallel(pool, count, [](void* call, size_t i) { static_cast<Call*>(call)->pack(i); }, this);
        }
        parallel(pool, (l.rows + chunk - 1) / chunk, [](void* call, size_t i) { static_cast<Call*>(call)->piece(i); }, this);
    }

private:
    void narrow(size_t token) { p.narrow(matrix, wide + token * l.columns, narrowed + token * p.tokenBytes(matrix)); }

    void pack(size_t index) { p.pack(matrix, x.data(), l.tokens, static_cast<int32_t>(index), panels); }

    void piece(size_t index)
    {
        if (lost.load(std::memory_order_relaxed)) {
            return;
        }
        LostPages const watch(lost);
        struct Memory {
            std::vector<float> unpacked, scales, out;
            std::vector<float*> y;
        };
        auto& [unpackedMemory, scaleMemory, outMemory, y] = ofThread<Memory>();
        int32_t const first = static_cast<int32_t>(index) * chunk, rows = std::min(chunk, l.rows - first);
        float* const results = half ? room(outMemory, size_t(l.tokens) * rows) : nullptr;
        y.resize(l.tokens);
        for (int32_t t = 0; t < l.tokens; ++t) {
            y[t] = half ? results + int64_t{t} * rows : static_cast<float*>(l.y) + int64_t{t} * l.rows + first;
        }
        Matrix m = matrix;
        m.values += first * m.rowBytes;
        int64_t const groups = l.columns >> l.groupShift;
        if (l.scales && half) {
            float* const scales = room(scaleMemory, rows * groups);
            set.fromHalf(static_cast<uint16_t const*>(l.scales) + first * groups, rows * groups, scales);
            m.scales = scales;
        } else if (l.scales) {
            m.scales = static_cast<float const*>(l.scales) + first * groups;
        }
        if (panels) {
            uint8_t* const unpacked = roomForBytes(unpackedMemory, int64_t{p.rowBlock + 1} * p.unpackedBytes * l.columns);
            p.panelProduct(m, 0, rows, panels, l.tokens, unpacked, y.data());
        } else {
            p.product(m, 0, rows, x.data(), l.tokens, y.data());
        }
        finish(first, rows, y.data());
    }

    void finish(int32_t first, int32_t rows, float* const* y) const
    {
        float bias[kDotRows];
        if (l.bias && half) {
            set.fromHalf(static_cast<uint16_t const*>(l.bias) + first, rows, bias);
        } else if (l.bias) {
            std::copy_n(static_cast<float const*>(l.bias) + first, rows, bias);
        }
        for (int32_t t = 0; t < l.tokens; ++t) {
            for (int32_t r = 0; l.bias && r < rows; ++r) {
                y[t][r] += bias[r];
            }
            if (half) {
                set.toHalf(y[t], rows, static_cast<uint16_t*>(l.y) + int64_t{t} * l.rows + first);
            }
        }
    }

    Linear const& l;
    InstructionSet const& set;
    Products const& p;
    bool half;
    Matrix const matrix; // all of it, scales not yet in float32
    std::atomic<bool>& lost;
    float const* wide = nullptr; // [tokens, columns]
    uint8_t* narrowed = nullptr; // null: x as it lies
    uint8_t* panels = nullptr; // where there are more than few tokens
    std::vector<void const*> x;
    int32_t chunk = 0; // rows of a piece
};

} // namespace

void runLinear(Linear const& call, Parallel parallel, void* pool, std::atomic<bool>& lost)
{
    catchLostPages();
    Call(call, lost).run(parallel, pool);
}

} // namespace dmoe::cpu
