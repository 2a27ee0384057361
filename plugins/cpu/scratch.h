// Memory that a thread keeps from call to call: fresh memory would be paged in anew every time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace dmoe::cpu {

// The calling thread's T. One pointer: the library lies in the little memory that a process has for thread-locals of
// libraries opened later, so a few vectors more and a second copy of it could not be opened.
template <typename T>
T& ofThread()
{
    thread_local std::unique_ptr<T> mine;
    if (!mine) {
        mine = std::make_unique<T>();
    }
    return *mine;
}

// At least `count` floats at a cache line's begin: vectors that straddle two lines cost twice.
inline float* room(std::vector<float>& memory, size_t count)
{
    constexpr size_t kLine = 64;
    if (memory.size() < count + kLine / 4) {
        memory = std::vector<float>(count + kLine / 4); // not resize: nothing is worth copying
    }
    auto const address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<float*>((address + kLine - 1) / kLine * kLine);
}

inline uint8_t* roomForBytes(std::vector<float>& memory, int64_t bytes)
{
    return reinterpret_cast<uint8_t*>(room(memory, static_cast<size_t>(bytes + 3) / 4));
}

} // namespace dmoe::cpu
