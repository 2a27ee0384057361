// Barriers that count arrivals and bytes: what they bring comes as late as the wait for their phase allows.
#include <cstdio>
#include <cstring>
#include <map>

#include "dmoe_emulation.h"
#include "emulator.h"

namespace dmoe::emulation {

namespace {

struct Barrier {
    int arrivals = 0, arrived = 0;
    int64_t expected = 0, asked = 0;  // bytes of this phase
    unsigned phase = 0;
    std::vector<Copy> copies;
    std::vector<unsigned> waiting;

    bool complete() const { return arrived == arrivals && expected == asked; }
};

std::map<uint64_t *, Barrier> barriers;               // of the block, by their places
std::map<unsigned, unsigned> fenced;                  // per thread: barriers of the block it had passed at its last fence, and 1
bool bulk = true;

Barrier &barrier_at(uint64_t *place, int line) {
    const auto found = barriers.find(place);
    if (found == barriers.end()) fail("the barrier in line %d was never made", line);
    return found->second;
}

void wake_all(Barrier &barrier) {
    for (const unsigned thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
}

}  // namespace

bool has_bulk_copies() { return bulk; }

void forget_arrivals() {
    barriers.clear();
    fenced.clear();
}

std::string arrivals_left() {
    char text[200];
    for (const auto &[place, barrier] : barriers) {
        const size_t copies = barrier.copies.size();
        if (barrier.waiting.empty() && !copies) continue;
        std::snprintf(text, sizeof text, "%zu threads wait for %d of %d arrivals, %lld of %lld bytes, %zu copies under way",
                      barrier.waiting.size(), barrier.arrived, barrier.arrivals, static_cast<long long>(barrier.asked),
                      static_cast<long long>(barrier.expected), copies);
        return text;
    }
    return {};
}

void init_arrivals(uint64_t *place, int arrivals) { barriers[place].arrivals = arrivals; }

void fence_bulk_copies() { fenced[here.thread.x] = block_barriers() + 1; }

void expect_bytes(uint64_t *place, int bytes, int line) {
    Barrier &barrier = barrier_at(place, line);
    barrier.expected += bytes;
    if (barrier.complete()) wake_all(barrier);
}

void copy_bulk(void *to, const void *from, int bytes, uint64_t *place, int line) {
    Barrier &barrier = barrier_at(place, line);
    if (bytes <= 0 || (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | static_cast<unsigned>(bytes)) % 16) {
        fail("the bulk copy in line %d is not of multiples of 16 bytes", line);
    }
    if (fenced[here.thread.x] != block_barriers() + 1) fail("no fence between a barrier of the block and the bulk copy in line %d", line);
    std::memset(to, poison(), static_cast<size_t>(bytes));
    barrier.copies.push_back({to, from, static_cast<size_t>(bytes), 0});
    barrier.asked += bytes;
    if (barrier.asked > barrier.expected) {
        fail("the bulk copy in line %d brings more than the %lld bytes expected", line, static_cast<long long>(barrier.expected));
    }
    if (barrier.complete()) wake_all(barrier);
}

void arrive_with_copies(uint64_t *place, int line) {
    Barrier &barrier = barrier_at(place, line);
    if (barrier.arrived == barrier.arrivals) fail("more than %d threads arrive in line %d", barrier.arrivals, line);
    const std::vector<Copy> copies = take_copies();
    barrier.copies.insert(barrier.copies.end(), copies.begin(), copies.end());
    ++barrier.arrived;
    if (barrier.complete()) wake_all(barrier);
}

void wait_for_arrivals(uint64_t *place, unsigned parity, int line) {
    Barrier &barrier = barrier_at(place, line);
    while (barrier.phase % 2 == parity && !barrier.complete()) {
        barrier.waiting.push_back(here.thread.x);
        sleep();
    }
    if (barrier.phase % 2 != parity) return;  // another thread has been here
    for (const Copy &copy : barrier.copies) arrive(copy);
    barrier.copies.clear();
    barrier.arrived = 0;
    barrier.expected = barrier.asked = 0;
    ++barrier.phase;
    wake_all(barrier);
}

}  // namespace dmoe::emulation

extern "C" void dmoe_emulation_bulk_copies(int32_t there) { dmoe::emulation::bulk = there != 0; }
