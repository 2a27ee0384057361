#include "emulator.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "dmoe_emulation.h"
#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dmoe::emulation {

Indices here;

namespace {

constexpr size_t kSharedBytes = 49152;  // what a kernel gets without asking for more
constexpr size_t kRedZone = 128;        // between arrays, so that the address sanitizer sees an overrun
constexpr size_t kMaxArrays = 32;
constexpr unsigned kLanes = 32;

// Threads that wait for each other: all of a block, or all of a warp. Two sets of results, used in turn: a thread can
// be at most one operation ahead of another one, so what a slow thread still reads is never overwritten.
struct Meeting {
    const char *what = nullptr;
    int line = 0;
    unsigned arrived = 0, expected = 0, generation = 0;
    Votes votes[2] = {};
    std::vector<unsigned> waiting;
};

struct Warp {
    Meeting meeting;
    alignas(16) unsigned char deposits[2][kLanes * kDepositBytes];
};

struct Machine {
    std::mutex turn;
    std::string message;
    uint64_t seed = 0, random = 0;
    int64_t launches = 0;
    const std::function<void()> *kernel = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<unsigned> ready;
    std::vector<Warp> warps;
    Meeting block;
    unsigned running = 0;
    bool failed = false;
    size_t dynamic_shared = 0, device_shared = kMostSharedBytes;
    alignas(128) unsigned char shared[kMostSharedBytes + (kMaxArrays + 1) * kRedZone];
    std::vector<size_t> arrays;           // bytes of each, as the first thread asked for them
    std::vector<unsigned> arrays_asked;   // per thread
    std::vector<size_t> array_places;

    Machine() {
        const char *text = std::getenv("DMOE_EMULATION_SEED");
        if (text) seed = std::strtoull(text, nullptr, 0);
    }

    unsigned draw(size_t count) {  // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return static_cast<unsigned>(random % count);
    }
};

Machine &machine() {
    static Machine one;
    return one;
}

void unpoison_shared(Machine &m) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(m.shared, sizeof m.shared);
#else
    (void)m;
#endif
}

// The fiber's thread joins; returns the generation whose results are its own once everyone is there.
unsigned meet(Machine &m, Meeting &meeting, const char *what, int line) {
    if (meeting.arrived == 0) {
        meeting.what = what;
        meeting.line = line;
    } else if (meeting.line != line || (meeting.what != what && std::strcmp(meeting.what, what) != 0)) {
        fail("thread %u of block (%u, %u) is at %s in line %d, others wait at %s in line %d", m.running, here.block.x,
             here.block.y, what, line, meeting.what, meeting.line);
    }
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == meeting.expected) {
        meeting.arrived = 0;
        ++meeting.generation;
        m.ready.insert(m.ready.end(), meeting.waiting.rbegin(), meeting.waiting.rend());  // taken from the back
        meeting.waiting.clear();
        return generation;
    }
    meeting.waiting.push_back(m.running);
    m.fibers[m.running]->leave();
    return generation;
}

void complain_if_stuck(Machine &m, unsigned threads, unsigned finished) {
    if (m.failed) return;
    const std::string left = arrivals_left();
    if (finished == threads && left.empty()) return;
    const Meeting *stuck = &m.block;
    for (const Warp &warp : m.warps) {
        if (warp.meeting.arrived) stuck = &warp.meeting;
    }
    char text[300];
    if (left.empty()) {
        std::snprintf(text, sizeof text, "block (%u, %u): %u of %u threads wait at %s in line %d, the others never come",
                      here.block.x, here.block.y, stuck->arrived, stuck->expected, stuck->what, stuck->line);
    } else {
        std::snprintf(text, sizeof text, "block (%u, %u) ends, or is stuck, and %s", here.block.x, here.block.y, left.c_str());
    }
    m.message = text;
    m.failed = true;
}

void run_block(Machine &m, unsigned threads) {
    unpoison_shared(m);
    std::memset(m.shared, poison(), std::min(sizeof m.shared, kSharedBytes + m.dynamic_shared + (kMaxArrays + 1) * kRedZone));
    forget_copies(threads);
    forget_arrivals();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(m.shared, sizeof m.shared);
#endif
    m.arrays.clear();
    m.array_places.clear();
    m.arrays_asked.assign(threads, 0);
    m.block = Meeting();
    m.block.expected = threads;
    m.warps.assign(threads / kLanes, Warp());
    for (Warp &warp : m.warps) warp.meeting.expected = kLanes;
    m.ready.clear();
    for (unsigned thread = threads; thread-- > 0;) {
        m.fibers[thread]->restart();
        m.ready.push_back(thread);
    }
    unsigned finished = 0;
    while (!m.ready.empty() && !m.failed) {
        // Half of the seeds mix all threads; with the others one warp runs far ahead before another one is drawn.
        if (m.seed && (m.seed % 4 < 2 || m.draw(64) == 0)) std::swap(m.ready[m.draw(m.ready.size())], m.ready.back());
        m.running = m.ready.back();
        m.ready.pop_back();
        here.thread = Dim3(m.running, 0, 0);
        m.fibers[m.running]->enter();
        finished += m.fibers[m.running]->finished();
    }
    complain_if_stuck(m, threads, finished);
    unpoison_shared(m);
}

}  // namespace

// What a fiber runs.
static void thread_body() {
    (*machine().kernel)();
    if (const size_t copies = copies_under_way()) {
        fail("thread %u of block (%u, %u) ends with %zu copies under way", machine().running, here.block.x, here.block.y,
             copies);
    }
}

int run(Dim3 grid, unsigned threads, size_t dynamic_shared, const std::function<void()> &kernel) {
    Machine &m = machine();
    const std::lock_guard<std::mutex> lock(m.turn);
    m.message.clear();
    m.failed = false;
    ++m.launches;
    m.random = m.seed * 0x9e3779b97f4a7c15u | 1;
    m.kernel = &kernel;
    if (threads == 0 || threads % kLanes || threads > 1024 || grid.y > 65535 || grid.z != 1) {
        m.message = "a launch needs whole warps, at most 1024 threads and at most 65535 blocks in y";
        return DMOE_ERROR_EMULATION;
    }
    if (dynamic_shared > m.device_shared) {
        m.message = "a launch asks for more dynamic shared memory than a thread block can have";
        return DMOE_ERROR_EMULATION;
    }
    m.dynamic_shared = dynamic_shared;
    while (m.fibers.size() < threads) m.fibers.push_back(std::make_unique<Fiber>(thread_body));
    here.grid_size = grid;
    here.block_size = Dim3(threads);
    std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = order.size(); m.seed && i > 1; --i) std::swap(order[i - 1], order[m.draw(i)]);
    for (size_t i = 0; i < order.size() && !m.failed; ++i) {
        here.block = Dim3(order[i] % grid.x, order[i] / grid.x, 0);
        run_block(m, threads);
    }
    if (m.failed) m.fibers.clear();  // some are stopped half-way
    return m.failed ? DMOE_ERROR_EMULATION : 0;
}

const char *message() { return machine().message.c_str(); }

void seed(uint64_t value) {
    const std::lock_guard<std::mutex> lock(machine().turn);
    machine().seed = value;
}

void fail(const char *format, ...) {
    Machine &m = machine();
    char text[300];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    m.message = text;
    m.failed = true;
    m.fibers[m.running]->leave();
    std::abort();  // a failed launch resumes nobody
}

void sleep() {
    Machine &m = machine();
    m.fibers[m.running]->leave();
}

void wake(unsigned thread) { machine().ready.push_back(thread); }

unsigned block_barriers() { return machine().block.generation; }

Votes block_barrier(const char *what, int line, bool vote) {
    Machine &m = machine();
    Votes &votes = m.block.votes[m.block.generation % 2];
    if (m.block.arrived == 0) votes = Votes();
    votes.any |= vote;
    votes.count += vote;
    const unsigned generation = meet(m, m.block, what, line);
    return m.block.votes[generation % 2];
}

const void *warp_exchange(const char *what, int line, unsigned mask, const void *deposit, size_t bytes) {
    Machine &m = machine();
    if (mask != 0xffffffffu) fail("%s in line %d: the mask must be a whole warp's, not %#x", what, line, mask);
    if (bytes > kDepositBytes) fail("%s in line %d: %zu bytes per lane are too many", what, line, bytes);
    Warp &warp = m.warps[m.running / kLanes];
    std::memcpy(warp.deposits[warp.meeting.generation % 2] + m.running % kLanes * bytes, deposit, bytes);
    const unsigned generation = meet(m, warp.meeting, what, line);
    return warp.deposits[generation % 2];
}

void *shared_memory(size_t bytes) {
    Machine &m = machine();
    const unsigned index = m.arrays_asked[m.running]++;
    if (index == m.arrays.size()) {
        size_t total = bytes, place = kRedZone;
        for (size_t i = 0; i < m.arrays.size(); ++i) {
            total += m.arrays[i];
            place = m.array_places[i] + (m.arrays[i] + kRedZone - 1) / kRedZone * kRedZone + kRedZone;
        }
        const size_t most = m.dynamic_shared ? m.device_shared : kSharedBytes;
        if (total > most || index >= kMaxArrays / 2) fail("%zu bytes of shared memory are too many", total);
        m.arrays.push_back(bytes);
        m.array_places.push_back(place);
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(m.shared + place, bytes);
#endif
    } else if (m.arrays[index] != bytes) {
        fail("threads disagree about shared array %u: %zu and %zu bytes", index, m.arrays[index], bytes);
    }
    return m.shared + m.array_places[index];
}

void *dynamic_shared_memory() {
    if (!machine().dynamic_shared) fail("the launch asked for no dynamic shared memory");
    return shared_memory(machine().dynamic_shared);
}

int device_shared_bytes() { return static_cast<int>(machine().device_shared); }

unsigned char poison() { return machine().seed % 2 ? 0xcc : 0xff; }

}  // namespace dmoe::emulation

extern "C" void dmoe_emulation_seed(uint64_t seed) { dmoe::emulation::seed(seed); }
extern "C" void dmoe_emulation_shared_bytes(int32_t bytes) {
    dmoe::emulation::machine().device_shared = bytes ? static_cast<size_t>(bytes) : dmoe::emulation::kMostSharedBytes;
}
extern "C" int64_t dmoe_emulation_launches(void) { return dmoe::emulation::machine().launches; }
extern "C" const char *dmoe_emulation_message(void) { return dmoe::emulation::message(); }
