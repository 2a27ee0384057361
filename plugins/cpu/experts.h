// The experts op on a CPU: what one call is given, and the parts that are compiled once per instruction set.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

struct DmoeSession;

namespace dmoe::cpu {

enum class Format : int32_t { kFloat, kHalf, kInt8, kInt4, kBFloat }; // dmoe_cpu_products knows them by number, too

// One weight matrix of one expert: rows of K values. Quantised values are unsigned around the middle of their range, in
// groups of 2^groupShift along K, value = (u − offset) · scale; int4 has the even index in the low four bits.
struct Matrix {
    uint8_t const* values;
    float const* scales; // [rows, K >> groupShift]; null unless quantised
    Format format;
    int32_t groupShift;
    int32_t columns; // K
    int64_t rowBytes;
};

// Bytes of one row of K values. Static, like all that the isa_*.cpp see: a shared copy might be the AVX-512 one.
static inline int64_t rowBytes(Format format, int64_t columns)
{
    switch (format) {
    case Format::kFloat: return 4 * columns;
    case Format::kHalf:
    case Format::kBFloat: return 2 * columns;
    case Format::kInt8: return columns;
    default: return columns / 2;
    }
}

// int4 unpacks 32 values into 16 even ones and 16 odd ones: vectors that meet such a matrix are stored in that order.
constexpr int32_t kInt4Run = 32;
static inline int32_t placeInt4(int32_t i) { return (i & ~(kInt4Run - 1)) + (i % 2) * (kInt4Run / 2) + (i % kInt4Run) / 2; }

constexpr int32_t kPanelRows = 20; // that meet a panel at a time: a second-level cache has room for both

// What depends on the instruction set.
struct InstructionSet {
    char const* name;
    int32_t lanes; // floats in a vector
    // out[t][r − first] = Σ_k matrix[r, k] · x[t][k] for rows first … last − 1 and `tokens` vectors x.
    void (*product)(Matrix const& matrix, int32_t first, int32_t last, float const* const* x, int32_t tokens,
        float* const* out);
    // activated[i] = activation(gateUp[2 i]) · gateUp[2 i + 1], for each DMOE_ACTIVATION_*.
    void (*gated[2])(float const* gateUp, int32_t count, float* activated);
    void (*fromHalf)(uint16_t const* in, int64_t count, float* out);
    void (*toHalf)(float const* in, int64_t count, uint16_t* out);
    // Attention, with room for whole vectors: scores to e^(score − largest), returning their sum (a place may be hidden by
    // leaving it out); and out[t] += Σ_r weights[t][r] · values[r], rows of `columns`, in the order of r.
    float (*weigh)(float* scores, int32_t count);
    void (*mix)(float const* const* weights, int32_t queries, float const* values, int32_t places, int32_t columns,
        float* const* out);
    // The same product, bit for bit, for more tokens than `lanes`; the tokens packed before into panels of
    // 2 · lanes, one after the other: [tokens rounded up to panels, columns] floats. packPanel: the next one, for the first of
    // `tokens` that are left `of` all; `unpacked` has room for kPanelRows rows in
    // float32, and one more.
    void (*packPanel)(Matrix const& matrix, float const* const* x, int32_t tokens, int32_t of, float* panel);
    void (*panelProduct)(Matrix const& matrix, int32_t first, int32_t last, float const* panels, int32_t tokens,
        float* unpacked, float* const* out);
};

InstructionSet const& instructionSet(); // the best this processor has; DMOE_CPU_ISA=name takes another

// One call of the op; arrays as in dmoe_export/ops/experts/__init__.py, hidden and mixed in float32.
struct Experts {
    int32_t tokens, places, experts, hidden, width;
    float const* x; // [N, H]
    int32_t const* ids; // [N, k]
    float const* weights; // [N, k]
    void const* gateUp; // [E, 2I, H]
    void const* down; // [E, H, I]
    void const* gateUpScales; // [E, 2I, H / group], in float32 or halves
    void const* downScales; // [E, H, I / group]
    bool halfScales;
    Format format;
    int32_t groupShift; // group = 1 << groupShift
    int32_t activation; // DMOE_ACTIVATION_*
    bool fast; // integer or bfloat16 products are allowed, where there are any
    float* mixed; // [N, H]
};

// Runs work(context, 0 … count − 1), on as many threads as the caller likes.
using Parallel = void (*)(void* pool, size_t count, void (*work)(void*, size_t), void* context);

// Weights are read as the session's source holds their experts (../onnxruntime/session.h); null: whenever they are wanted.
// Results do not depend on which are held together. Throws std::runtime_error for an id that is no expert, and when the source
// fails. `lost` says that a weight could not be read, then and before: what was computed is worth nothing (lost_pages.h).
void runExperts(Experts const& call, DmoeSession const* session, Parallel parallel, void* pool, std::atomic<bool>& lost);

} // namespace dmoe::cpu
