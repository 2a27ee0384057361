// The pages of experts in a mapped file: where they are, and how they come and go. An expert has a slab in each tensor of its layer.
#pragma once

#include "lost_pages.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 // Linux 5.14
#endif

namespace dmoe::cpu {

class ExpertPages {
public:
    ExpertPages(void const* const* tensors, int64_t const* slabs, int32_t layers, int32_t parts)
        : mSlabs(slabs, slabs + parts)
    {
        for (int32_t i = 0; i < layers * parts; ++i) {
            mTensors.push_back(static_cast<char*>(const_cast<void*>(tensors[i])));
        }
    }

    // The layer whose first tensor starts here; -1: none does.
    int32_t layerOf(void const* gateUp) const
    {
        for (size_t i = 0; i < mTensors.size(); i += mSlabs.size()) {
            if (mTensors[i] == gateUp) {
                return static_cast<int32_t>(i / mSlabs.size());
            }
        }
        return -1;
    }

    // Start reading into the page cache; faults would read page by page.
    void read(int32_t layer, int32_t expert) const
    {
        each(layer, expert, [](char* slab, int64_t bytes) {
            for (int64_t part = 0; part < bytes; part += kReadAhead) {
                madvise(slab + part, std::min(kReadAhead, bytes - part), MADV_WILLNEED);
            }
            return true;
        });
    }

    // Whether the file still has it.
    bool populate(int32_t layer, int32_t expert) const
    {
        read(layer, expert);
        return each(layer, expert, [](char* slab, int64_t bytes) {
            return madvise(slab, bytes, MADV_POPULATE_READ) == 0 || (errno == EINVAL && touch(slab, bytes));
        });
    }

    void drop(int32_t layer, int32_t expert) const
    {
        each(layer, expert, [](char* slab, int64_t bytes) { return madvise(slab, bytes, MADV_DONTNEED) == 0; });
    }

private:
    static constexpr int64_t kReadAhead = 128 << 10; // what the kernel reads for one call, usually

    // Before Linux 5.14: reads a byte of every page, as a use would.
    static bool touch(char const* slab, int64_t bytes)
    {
        std::atomic<bool> lost{false};
        catchLostPages();
        LostPages const watch(lost);
        for (int64_t i = 0; i < bytes && !lost; i += sysconf(_SC_PAGESIZE)) {
            static_cast<void>(*static_cast<char const volatile*>(slab + i));
        }
        return !lost;
    }

    // Every slab of an expert; false as soon as one is.
    template <class Work>
    bool each(int32_t layer, int32_t expert, Work work) const
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
};

} // namespace dmoe::cpu
