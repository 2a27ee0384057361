// A linear layer over the instruction set's products, in what pieces it is done.
#include "linear.h"
#include "lost_pages.h"
#include "scratch.h"

#include <algorithm>
#include <vector>

namespace dmoe::cpu {
namespace {

constexpr int32_t kDotRows = 64;

// As many tokens as a vector has lanes, or fewer: dot products, as for the tokens of an expert.
void dots(Linear const& call, int32_t first, int32_t last)
{
    thread_local std::vector<float const*> x;
    thread_local std::vector<float*> y;
    x.resize(call.tokens);
    y.resize(call.tokens);
    for (int32_t t = 0; t < call.tokens; ++t) {
        x[t] = call.x + int64_t{t} * call.columns;
        y[t] = call.y + int64_t{t} * call.rows + first;
    }
    Matrix const matrix{reinterpret_cast<uint8_t const*>(call.weight), nullptr, Format::kFloat, 0, call.columns,
        rowBytes(Format::kFloat, call.columns)};
    instructionSet().product(matrix, first, last, x.data(), call.tokens, y.data());
    for (int32_t t = 0; call.bias && t < call.tokens; ++t) {
        std::transform(y[t], y[t] + (last - first), call.bias + first, y[t], std::plus<float>());
    }
}

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
    float* panels = nullptr;
    if (call.tokens > set.lanes) {
        int32_t const width = 2 * set.lanes, count = (call.tokens + width - 1) / width;
        panels = room(memory, static_cast<size_t>(count) * width * call.columns);
        each(parallel, pool, count, [&](int32_t i) { set.packPanel(call, i, panels); });
    }
    int32_t const chunk = panels ? kPanelRows : kDotRows;
    each(parallel, pool, (call.rows + chunk - 1) / chunk, [&](int32_t i) {
        if (lost.load(std::memory_order_relaxed)) {
            return;
        }
        LostPages const watch(lost);
        int32_t const first = i * chunk, last = std::min(first + chunk, call.rows);
        if (panels) {
            set.panelProduct(call, first, last, panels);
        } else {
            dots(call, first, last);
        }
    });
}

} // namespace dmoe::cpu
