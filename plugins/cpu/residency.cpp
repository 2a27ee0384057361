#include "residency.h"

#include "lost_pages.h"
#include "worker.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 // Linux 5.14
#endif

namespace {

using dmoe::cpu::LostPages;

constexpr int64_t kReadAhead = 128 << 10; // the kernel reads no more than the device's read-ahead for one call, usually this

class Clock {
public:
    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - mStart).count(); }

private:
    std::chrono::steady_clock::time_point mStart = std::chrono::steady_clock::now();
};

struct State {
    bool mapped = false, resident = false;
    int32_t held = 0; // in use, by so many
    int64_t used = 0; // when last, for the order of leaving
};

} // namespace

struct DmoeResidency {
public:
    DmoeResidency(void const* const* tensors, int64_t const* slabs, int32_t layers, int32_t parts, int32_t experts,
        int32_t capacity)
        : mSlabs(slabs, slabs + parts), mExperts(experts), mCapacity(capacity),
          mStates(static_cast<size_t>(layers) * experts)
    {
        for (int32_t i = 0; i < layers * parts; ++i) {
            mTensors.push_back(static_cast<char*>(const_cast<void*>(tensors[i])));
        }
    }

    int32_t acquire(void const* gateUp, int32_t* experts, int32_t count)
    {
        int32_t const layer = layerOf(gateUp);
        if (layer < 0 || count < 1) {
            return -1;
        }
        std::unique_lock<std::mutex> guard(mMutex);
        for (;;) {
            int32_t* const end = experts + count;
            auto const absent = std::stable_partition(experts, end, [&](int32_t e) { return at(layer, e).mapped; });
            if (absent != experts) {
                hold(layer, experts, absent);
                readAhead(layer, absent, end);
                return static_cast<int32_t>(absent - experts);
            }
            int32_t const unheld = mCapacity - number([](State const& s) { return s.mapped && s.held > 0; });
            if (unheld > 0) {
                return admit(guard, layer, experts, std::min({count, unheld, room()}), count);
            }
            mChanged.wait(guard); // for another thread's group, or an expert on its way
        }
    }

    void release(void const* gateUp, int32_t const* experts, int32_t count)
    {
        std::lock_guard<std::mutex> const guard(mMutex);
        letGo(layerOf(gateUp), experts, experts + count);
    }

    void move(int32_t const* bring, int32_t bringing, int32_t const* evict, int32_t evicting)
    {
        std::lock_guard<std::mutex> const guard(mMutex);
        std::for_each(evict, evict + evicting, [this](int32_t e) { mStates[e].resident = false; });
        std::for_each(bring, bring + bringing, [this](int32_t e) { mStates[e].resident = true; });
        mBringer.give([this, coming = std::vector<int32_t>(bring, bring + bringing)] {
            std::all_of(coming.begin(), coming.end(), [this](int32_t e) { return this->bring(e); });
        });
    }

    void wait() { mBringer.wait(); }

    void close()
    {
        mClosing = true;
        mBringer.close();
        mReader.close();
    }

    DmoeResidencyTotals totals()
    {
        std::lock_guard<std::mutex> const guard(mMutex);
        return mTotals;
    }

    void states(uint8_t* states)
    {
        std::lock_guard<std::mutex> const guard(mMutex);
        std::transform(mStates.begin(), mStates.end(), states, [](State const& s) {
            return static_cast<uint8_t>((s.mapped ? 1 : 0) + (s.resident ? 2 : 0) + (s.held > 0 ? 4 : 0));
        });
    }

private:
    int32_t layerOf(void const* gateUp) const
    {
        for (size_t i = 0; i < mTensors.size(); i += mSlabs.size()) {
            if (mTensors[i] == gateUp) {
                return static_cast<int32_t>(i / mSlabs.size());
            }
        }
        return -1;
    }

    State& at(int32_t layer, int32_t expert) { return mStates[static_cast<size_t>(layer) * mExperts + expert]; }

    template <class Test>
    int32_t number(Test test) const
    {
        return static_cast<int32_t>(std::count_if(mStates.begin(), mStates.end(), test));
    }

    int32_t mapped() const
    {
        return number([](State const& s) { return s.mapped; });
    }

    // Experts that could be in memory beside the residents that are; at least one.
    int32_t room() const
    {
        return std::max(1, mCapacity - number([](State const& s) { return s.mapped && s.resident; }));
    }

    void hold(int32_t layer, int32_t const* begin, int32_t const* end)
    {
        std::for_each(begin, end, [&](int32_t e) { at(layer, e).held += 1; });
    }

    void letGo(int32_t layer, int32_t const* begin, int32_t const* end)
    {
        mClock += 1;
        std::for_each(begin, end, [&](int32_t e) {
            at(layer, e).held -= 1;
            at(layer, e).used = mClock;
        });
        mChanged.notify_all();
    }

    // Brings the first `group` of these and holds them; the lock is open meanwhile.
    int32_t admit(std::unique_lock<std::mutex>& guard, int32_t layer, int32_t* experts, int32_t group, int32_t count)
    {
        Clock const clock;
        enter(layer, experts, experts + group);
        guard.unlock();
        bool const there = std::all_of(experts, experts + group, [&](int32_t e) { return populate(layer, e); });
        guard.lock();
        if (!there) {
            letGo(layer, experts, experts + group);
            return -1;
        }
        mTotals.missed += group;
        mTotals.missSeconds += clock.seconds();
        readAhead(layer, experts + group, experts + count);
        return group;
    }

    // Makes room, and counts them as mapped and held.
    void enter(int32_t layer, int32_t const* begin, int32_t const* end)
    {
        leave(mapped() + static_cast<int32_t>(end - begin) - mCapacity);
        std::for_each(begin, end, [&](int32_t e) { at(layer, e).mapped = true; });
        hold(layer, begin, end);
        mTotals.peak = std::max<int64_t>(mTotals.peak, mapped());
    }

    // Gives back `count` experts that nobody holds: no resident if possible, and first the longest unused.
    void leave(int32_t count)
    {
        if (count <= 0) {
            return;
        }
        Clock const clock;
        std::vector<int32_t> free;
        for (size_t i = 0; i < mStates.size(); ++i) {
            if (mStates[i].mapped && mStates[i].held == 0) {
                free.push_back(static_cast<int32_t>(i));
            }
        }
        std::stable_sort(free.begin(), free.end(), [this](int32_t a, int32_t b) {
            State const &one = mStates[a], &other = mStates[b];
            return one.resident != other.resident ? other.resident : one.used < other.used;
        });
        free.resize(std::min(free.size(), static_cast<size_t>(count)));
        for (int32_t const e : free) {
            each(e / mExperts, e % mExperts, [](char* slab, int64_t bytes) { return madvise(slab, bytes, MADV_DONTNEED) == 0; });
            mStates[e].mapped = false;
        }
        mTotals.dropped += static_cast<int64_t>(free.size());
        mTotals.dropSeconds += clock.seconds();
    }

    // The next ones into the page cache, in the background: as many as there may be room for.
    void readAhead(int32_t layer, int32_t const* begin, int32_t const* end)
    {
        if (begin != end) {
            std::vector<int32_t> next(begin, begin + std::min<int64_t>(end - begin, room()));
            mReader.give([this, layer, next = std::move(next)] {
                for (size_t i = 0; i < next.size() && !mClosing; ++i) {
                    read(layer, next[i]);
                }
            });
        }
    }

    // A resident that is absent, if there is room without another resident's leaving; false: the file has lost it.
    bool bring(int32_t e)
    {
        int32_t const layer = e / mExperts, expert = e % mExperts;
        {
            std::lock_guard<std::mutex> const guard(mMutex);
            int32_t const fixed = number([](State const& s) { return s.mapped && (s.resident || s.held > 0); });
            if (mClosing || mStates[e].mapped || !mStates[e].resident || fixed >= mCapacity) {
                return true;
            }
            enter(layer, &expert, &expert + 1);
        }
        Clock const clock;
        bool const there = populate(layer, expert);
        std::lock_guard<std::mutex> const guard(mMutex);
        letGo(layer, &expert, &expert + 1);
        mTotals.brought += there ? 1 : 0;
        mTotals.bringSeconds += there ? clock.seconds() : 0;
        return there; // the next forward's check of the file says so
    }

    // Start reading into the page cache; faults would read page by page.
    void read(int32_t layer, int32_t expert)
    {
        each(layer, expert, [](char* slab, int64_t bytes) {
            for (int64_t part = 0; part < bytes; part += kReadAhead) {
                madvise(slab + part, std::min(kReadAhead, bytes - part), MADV_WILLNEED);
            }
            return true;
        });
    }

    // Whether the file still has it.
    bool populate(int32_t layer, int32_t expert)
    {
        read(layer, expert);
        return each(layer, expert, [](char* slab, int64_t bytes) {
            return madvise(slab, bytes, MADV_POPULATE_READ) == 0 || (errno == EINVAL && touch(slab, bytes));
        });
    }

    // Before Linux 5.14: reads a byte of every page, as a use would.
    static bool touch(char const* slab, int64_t bytes)
    {
        std::atomic<bool> lost{false};
        dmoe::cpu::catchLostPages();
        LostPages const watch(lost);
        for (int64_t i = 0; i < bytes && !lost; i += sysconf(_SC_PAGESIZE)) {
            static_cast<void>(*static_cast<char const volatile*>(slab + i));
        }
        return !lost;
    }

    // Every slab of an expert; false as soon as one is.
    template <class Work>
    bool each(int32_t layer, int32_t expert, Work work)
    {
        for (size_t part = 0; part < mSlabs.size(); ++part) {
            if (!work(mTensors[layer * mSlabs.size() + part] + expert * mSlabs[part], mSlabs[part])) {
                return false;
            }
        }
        return true;
    }

    std::vector<char*> mTensors; // [layers, parts]
    std::vector<int64_t> const mSlabs; // [parts]
    int32_t const mExperts, mCapacity;
    std::mutex mMutex; // guards what follows
    std::condition_variable mChanged; // somebody let go
    std::vector<State> mStates; // [layers, experts]
    int64_t mClock = 0;
    DmoeResidencyTotals mTotals{};
    std::atomic<bool> mClosing{false};
    dmoe::cpu::Worker mBringer{"bring-experts"}, mReader{"read-experts"}; // end first
};

DmoeResidency* dmoe_residency_create(void const* const* tensors, int64_t const* slabs, int32_t layers, int32_t parts,
    int32_t experts, int32_t capacity)
{
    return new DmoeResidency(tensors, slabs, layers, parts, experts, capacity);
}

void dmoe_residency_destroy(DmoeResidency* books)
{
    books->close();
    delete books;
}

int32_t dmoe_residency_acquire(void* books, void const* gate_up, int32_t* experts, int32_t count)
{
    return static_cast<DmoeResidency*>(books)->acquire(gate_up, experts, count);
}

void dmoe_residency_release(void* books, void const* gate_up, int32_t const* experts, int32_t count)
{
    static_cast<DmoeResidency*>(books)->release(gate_up, experts, count);
}

void dmoe_residency_move(DmoeResidency* books, int32_t const* bring, int32_t bringing, int32_t const* evict, int32_t evicting)
{
    books->move(bring, bringing, evict, evicting);
}

void dmoe_residency_wait(DmoeResidency* books) { books->wait(); }
void dmoe_residency_close(DmoeResidency* books) { books->close(); }
void dmoe_residency_totals(DmoeResidency* books, DmoeResidencyTotals* totals) { *totals = books->totals(); }
void dmoe_residency_states(DmoeResidency* books, uint8_t* states) { books->states(states); }
