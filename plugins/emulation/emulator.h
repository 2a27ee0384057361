// One CUDA thread block at a time on one OS thread: every CUDA thread is a fiber that runs until it has to wait.
//
// Stricter than a GPU where a GPU would be silent: barriers must be reached by all threads of the block and warp
// operations by all 32 lanes, all from the same line; shared memory starts poisoned, is at most 48 KiB unless a launch
// asks for more, and what is copied into it asynchronously is poison until the copying thread has waited.
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

// What a GPU of compute capability 9.0 gives a thread block at most, static and dynamic.
constexpr size_t kMostSharedBytes = 232448;
// What the emulated device gives: that, or what dmoe_emulation_shared_bytes() says.
int device_shared_bytes();

// 0 or DMOE_ERROR_EMULATION, then message() says why. Not reentrant; callers of several OS threads take turns.
// dynamic_shared: bytes of dynamic shared memory.
int run(Dim3 grid, unsigned threads, size_t dynamic_shared, const std::function<void()> &kernel);
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
// The launch's dynamic shared memory, an array like any other.
void *dynamic_shared_memory();

// Asynchronous copies of the running thread. `to` is poisoned here and gets its bytes in the wait for their group;
// from = null: zeros.
void copy_async(void *to, const void *from, size_t bytes, int line);
void commit_copies();
// Until at most `groups` groups are under way.
void wait_for_copies(unsigned groups);

// For the emulator itself: what a place nobody has written holds; a new block; how many copies the running thread has not
// waited for, which must be none when it ends.
unsigned char poison();
void forget_copies(unsigned threads);
size_t copies_under_way();

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char *format, ...);

}  // namespace dmoe::emulation
