// A linear layer over the instruction set's products, in what pieces it is done.
#include "linear.h"
#include "lost_pages.h"
#include "scratch.h"

#include <algorithm>
#include <vector>

namespace dmoe::cpu {
namespace {

constexpr int32_t kDotRows = 64; // of a piece

template <class Work>
void each(Parallel parallel, void* pool, size_t count, Work work)
{
    parallel(pool, count, [](void* context, size_t i) { (*static_cast<Work*>(context))(static_cast<int32_t>(i)); }, &work);
}

} // namespace

void runLinear(Linear const& call, Parallel parallel, void* pool, std::atomic<bool>& lost)
{
    thread_local std::vector<float> memory;
    InstructionSet const& set = instructionSet();
    catchLostPages();
    std::vector<float const*> x(call.tokens);
    for (int32_t t = 0; t < call.tokens; ++t) {
        x[t] = call.x + int64_t{t} * call.columns;
    }
    float* panels = nullptr;
    if (call.tokens > set.lanes) {
        panels = room(memory, size_t(panelRoom(set, call.tokens)) * call.columns);
        each(parallel, pool, panelCount(set, call.tokens),
            [&](int32_t i) { set.packPanel(x.data(), call.tokens, call.columns, i, panels); });
    }
    Matrix const matrix{reinterpret_cast<uint8_t const*>(call.weight), nullptr, Format::kFloat, 0, call.columns,
        rowBytes(Format::kFloat, call.columns)};
    int32_t const chunk = panels ? kPanelRows : kDotRows;
    each(parallel, pool, (call.rows + chunk - 1) / chunk, [&](int32_t i) {
        if (lost.load(std::memory_order_relaxed)) {
            return;
        }
        LostPages const watch(lost);
        int32_t const first = i * chunk, last = std::min(first + chunk, call.rows);
        thread_local std::vector<float*> y;
        y.resize(call.tokens);
        for (int32_t t = 0; t < call.tokens; ++t) {
            y[t] = call.y + int64_t{t} * call.rows + first;
        }
        if (panels) {
            set.panelProduct(matrix, first, last, panels, call.tokens, nullptr, y.data());
        } else {
            set.product(matrix, first, last, x.data(), call.tokens, y.data());
        }
        for (float* row : y) {
            for (int32_t r = first; call.bias && r < last; ++r) {
                row[r - first] += call.bias[r];
            }
        }
    });
}

} // namespace dmoe::cpu
