// The emulated side of kernels/device.cuh: copies into shared memory, fragments out of it, kernels that overlap.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator.h"

#define DMOE_DYNAMIC_SHARED(type, name) type *const name = static_cast<type *>(::dmoe::emulation::dynamic_shared_memory())

namespace dmoe {

namespace emulation {
// Word m of a lane comes from the rows that lanes 8m … 8m + 7 name.
inline void load_matrices(uint32_t (&words)[4], const void *row, bool transposed, const char *what, int line) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("%s in line %d: a row is not 16-byte aligned", what, line);
    const auto *const rows = static_cast<const uint16_t *const *>(warp_exchange(what, line, 0xffffffffu, &row, sizeof row));
    const int g = static_cast<int>(here.thread.x) % 32 / 4, q = static_cast<int>(here.thread.x) % 4;
    for (int m = 0; m < 4; ++m) {
        const uint16_t low = transposed ? rows[8 * m + 2 * q][g] : rows[8 * m + g][2 * q];
        const uint16_t high = transposed ? rows[8 * m + 2 * q + 1][g] : rows[8 * m + g][2 * q + 1];
        words[m] = low | static_cast<uint32_t>(high) << 16;
    }
}
}  // namespace emulation

inline void load_matrices(uint32_t (&words)[4], const void *row, int line = __builtin_LINE()) {
    emulation::load_matrices(words, row, false, "load_matrices", line);
}
inline void load_matrices_transposed(uint32_t (&words)[4], const void *row, int line = __builtin_LINE()) {
    emulation::load_matrices(words, row, true, "load_matrices_transposed", line);
}

inline void copy_async_16(void *shared, const void *from, bool wanted, bool there = true, int line = __builtin_LINE()) {
    if (there) emulation::copy_async(shared, wanted ? from : nullptr, 16, line);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int N>
void wait_for_copies() {
    emulation::wait_for_copies(N);
}

inline void wait_for_predecessor() {}
inline void let_successor_start() {}

}  // namespace dmoe
