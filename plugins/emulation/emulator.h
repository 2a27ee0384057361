// One CUDA thread block at a time on one OS thread: every CUDA thread is a fiber that runs until it has to wait.
//
// Stricter than a GPU where a GPU would be silent: barriers must be reached by all threads of the block and warp
// operations by all 32 lanes, all from the same line; shared memory starts poisoned, is at most 48 KiB unless a launch
// asks for more, and what is copied into it asynchronously is poison until the copying thread has waited.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

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

// Barriers in shared memory whose phases end when `arrivals` threads have arrived and the bytes that were expected have
// come (arrivals.cpp). A bulk copy must have been expected exactly, and asked for behind a fence that follows the thread's
// last barrier of the block; its bytes come when a thread waits for the phase.
void init_arrivals(uint64_t *barrier, int arrivals);
void fence_bulk_copies();
void expect_bytes(uint64_t *barrier, int bytes, int line);
void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier, int line);
void arrive_with_copies(uint64_t *barrier, int line);
void wait_for_arrivals(uint64_t *barrier, unsigned parity, int line);
// Whether the emulated device has them; dmoe_emulation_bulk_copies() says.
bool has_bulk_copies();

// For the emulator itself.
struct Copy {
    void *to;
    const void *from;  // null: zeros
    size_t bytes;
    unsigned group;
};
void arrive(const Copy &copy);
std::vector<Copy> take_copies();  // of the running thread, all that it has not waited for
void forget_arrivals();
std::string arrivals_left();  // what is wrong with the barriers of a block that has ended, or waits for ever; or nothing
void sleep();                 // the running thread, until somebody wakes it
void wake(unsigned thread);
unsigned block_barriers();    // how many the block has passed
// What a place nobody has written holds; a new block; how many copies the running thread has not
// waited for, which must be none when it ends.
unsigned char poison();
void forget_copies(unsigned threads);
size_t copies_under_way();

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char *format, ...);

}  // namespace dmoe::emulation
