// Asynchronous copies into shared memory: a copy happens as late as the wait for its group allows.
#include <cstring>
#include <utility>
#include <vector>

#include "emulator.h"

namespace dmoe::emulation {

namespace {

struct Thread {
    std::vector<Copy> copies;  // that have not arrived, in the order they were asked for
    unsigned group = 0;        // the one that is being made
};

std::vector<Thread> threads;  // of the block

Thread &mine() { return threads[here.thread.x]; }

}  // namespace

void forget_copies(unsigned count) { threads.assign(count, Thread()); }

size_t copies_under_way() { return mine().copies.size(); }

void copy_async(void *to, const void *from, size_t bytes, int line) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
        fail("an asynchronous copy in line %d is not aligned to its %zu bytes", line, bytes);
    }
    std::memset(to, poison(), bytes);
    mine().copies.push_back({to, from, bytes, mine().group});
}

void commit_copies() { ++mine().group; }

void arrive(const Copy &copy) {
    if (copy.from) {
        std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
        std::memset(copy.to, 0, copy.bytes);
    }
}

std::vector<Copy> take_copies() { return std::exchange(mine().copies, {}); }

void wait_for_copies(unsigned groups) {
    Thread &thread = mine();
    size_t arrived = 0;
    for (; arrived < thread.copies.size() && thread.copies[arrived].group + groups < thread.group; ++arrived) {
        arrive(thread.copies[arrived]);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(arrived));
}

}  // namespace dmoe::emulation
