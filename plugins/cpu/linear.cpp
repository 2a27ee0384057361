// A linear layer over the instruction set's products, in what pieces it is done.
#include "linear.h"
#include "lost_pages.h"
#include "scratch.h"

#include <algorithm>
#include <vector>

namespace dmoe::cpu {
namespace {

constexpr int32_t kDotRows = 64; // of a piece

class Call {
public:
    Call(Linear const& l, std::atomic<bool>& lost) : l(l), set(instructionSet()), half(l.values == Format::kHalf), lost(lost) {}

    void run(Parallel parallel, void* pool)
    {
        thread_local std::vector<float> inMemory, orderMemory, panelMemory;
        auto const* from = static_cast<float const*>(l.x);
        if (half) {
            int64_t const count = int64_t{l.tokens} * l.columns;
            float* const wide = room(inMemory, count);
            set.fromHalf(static_cast<uint16_t const*>(l.x), count, wide);
            from = wide;
        }
        if (l.weights == Format::kInt4) { // wants the values in its own order
            ordered = room(orderMemory, size_t(l.tokens) * l.columns);
            plain = from;
            from = ordered;
            parallel(pool, l.tokens, [](void* call, size_t t) { static_cast<Call*>(call)->order(t); }, this);
        }
        x.resize(l.tokens);
        for (int32_t t = 0; t < l.tokens; ++t) {
            x[t] = from + int64_t{t} * l.columns;
        }
        chunk = kDotRows;
        if (l.tokens > set.lanes) {
            chunk = kPanelRows;
            panels = room(panelMemory, size_t(panelRoom(set, l.tokens)) * l.columns);
            parallel(pool, panelCount(set, l.tokens), [](void* call, size_t i) { static_cast<Call*>(call)->pack(i); }, this);
        }
        parallel(pool, (l.rows + chunk - 1) / chunk, [](void* call, size_t i) { static_cast<Call*>(call)->piece(i); }, this);
    }

private:
    void order(size_t token)
    {
        for (int32_t i = 0; i < l.columns; ++i) {
            ordered[token * l.columns + placeInt4(i)] = plain[token * l.columns + i];
        }
    }

    void pack(size_t index) { set.packPanel(x.data(), l.tokens, l.columns, static_cast<int32_t>(index), panels); }

    void piece(size_t index)
    {
        if (lost.load(std::memory_order_relaxed)) {
            return;
        }
        LostPages const watch(lost);
        thread_local std::vector<float> unpackedMemory, scaleMemory, outMemory;
        thread_local std::vector<float*> y;
        int32_t const first = static_cast<int32_t>(index) * chunk, rows = std::min(chunk, l.rows - first);
        float* const wide = half ? room(outMemory, size_t(l.tokens) * rows) : nullptr;
        y.resize(l.tokens);
        for (int32_t t = 0; t < l.tokens; ++t) {
            y[t] = half ? wide + int64_t{t} * rows : static_cast<float*>(l.y) + int64_t{t} * l.rows + first;
        }
        int64_t const bytes = rowBytes(l.weights, l.columns), groups = l.columns >> l.groupShift;
        Matrix matrix{static_cast<uint8_t const*>(l.weight) + first * bytes, nullptr, l.weights, l.groupShift, l.columns, bytes};
        if (l.scales && half) {
            float* const scales = room(scaleMemory, rows * groups);
            set.fromHalf(static_cast<uint16_t const*>(l.scales) + first * groups, rows * groups, scales);
            matrix.scales = scales;
        } else if (l.scales) {
            matrix.scales = static_cast<float const*>(l.scales) + first * groups;
        }
        if (panels) {
            float* const unpacked = l.weights != Format::kFloat ? room(unpackedMemory, size_t{kPanelRows} * l.columns) : nullptr;
            set.panelProduct(matrix, 0, rows, panels, l.tokens, unpacked, y.data());
        } else {
            set.product(matrix, 0, rows, x.data(), l.tokens, y.data());
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
    bool half;
    std::atomic<bool>& lost;
    std::vector<float const*> x;
    float const* plain = nullptr; // x where int4 has it in another order
    float* ordered = nullptr;
    float* panels = nullptr; // where there are more tokens than a vector has lanes
    int32_t chunk = 0; // rows of a piece
};

} // namespace

void runLinear(Linear const& call, Parallel parallel, void* pool, std::atomic<bool>& lost)
{
    catchLostPages();
    Call(call, lost).run(parallel, pool);
}

} // namespace dmoe::cpu
