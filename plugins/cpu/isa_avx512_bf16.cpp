// Products of bfloat16 weights on x86-64 with AVX512-BF16: activations are rounded to bfloat16, two products of each of 16
// lanes are one instruction, sums are in float32. Tokens as in kernel.inc (few) and panel.inc (more).
#include "products.h"

#include <cstring>
#include <immintrin.h>

#define DMOE_LANES 16

namespace dmoe::cpu {
namespace {

#include "vectors.inc"

constexpr int32_t kFew = 12, kRows = 4, kTokens = 6; // of a tile of few tokens
constexpr int32_t kPanelTokens = 2 * kLanes, kTileRows = 10, kRowBlock = 2 * kTileRows;
constexpr int32_t kStep = 2 * kLanes; // values of a vector

inline Vector dot(Vector sums, __m512i a, __m512i b)
{
    return reinterpret_cast<Vector>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

// A narrowed token: K values, then zeros to the end of a vector.
int64_t tokenBytes(Matrix const& m) { return oddLines(2 * int64_t{m.columns}); }

void narrow(Matrix const& m, float const* x, uint8_t* narrowed)
{
    for (int32_t k = 0; k < (m.columns + kStep - 1) / kStep * kStep; k += kLanes) {
        int32_t const left = m.columns - k, some = left > kLanes ? kLanes : left > 0 ? left : 0;
        __m256bh const rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(loadSome(x + k, some)));
        std::memcpy(narrowed + 2 * k, &rounded, sizeof rounded);
    }
}

// A panel of W tokens: [K / 2, rounded up][W][2].
void pack(Matrix const& m, void const* const* narrowed, int32_t tokens, int32_t index, uint8_t* panels)
{
    constexpr int32_t kLine = 64;
    int32_t const token = index * kPanelTokens, left = tokens - token, bytes = (m.columns + 1) / 2 * 4;
    int32_t const width = left > kLanes ? kPanelTokens : kLanes, count = left < width ? left : width;
    uint8_t* const panel = panels + token * tokenBytes(m);
    if (count < width) {
        std::memset(panel, 0, size_t(bytes) * width);
    }
    for (int32_t begin = 0; begin < bytes; begin += kLine) { // a cache line of each token at a time, as in panel.inc
        int32_t const end = begin + kLine < bytes ? begin + kLine : bytes;
        for (int32_t t = 0; t < count; ++t) {
            for (int32_t at = begin; at < end; at += 4) {
                std::memcpy(panel + int64_t{at} * width + 4 * t, static_cast<uint8_t const*>(narrowed[token + t]) + at, 4);
            }
        }
    }
}

template <int32_t R, int32_t V>
void panelTile(Matrix const& m, uint8_t const* weights, uint8_t const* panel, Ahead ahead, Vector* out)
{
    constexpr int32_t kUnroll = 4; // pairs between two prefetches
    Vector sums[R][V] = {};
    auto const column = [&](int32_t pair, int32_t bytes) __attribute__((always_inline)) {
        __m512i x[V];
#pragma GCC unroll 2
        for (int32_t v = 0; v < V; ++v) {
            x[v] = _mm512_loadu_si512(panel + int64_t{pair} * (V * 4 * kLanes) + v * 4 * kLanes);
        }
#pragma GCC unroll 20
        for (int32_t r = 0; r < R; ++r) {
            int32_t w = 0;
            std::memcpy(&w, weights + r * m.rowBytes + 4 * int64_t{pair}, bytes);
            __m512i const both = _mm512_set1_epi32(w);
#pragma GCC unroll 2
            for (int32_t v = 0; v < V; ++v) {
                sums[r][v] = dot(sums[r][v], x[v], both);
            }
        }
    };
    int32_t const count = m.columns / 2;
    int32_t pair = 0;
    for (; pair + kUnroll <= count; pair += kUnroll) {
        ahead.step<2>();
#pragma GCC unroll 4
        for (int32_t i = 0; i < kUnroll; ++i) {
            column(pair + i, 4);
        }
    }
    for (; pair < count; ++pair) {
        column(pair, 4);
    }
    if (m.columns % 2) {
        column(pair, 2);
    }
    std::memcpy(out, sums, sizeof sums);
}

template <int32_t R, int32_t V, class... Arguments>
inline void panelTileOf(int32_t rows, Arguments... arguments)
{
    if (rows == R) {
        panelTile<R, V>(arguments...);
    } else if constexpr (R > 1) {
        panelTileOf<R - 1, V>(rows, arguments...);
    }
}

template <int32_t V>
inline void panelRows(Matrix const& m, int32_t row, int32_t rows, uint8_t const* panel, int32_t tokens, Ahead ahead,
    float* const* out, int32_t at)
{
    Vector sums[kRowBlock * V];
    for (int32_t r = 0; r < rows; r += kTileRows) {
        int32_t const some = rows - r < kTileRows ? rows - r : kTileRows;
        panelTileOf<kTileRows, V>(some, m, m.values + (row + r) * m.rowBytes, panel, ahead, sums + r * V);
        ahead.at += m.columns / 8 * ahead.bytes;
    }
    auto const* const values = reinterpret_cast<float const*>(sums);
    for (int32_t t = 0; t < tokens; ++t) {
        for (int32_t r = 0; r < rows; ++r) {
            out[t][at + r] = values[r * V * kLanes + t];
        }
    }
}

void panelProduct(Matrix const& m, int32_t first, int32_t last, uint8_t const* panels, int32_t tokens, uint8_t*,
    float* const* out)
{
    int32_t const count = (tokens + kPanelTokens - 1) / kPanelTokens, steps = m.columns / 8;
    for (int32_t row = first; row < last; row += kRowBlock) {
        int32_t const rows = last - row < kRowBlock ? last - row : kRowBlock;
        Ahead ahead{m.values + (row + rows) * m.rowBytes, steps ? rows * m.rowBytes / (count * 2 * steps) : 0};
        for (int32_t token = 0; token < tokens; token += kPanelTokens) {
            uint8_t const* const panel = panels + token * tokenBytes(m);
            int32_t const some = tokens - token < kPanelTokens ? tokens - token : kPanelTokens;
            if (some > kLanes) {
                panelRows<2>(m, row, rows, panel, some, ahead, out + token, row - first);
            } else {
                panelRows<1>(m, row, rows, panel, some, ahead, out + token, row - first);
            }
            ahead.at += 2 * steps * ahead.bytes;
        }
    }
}

template <int32_t R, int32_t T>
void fewTile(Matrix const& m, int32_t row, void const* const* narrowed, Ahead ahead, float* const* out, int32_t at)
{
    uint8_t const* const rows = m.values + row * m.rowBytes;
    Vector sums[R][T] = {};
    auto const step = [&](int32_t k, __mmask32 wanted) __attribute__((always_inline)) {
        __m512i w[R];
#pragma GCC unroll 8
        for (int32_t r = 0; r < R; ++r) {
            w[r] = _mm512_maskz_loadu_epi16(wanted, rows + r * m.rowBytes + 2 * k);
        }
#pragma GCC unroll 8
        for (int32_t t = 0; t < T; ++t) {
            __m512i const x = _mm512_loadu_si512(static_cast<uint8_t const*>(narrowed[t]) + 2 * k);
#pragma GCC unroll 8
            for (int32_t r = 0; r < R; ++r) {
                sums[r][t] = dot(sums[r][t], x, w[r]);
            }
        }
    };
    int32_t k = 0;
    for (; k + kStep <= m.columns; k += kStep) {
        ahead.step();
        step(k, ~__mmask32{});
    }
    if (k < m.columns) {
        step(k, (__mmask32{1} << (m.columns - k)) - 1);
    }
#pragma GCC unroll 8
    for (int32_t t = 0; t < T; ++t) {
#pragma GCC unroll 8
        for (int32_t r = 0; r < R; ++r) { // unrolled, else the sums are in memory all the while
            out[t][at + r] = sum(sums[r][t]);
        }
    }
}

template <int32_t R, int32_t T>
inline void fewTileOf(Matrix const& m, int32_t row, void const* const* narrowed, int32_t tokens, Ahead ahead,
    float* const* out, int32_t at)
{
    if (tokens == T) {
        fewTile<R, T>(m, row, narrowed, ahead, out, at);
    } else if constexpr (T > 1) {
        fewTileOf<R, T - 1>(m, row, narrowed, tokens, ahead, out, at);
    }
}

// R rows with all tokens, in even pieces.
template <int32_t R>
inline void fewRows(Matrix const& m, int32_t row, void const* const* narrowed, int32_t tokens, float* const* out,
    int32_t at)
{
    int32_t const pieces = (tokens + kTokens - 1) / kTokens, steps = m.columns / kStep;
    Ahead ahead{m.values + (row + R) * m.rowBytes, steps ? R * m.rowBytes / (pieces * steps) : 0};
    for (int32_t piece = 0, t = 0; piece < pieces; ++piece) {
        int32_t const count = (tokens - t + pieces - piece - 1) / (pieces - piece);
        fewTileOf<R, kTokens>(m, row, narrowed + t, count, ahead, out + t, at);
        ahead.at += steps * ahead.bytes;
        t += count;
    }
}

void fewProduct(Matrix const& m, int32_t first, int32_t last, void const* const* narrowed, int32_t tokens,
    float* const* out)
{
    int32_t row = first;
    for (; row + kRows <= last; row += kRows) {
        fewRows<kRows>(m, row, narrowed, tokens, out, row - first);
    }
    for (; row < last; ++row) {
        fewRows<1>(m, row, narrowed, tokens, out, row - first);
    }
}

} // namespace

extern Products const kAvx512Bf16;
Products const kAvx512Bf16{
    "avx512-bf16", kFew, kPanelTokens, kRowBlock, 0, tokenBytes, narrow, pack, fewProduct, panelProduct};

} // namespace dmoe::cpu
