// The emulated side of kernels/device.cuh: bulk copies into shared memory, and barriers that count what has arrived there.
#pragma once

#include "emulator.h"

namespace dmoe {

inline bool has_bulk_copies() { return emulation::has_bulk_copies(); }

// Lane 0, once the whole warp has asked.
inline bool elected(int line = __builtin_LINE()) {
    emulation::warp_exchange("elected", line, 0xffffffffu, "", 1);
    return emulation::here.thread.x % 32 == 0;
}

struct Arrivals {
    uint64_t *place;
    Arrivals operator[](int index) const { return {place + index}; }
};
inline Arrivals arrivals_at(uint64_t *shared) { return {shared}; }
inline void init_arrivals(Arrivals barrier, int threads) { emulation::init_arrivals(barrier.place, threads); }
inline void publish_arrivals() {}
inline void fence_bulk_copies() { emulation::fence_bulk_copies(); }
inline void expect_bytes(Arrivals barrier, int bytes, int line = __builtin_LINE()) {
    emulation::expect_bytes(barrier.place, bytes, line);
}
inline void copy_bulk(void *shared, const void *from, int bytes, Arrivals barrier, int line = __builtin_LINE()) {
    emulation::copy_bulk(shared, from, bytes, barrier.place, line);
}
inline void arrive_with_copies(Arrivals barrier, int line = __builtin_LINE()) {
    emulation::arrive_with_copies(barrier.place, line);
}
inline void wait_for_arrivals(Arrivals barrier, unsigned parity, int line = __builtin_LINE()) {
    emulation::wait_for_arrivals(barrier.place, parity, line);
}

}  // namespace dmoe
