// Attention over the instruction set's products: which places each query sees, and in what pieces it is done.
//
// Places that no query of a piece sees are not read, so a row costs what it holds, whatever is padded beside it; and sums go
// over the seen places by rank, so a result has the same bits whatever that padding is.
#include "attention.h"
#include "products.h"
#include "scratch.h"

#include <algorithm>
#include <vector>

namespace dmoe::cpu {
namespace {

constexpr int32_t kQueries = 32; // of a piece
constexpr float kSeen = -1e29f; // a bias below hides a place

struct Range {
    int32_t begin, end; // of places: S cached ones, then T new ones
};

// Tokens begin … end − 1 of a row, which see the same places; ranges do not cross from cached to new ones.
struct Group {
    int32_t row, begin, end, places;
    std::vector<Range> seen;
};

// Queries of one key head with the same places.
struct Piece {
    int32_t group, head, first, last; // of the group's share · tokens queries
};

class Call {
public:
    explicit Call(Attention const& a)
        : a(a), set(instructionSet()), p(productsOf(Format::kFloat, false)), half(a.values == Format::kHalf),
          bytes(half ? 2 : 4)
    {
    }

    void run(Parallel parallel, void* pool)
    {
        for (int32_t row = 0; row < a.rows; ++row) {
            group(row);
        }
        for (size_t g = 0; g < groups.size(); ++g) {
            int32_t const queries = a.share * (groups[g].end - groups[g].begin);
            for (int32_t head = 0; head < a.heads; ++head) {
                for (int32_t first = 0; first < queries; first += kQueries) {
                    pieces.push_back({static_cast<int32_t>(g), head, first, std::min(first + kQueries, queries)});
                }
            }
        }
        parallel(pool, pieces.size(), [](void* call, size_t i) { static_cast<Call*>(call)->piece(i); }, this);
    }

private:
    void group(int32_t row)
    {
        int32_t const places = a.past + a.tokens;
        float const* const bias = a.bias + int64_t{row} * a.biasTokens * places;
        for (int32_t token = 0; token < a.tokens; ++token) {
            float const* const own = bias + int64_t{a.biasTokens == 1 ? 0 : token} * places;
            auto const same = [](float x, float y) { return (x > kSeen) == (y > kSeen); };
            if (token > 0 && (a.biasTokens == 1 || std::equal(own, own + places, own - places, same))) {
                groups.back().end = token + 1;
                continue;
            }
            Group g{row, token, token + 1, 0, {}};
            for (int32_t i = 0; i < places; ++i) {
                if (own[i] > kSeen) {
                    if (g.seen.empty() || g.seen.back().end != i || i == a.past) {
                        g.seen.push_back({i, i});
                    }
                    g.seen.back().end = i + 1;
                    g.places += 1;
                }
            }
            groups.push_back(std::move(g));
        }
    }

    // `count` rows of D values from a tensor [B, Hkv, length, D], in float32.
    float const* rows(void const* tensor, int64_t index, int32_t count, std::vector<float>& memory) const
    {
        auto const* const from = static_cast<uint8_t const*>(tensor) + index * a.columns * bytes;
        if (!half) {
            return reinterpret_cast<float const*>(from);
        }
        int64_t const values = int64_t{count} * a.columns;
        float* const wide = room(memory, values);
        set.fromHalf(reinterpret_cast<uint16_t const*>(from), values, wide);
        return wide;
    }

    // Of a range of places: the index of its first row in a tensor of cached keys or of new ones.
    int64_t indexOf(Group const& g, int32_t head, int32_t place) const
    {
        int64_t const one = int64_t{g.row} * a.heads + head;
        return place < a.past ? one * a.past + place : one * a.tokens + place - a.past;
    }

    void piece(size_t index) const
    {
        struct Memory {
            std::vector<float> wide, in, packed, unpacked, scores, out;
        };
        auto& memory = ofThread<Memory>(); // no structured binding: lambdas capture none in C++17
        auto &wide = memory.wide, &inMemory = memory.in, &packed = memory.packed, &unpackedMemory = memory.unpacked;
        auto &scoreMemory = memory.scores, &outMemory = memory.out;
        Piece const& piece = pieces[index];
        Group const& g = groups[piece.group];
        int32_t const queries = piece.last - piece.first, tokens = g.end - g.begin;
        int32_t const length = (g.places + 15) / 16 * 16; // whole vectors of any instruction set
        float* const in = room(inMemory, int64_t{kQueries} * a.columns);
        float* const results = room(outMemory, int64_t{kQueries} * a.columns);
        float* const all = room(scoreMemory, int64_t{kQueries} * length);
        std::fill_n(results, int64_t{queries} * a.columns, 0.0f);
        void const* x[kQueries];
        float *scores[kQueries], *to[kQueries], *out[kQueries];
        int64_t where[kQueries];
        for (int32_t i = 0; i < queries; ++i) {
            int32_t const query = piece.first + i;
            int64_t const row = int64_t{g.row} * a.heads + piece.head;
            where[i] = (row * a.share + query / tokens) * a.tokens + g.begin + query % tokens;
            float const* const q = rows(a.q, where[i], 1, wide);
            std::copy_n(q, a.columns, in + int64_t{i} * a.columns);
            x[i] = in + int64_t{i} * a.columns;
            scores[i] = all + int64_t{i} * length;
            out[i] = results + int64_t{i} * a.columns;
        }
        Matrix m{nullptr, nullptr, Format::kFloat, 0, a.columns, 4 * int64_t{a.columns}};
        uint8_t* panels = nullptr;
        if (int32_t const count = panelCount(p, queries)) {
            panels = roomForBytes(packed, panelRoom(p, queries) * p.tokenBytes(m));
            for (int32_t i = 0; i < count; ++i) {
                p.pack(m, x, queries, i, panels);
            }
        }
        uint8_t* const unpacked = roomForBytes(unpackedMemory, int64_t{p.rowBlock + 1} * p.unpackedBytes * a.columns);
        auto const eachRange = [&](void const* cached, void const* fresh, auto work) {
            int32_t rank = 0;
            for (Range const& r : g.seen) {
                int32_t const count = r.end - r.begin;
                float const* const these = rows(r.begin < a.past ? cached : fresh, indexOf(g, piece.head, r.begin), count, wide);
                for (int32_t i = 0; i < queries; ++i) {
                    to[i] = scores[i] + rank;
                }
                work(these, count);
                rank += count;
            }
        };
        eachRange(a.pastKey, a.key, [&](float const* keys, int32_t count) {
            m.values = reinterpret_cast<uint8_t const*>(keys);
            if (panels) {
                p.panelProduct(m, 0, count, panels, queries, unpacked, to);
            } else {
                p.product(m, 0, count, x, queries, to);
            }
        });
        float totals[kQueries];
        for (int32_t i = 0; i < queries; ++i) {
            totals[i] = g.places ? set.weigh(scores[i], g.places) : 1.0f;
        }
        eachRange(a.pastValue, a.value, [&](float const* values, int32_t count) {
            set.mix(to, queries, values, count, a.columns, out);
        });
        for (int32_t i = 0; i < queries; ++i) {
            for (int32_t k = 0; k < a.columns; ++k) {
                out[i][k] /= totals[i];
            }
            if (half) {
                set.toHalf(out[i], a.columns, static_cast<uint16_t*>(a.mixed) + where[i] * a.columns);
            } else {
                std::copy_n(out[i], a.columns, static_cast<float*>(a.mixed) + where[i] * a.columns);
            }
        }
    }

    Attention const& a;
    InstructionSet const& set;
    Products const& p;
    bool half;
    int64_t bytes; // of a value
    std::vector<Group> groups;
    std::vector<Piece> pieces;
};

} // namespace

void runAttention(Attention const& call, Parallel parallel, void* pool) { Call(call).run(parallel, pool); }

} // namespace dmoe::cpu
