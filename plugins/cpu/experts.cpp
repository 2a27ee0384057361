// The experts op over the instruction set's products: which expert has which tokens, and in what pieces it is done.
#include "experts.h"
#include "../onnxruntime/session.h"
#include "lost_pages.h"
#include "products.h"
#include "scratch.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dmoe::cpu {

namespace {

constexpr int32_t kWidthChunk = 64; // intermediate values of one piece of gate and up
constexpr int32_t kHiddenChunk = 256; // outputs of one piece of down
// The pairs (token, place) of each expert that has any, in token order.
struct Group {
    int32_t expert, begin, end; // range of `pairs`
    int64_t panels; // in tokens from the first group's
    bool taken; // held, now or before
};

struct Scratch {
    std::vector<float> hidden, activated, products, narrowed, panels;
};

class Call {
public:
    Call(Experts const& e, DmoeSession const* session, Parallel parallel, void* pool, Scratch& scratch,
        std::atomic<bool>& lost)
        : e(e), session(session), set(instructionSet()), p(productsOf(e.format, e.fast)), parallel(parallel), pool(pool),
          scratch(scratch), lost(lost), hidden(shape(e.hidden)), width(shape(e.width))
    {
    }

    void run()
    {
        group();
        inputs();
        auto const pairs = static_cast<size_t>(order.size());
        activated = room(scratch.activated, pairs * e.width);
        products = room(scratch.products, pairs * e.hidden);
        narrowed = p.narrow ? roomForBytes(scratch.narrowed, pairs * p.tokenBytes(width)) : nullptr;
        panels = roomForBytes(scratch.panels, packed * std::max(p.tokenBytes(hidden), p.tokenBytes(width)));
        std::vector<int32_t> wanted(groups.size());
        std::transform(groups.begin(), groups.end(), wanted.begin(), [](Group const& g) { return g.expert; });
        int32_t* const end = wanted.data() + wanted.size();
        for (int32_t* next = wanted.data(); next != end && !lost;) {
            HeldExperts const holding(session, e.gateUp, next, end);
            held.clear();
            for (int32_t const expert : holding) {
                held.push_back(take(expert));
            }
            bothProducts();
            next = holding.end();
        }
        each(e.tokens, [this](size_t token) { mix(static_cast<int32_t>(token)); });
    }

private:
    // Of the groups that are held, with all their tokens.
    void bothProducts()
    {
        prepare(hidden, false, [](int32_t) {});
        pieces(e.width, kWidthChunk, [this](Group const& g, int32_t first, int32_t last) { gateUp(g, first, last); });
        prepare(width, true, [this](int32_t pair) {
            float const* const row = activated + static_cast<size_t>(pair) * e.width;
            x[pair] = narrowed ? static_cast<void const*>(narrow(width, row, pair, narrowed)) : row;
        });
        pieces(e.hidden, kHiddenChunk, [this](Group const& g, int32_t first, int32_t last) { down(g, first, last); });
    }

    Matrix shape(int32_t columns) const
    {
        return {nullptr, nullptr, e.format, e.groupShift, columns, rowBytes(e.format, columns)};
    }

    // Into the place of token `index`.
    uint8_t* narrow(Matrix const& m, float const* from, size_t index, uint8_t* to) const
    {
        uint8_t* const place = to + index * p.tokenBytes(m);
        p.narrow(m, from, place);
        return place;
    }

    Group const* take(int32_t expert)
    {
        auto const found = std::lower_bound(groups.begin(), groups.end(), expert,
            [](Group const& g, int32_t id) { return g.expert < id; });
        if (found == groups.end() || found->expert != expert || std::exchange(found->taken, true)) {
            throw std::runtime_error("the expert source holds expert " + std::to_string(expert)
                + ", which it was not asked for.");
        }
        return &*found;
    }

    void group()
    {
        int32_t const pairs = e.tokens * e.places;
        std::vector<int32_t> count(e.experts + 1);
        for (int32_t i = 0; i < pairs; ++i) {
            if (e.ids[i] >= e.experts || e.ids[i] < -1) {
                throw std::runtime_error("expert id " + std::to_string(e.ids[i]) + " is outside -1 ... "
                    + std::to_string(e.experts - 1) + ".");
            }
            count[e.ids[i] + 1] += 1;
        }
        count[0] = 0;
        std::partial_sum(count.begin(), count.end(), count.begin());
        for (int32_t i = 0; i < e.experts; ++i) {
            if (count[i] < count[i + 1]) {
                int32_t const tokens = count[i + 1] - count[i];
                groups.push_back({i, count[i], count[i + 1], packed, false});
                packed += panelRoom(p, tokens);
            }
        }
        order.resize(count[e.experts]);
        place.assign(pairs, -1);
        for (int32_t i = 0; i < pairs; ++i) {
            if (e.ids[i] >= 0) {
                place[i] = count[e.ids[i]]++;
                order[place[i]] = i / e.places;
            }
        }
    }

    // Addresses of each pair's hidden state, in the order of its expert; narrowed once for all its experts.
    void inputs()
    {
        int64_t const bytes = p.narrow ? p.tokenBytes(hidden) : 4 * int64_t{e.hidden};
        auto const* from = reinterpret_cast<uint8_t const*>(e.x);
        if (p.narrow) {
            uint8_t* const all = roomForBytes(scratch.hidden, e.tokens * bytes);
            each(e.tokens, [this, all](size_t token) { narrow(hidden, e.x + token * e.hidden, token, all); });
            from = all;
        }
        x.resize(order.size());
        std::transform(order.begin(), order.end(), x.begin(), [&](int32_t token) { return from + token * bytes; });
    }

    // Of the held groups: what each pair needs first (`every`), then panels where there are more than few tokens.
    template <class First>
    void prepare(Matrix const& m, bool every, First first)
    {
        std::vector<std::pair<Group const*, int32_t>> todo;
        for (Group const* g : held) {
            for (int32_t i = 0; i < std::max<int32_t>(every, panelCount(p, g->end - g->begin)); ++i) {
                todo.emplace_back(g, i);
            }
        }
        each(todo.size(), [&](size_t i) {
            auto const [g, index] = todo[i];
            bool const few = panelCount(p, g->end - g->begin) == 0;
            int32_t const begin = g->begin + index * p.panelTokens;
            for (int32_t pair = begin; pair < (few ? g->end : std::min(g->end, begin + p.panelTokens)); ++pair) {
                first(pair);
            }
            if (!few) {
                p.pack(m, x.data() + g->begin, g->end - g->begin, index, panels + g->panels * p.tokenBytes(m));
            }
        });
    }

    // Rows first … last − 1 of the group's expert, out of `rows` of each expert, with its tokens.
    void product(Group const& g, void const* values, void const* scales, int64_t rows, Matrix m, int32_t first,
        int32_t last, float* const* out) const
    {
        struct Memory {
            std::vector<float> scales, rows;
        };
        auto& [scaleMemory, rowMemory] = ofThread<Memory>();
        int64_t const row = g.expert * rows + first, groups = m.columns >> e.groupShift;
        m.values = static_cast<uint8_t const*>(values) + row * m.rowBytes;
        if (scales && e.halfScales) {
            int64_t const count = (last - first) * groups;
            float* const wide = room(scaleMemory, count);
            set.fromHalf(static_cast<uint16_t const*>(scales) + row * groups, count, wide);
            m.scales = wide;
        } else if (scales) {
            m.scales = static_cast<float const*>(scales) + row * groups;
        }
        int32_t const tokens = g.end - g.begin;
        if (panelCount(p, tokens) == 0) {
            p.product(m, 0, last - first, x.data() + g.begin, tokens, out);
            return;
        }
        uint8_t* const unpacked = roomForBytes(rowMemory, int64_t{p.rowBlock + 1} * p.unpackedBytes * m.columns);
        p.panelProduct(m, 0, last - first, panels + g.panels * p.tokenBytes(m), tokens, unpacked, out);
    }

    void gateUp(Group const& g, int32_t first, int32_t last)
    {
        int32_t const tokens = g.end - g.begin, rows = 2 * (last - first);
        struct Memory {
            std::vector<float> both;
            std::vector<float*> out;
        };
        auto& [both, out] = ofThread<Memory>();
        float* const begin = room(both, static_cast<size_t>(tokens) * rows);
        out.resize(tokens);
        for (int32_t t = 0; t < tokens; ++t) {
            out[t] = begin + static_cast<size_t>(t) * rows;
        }
        product(g, e.gateUp, e.gateUpScales, 2 * int64_t{e.width}, hidden, 2 * first, 2 * last, out.data());
        for (int32_t t = 0; t < tokens; ++t) {
            set.gated[e.activation](out[t], last - first, activated + static_cast<size_t>(g.begin + t) * e.width + first);
        }
    }

    void down(Group const& g, int32_t first, int32_t last)
    {
        int32_t const tokens = g.end - g.begin;
        struct Memory {
            std::vector<float*> out;
        };
        std::vector<float*>& out = ofThread<Memory>().out;
        out.resize(tokens);
        for (int32_t t = 0; t < tokens; ++t) {
            out[t] = products + static_cast<size_t>(g.begin + t) * e.hidden + first;
        }
        product(g, e.down, e.downScales, e.hidden, width, first, last, out.data());
    }

    // The weighted sum in the order of the places, whatever the experts are.
    void mix(int32_t token)
    {
        float* const mixed = e.mixed + static_cast<size_t>(token) * e.hidden;
        std::fill_n(mixed, e.hidden, 0.0f);
        for (int32_t j = 0; j < e.places; ++j) {
            int32_t const pair = token * e.places + j;
            if (place[pair] < 0) {
                continue;
            }
            float const weight = e.weights[pair], *const row = products + static_cast<size_t>(place[pair]) * e.hidden;
            for (int32_t i = 0; i < e.hidden; ++i) {
                mixed[i] += weight * row[i];
            }
        }
    }

    template <class Work>
    void each(size_t count, Work work)
    {
        parallel(pool, count, [](void* context, size_t i) { (*static_cast<Work*>(context))(i); }, &work);
    }

    // Every held group in pieces of `chunk` out of `size` rows; none once weights are lost.
    template <class Work>
    void pieces(int32_t size, int32_t chunk, Work work)
    {
        int32_t const perGroup = (size + chunk - 1) / chunk;
        each(held.size() * perGroup, [&](size_t i) {
            int32_t const first = static_cast<int32_t>(i % perGroup) * chunk;
            if (lost.load(std::memory_order_relaxed)) {
                return;
            }
            LostPages const watch(lost);
            work(*held[i / perGroup], first, std::min(first + chunk, size));
        });
    }

    Experts const& e;
    DmoeSession const* session;
    InstructionSet const& set;
    Products const& p;
    Parallel parallel;
    void* pool;
    Scratch& scratch;
    std::atomic<bool>& lost;
    Matrix const hidden, width; // what both products are like, without their weights
    float* activated = nullptr; // [pairs, I]
    float* products = nullptr; // [pairs, H]
    uint8_t* narrowed = nullptr; // of activated; null: they stay as they are
    uint8_t* panels = nullptr; // of H values, then of I
    int64_t packed = 0; // tokens that the panels of all groups have room for
    std::vector<Group> groups; // in the order of their experts
    std::vector<Group const*> held;
    std::vector<int32_t> order, place; // token of each pair sorted by expert; where each pair went, −1 = nowhere
    std::vector<void const*> x; // of each pair: its hidden state, then its activated values
};

} // namespace

void runExperts(Experts const& call, DmoeSession const* session, Parallel parallel, void* pool, std::atomic<bool>& lost)
{
    catchLostPages();
    Call(call, session, parallel, pool, ofThread<Scratch>(), lost).run();
}

} // namespace dmoe::cpu
