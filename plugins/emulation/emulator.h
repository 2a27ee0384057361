// One CUDA thread block at a time on one OS thread: every CUDA thread is a fiber that runs until it has to wait.
//
// Stricter than a GPU where a GPU would be silent: barriers must be reached by all threads of the block and warp
// operations by all 32 lanes, all from the same line; shared memory starts poisoned and is at most 48 KiB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace dmoe::emulation {

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The indices of the running fiber.
struct Indices {
    Dim3 thread, block, block_size, grid_size;
};
extern Indices here;

// 0 or DMOE_ERROR_EMULATION, then message() says why. Not reentrant; callers of several OS threads take turns.
int run(Dim3 grid, unsigned threads, const std::function<void()> &kernel);
const char *message();
void seed(uint64_t value);

// What waits for other threads. `what` and `line` name the place in messages and must agree among the threads.
struct Votes {
    int any, count;
};
Votes block_barrier(const char *what, int line, bool vote);

constexpr size_t kDepositBytes = 64;
// Waits for all lanes of the warp; returns their 32 deposits, `bytes` apart, valid until this lane's next but one
// warp operation.
const void *warp_exchange(const char *what, int line, unsigned mask, const void *deposit, size_t bytes);

// The next array of shared memory; every thread must ask for the same arrays in the same order.
void *shared_memory(size_t bytes);

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char *format, ...);

}  // namespace dmoe::emulation
